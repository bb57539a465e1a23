import pytest
import torch

from ragkit.config import PageSelectorName, PageVote
from ragkit.errors import KVCacheError
from ragkit.kernels.dequantize_kv import dequantize_kv
from ragkit.kernels.page_log_sums import page_log_sums_torch
from ragkit.kernels.page_scores import KeyBounds, Pooling, page_scores_torch
from ragkit.kernels.quantize_kv import quantize_kv
from ragkit.kernels.quantized_blocks import QuantizedBlocks
from ragkit.kvcache import page_selector_centroids
from ragkit.kvcache.layout import KVLayout, LayerSpec
from ragkit.kvcache.page_scoring import score_bounds, score_vectors
from ragkit.kvcache.page_selector import Election, PageRows, pool_votes
from ragkit.kvcache.page_selector_centroids import Centroids
from ragkit.kvcache.page_selector_low_rank import LowRank
from ragkit.kvcache.page_selector_min_max import MinMax
from ragkit.kvcache.page_selector_representative import RepresentativeKeys
from ragkit.kvcache.page_selector_soft_vote import SoftVote
from ragkit.kvcache.page_selectors import make_page_selector
from ragkit.kvcache.page_summaries import PageSummaries
from ragkit.kvcache.page_summary_shapes import PageSummaryShapes

KV_HEADS, Q_HEADS, DIM, PAGE = 2, 6, 16, 8


def _keys(pages, seed=0):
    return torch.randn(pages, PAGE, KV_HEADS, DIM, generator=torch.Generator().manual_seed(seed))


def _rows(pages, seed=0):
    received = torch.rand(pages, PAGE, KV_HEADS, generator=torch.Generator().manual_seed(seed + 100))
    return PageRows(_keys(pages, seed), received)


def _queries(count, seed=1):
    return torch.randn(count, Q_HEADS, DIM, generator=torch.Generator().manual_seed(seed))


def _summary(selector, rows):
    summaries = PageSummaries(selector, 1)
    summaries.append(0, rows)
    return summaries.of(0)


@pytest.mark.parametrize("name", PageSelectorName)
def test_pages_that_come_piece_by_piece_have_the_summary_of_all_at_once(name):
    selector = make_page_selector(name)
    rows = _rows(11)
    whole, grown = PageSummaries(selector, 1), PageSummaries(selector, 1)
    whole.append(0, rows)
    for start, stop in ((0, 2), (2, 7), (7, 8), (8, 11)):
        grown.append(0, PageRows(rows.keys[start:stop], rows.received[start:stop]))
    assert grown.num_pages == [11]
    for mine, other in zip(grown.of(0), whole.of(0), strict=True):
        torch.testing.assert_close(mine, other)


LAYER = Election(PageVote.SOFTMAX, 1, 0.25)
BEST = [name for name in PageSelectorName if name not in ("everything", "window")]


@pytest.mark.parametrize("groups", [1, KV_HEADS])
@pytest.mark.parametrize("vote", PageVote)
@pytest.mark.parametrize("name", PageSelectorName)
def test_scores_have_a_row_for_each_group_of_heads_and_a_column_a_page(name, vote, groups):
    selector = make_page_selector(name)
    scores = selector.score(_queries(3), _summary(selector, _rows(21)), 2, 19, Election(vote, groups, 0.25))
    assert scores.shape == (groups, 17)
    assert scores.dtype == torch.float32
    assert bool(scores.isfinite().all())


@pytest.mark.parametrize("name", [name for name in BEST if name != "centroids-2"])  # which prunes among the candidates
def test_pages_compare_alike_whichever_others_compete(name):
    selector = make_page_selector(name)
    summary = _summary(selector, _rows(21))
    single = Election(PageVote.SUM, 1, 0.25)
    whole = selector.score(_queries(2), summary, 0, 21, single)
    torch.testing.assert_close(selector.score(_queries(2), summary, 3, 14, single), whole[:, 3:14])


@pytest.mark.parametrize("name", BEST)
def test_a_page_of_keys_like_the_query_is_found_among_others(name):
    selector = make_page_selector(name)
    rows = _rows(40)
    queries = _queries(1)
    target = queries[0].unflatten(0, (KV_HEADS, -1)).mean(1)  # (kv_heads, head_dim)
    rows.keys[23] += 3 * target
    scores = selector.score(queries, _summary(selector, rows), 1, 38, LAYER)
    assert scores.argmax().item() + 1 == 23


@pytest.mark.parametrize("name", ["min-max", "low-rank", "soft-vote", "centroids", "centroids-2", "representative"])
def test_a_single_row_that_matters_is_not_lost_in_its_page(name):
    selector = make_page_selector(name)
    rows = PageRows(_keys(40) * 0.3, torch.rand(40, PAGE, KV_HEADS) * 0.01)
    queries = _queries(1)
    target = queries[0].unflatten(0, (KV_HEADS, -1)).mean(1)
    rows.keys[23, 5] = 4 * target
    rows.received[23, 5] = 1.0
    scores = selector.score(queries, _summary(selector, rows), 1, 38, LAYER)
    assert scores.argmax().item() + 1 == 23


def test_the_mean_key_scores_a_page_by_the_products_of_each_query_head_with_its_key_heads_mean():
    selector = make_page_selector("mean-key")
    keys, queries = _keys(3), _queries(1)
    scores = selector.score(queries, _summary(selector, PageRows(keys)), 0, 3, Election(PageVote.MAX, 2, 0.5))
    means = keys[2, :, 1].mean(0)  # query heads 3 to 5 belong to key head 1
    assert scores[1, 2].item() == pytest.approx(
        max(0.5 * float(queries[0, head] @ means) for head in (3, 4, 5)), abs=1e-5
    )


def test_bounds_are_above_the_product_of_every_key_and_as_tight_as_parts_allow():
    keys, queries = torch.randn(5, 32, KV_HEADS, DIM, generator=torch.Generator().manual_seed(5)), _queries(1)
    fine, coarse = MinMax(16), MinMax(32)
    loud = Election(PageVote.MAX, 2, 1.0)
    scores = [one.score(queries, _summary(one, PageRows(keys)), 0, 5, loud) for one in (fine, coarse)]
    products = torch.einsum("hgd,prhd->hgpr", queries[0].unflatten(0, (2, 3)), keys).amax(dim=(1, 3))
    assert bool((products <= scores[0]).all())
    assert bool((scores[0] <= scores[1]).all())
    assert not torch.equal(scores[0], scores[1])
    single = MinMax(1)
    tight = single.score(queries, _summary(single, PageRows(keys)), 0, 5, loud)
    assert bool((products <= tight).all())
    torch.testing.assert_close(tight, products, rtol=0.02, atol=0.15)  # kept as bf16


def test_the_soft_vote_gives_a_page_the_attention_that_all_heads_would_give_its_tokens():
    selector, keys, queries = SoftVote(bits=8), _keys(6), _queries(2)
    scores = selector.score(queries, _summary(selector, PageRows(keys)), 1, 5, Election(PageVote.SOFTMAX, 1, 0.25))
    tokens = keys[1:5].flatten(0, 1).repeat_interleave(3, dim=1)
    weights = (torch.einsum("qhd,thd->qht", queries, tokens) * 0.25).softmax(-1)
    torch.testing.assert_close(scores[0], weights.unflatten(2, (4, PAGE)).sum(dim=(0, 1, 3)), rtol=0.02, atol=0.01)
    assert scores.sum().item() == pytest.approx(2 * Q_HEADS, abs=1e-3)


def _low_rank_keys(pages, rank, head_dim, noise=0.0):
    rng = torch.Generator().manual_seed(9)
    basis = torch.linalg.qr(torch.randn(KV_HEADS, head_dim, rank, generator=rng)).Q
    along = torch.randn(pages, PAGE, KV_HEADS, rank, generator=rng)
    keys = torch.einsum("pthr,hdr->pthd", along, basis) + torch.randn(KV_HEADS, head_dim, generator=rng)
    return (keys + noise * torch.randn(keys.shape, generator=rng)).contiguous()


def test_keys_that_differ_in_few_directions_score_in_these_as_in_all():
    keys = _low_rank_keys(40, 6, 128)
    queries = torch.randn(3, Q_HEADS, 128, generator=torch.Generator().manual_seed(2))
    vote, alone = Election(PageVote.SOFTMAX, 1, 0.3), Election(PageVote.SOFTMAX, KV_HEADS, 0.3)
    for election in (vote, alone):
        low, exact = (
            one.score(queries, _summary(one, PageRows(keys)), 2, 37, election) for one in (LowRank(), SoftVote(bits=8))
        )
        assert _summary(LowRank(), PageRows(keys))[0].shape == (KV_HEADS, 128, 32)
        torch.testing.assert_close(low, exact, rtol=0.25, atol=0.02)  # of codes of four bits against eight
        assert torch.equal(low.argmax(dim=1), exact.argmax(dim=1))


def test_a_basis_is_fitted_to_the_first_pages_and_kept_for_those_that_follow():
    keys = _low_rank_keys(24, 6, 64, noise=0.1)
    summaries = PageSummaries(LowRank(), 1)
    fitted = []
    for start in range(0, 24, 2):
        summaries.append(0, PageRows(keys[start : start + 2]))
        fitted.append(summaries.fitted(0)[0])
    assert not torch.equal(fitted[2], fitted[3])  # the first group is open until it has eight pages
    assert all(torch.equal(fitted[3], later) for later in fitted[4:])
    assert torch.equal(fitted[3], LowRank().fit(PageRows(keys[:8]))[0])


@pytest.mark.parametrize("head_dim", [16, 64, 80, 128])
def test_low_rank_keys_are_summed_without_the_kernel_as_by_it(head_dim):
    rng = torch.Generator().manual_seed(3)
    keys, queries = (torch.randn(*shape, head_dim, generator=rng) for shape in ((9, 16, KV_HEADS), (2, Q_HEADS)))
    basis, _, *codes = _summary(LowRank(), PageRows(keys))
    along = torch.einsum("nhgd,hdr->nhgr", queries.unflatten(1, (KV_HEADS, -1)), basis).flatten(1, 2)
    election = Election(PageVote.SOFTMAX, 1, head_dim**-0.5)
    by_kernel = pool_votes(page_log_sums_torch(along, QuantizedBlocks(*codes, 4), scale=election.scale), election)
    scores = LowRank().score(queries, (basis, None, *codes), 0, 9, election)
    torch.testing.assert_close(scores, by_kernel, rtol=1e-4, atol=1e-5)


def test_centroids_of_keys_of_as_many_kinds_give_the_soft_vote():
    kinds = torch.randn(3, 1, KV_HEADS, DIM, generator=torch.Generator().manual_seed(8)).expand(-1, PAGE, -1, -1)
    rows = PageRows(kinds[torch.tensor([0, 0, 1, 1, 1, 2, 2, 2])])  # 64 keys have 3 centroids
    one, exact = Centroids(group_pages=8), SoftVote(bits=8)
    mine, other = (select.score(_queries(2), _summary(select, rows), 0, 8, LAYER) for select in (one, exact))
    torch.testing.assert_close(mine, other, rtol=0, atol=0.02)


@pytest.mark.parametrize("kv_heads", [1, 3])
@pytest.mark.parametrize("levels", [1, 2])
def test_groups_that_are_clustered_at_once_have_the_centroids_of_each_alone(monkeypatch, levels, kv_heads):
    monkeypatch.setattr(page_selector_centroids, "_GROUPS_AT_ONCE", 2)
    selector, keys = Centroids(levels), torch.randn(29, 32, kv_heads, DIM, generator=torch.Generator().manual_seed(3))
    alone = [selector.summarise(PageRows(keys[start : start + 8])) for start in range(0, 29, 8)]
    for part, parts in zip(selector.summarise(PageRows(keys)), zip(*alone, strict=True), strict=True):
        assert torch.equal(part, torch.cat(parts))


def test_a_cluster_without_a_row_weighs_nothing_and_logits_may_be_large():
    keys = torch.ones(8, PAGE, KV_HEADS, DIM) * 300.0
    selector = Centroids()
    scores = selector.score(_queries(1) * 100, _summary(selector, PageRows(keys)), 0, 8, LAYER)
    torch.testing.assert_close(scores, torch.full((1, 8), Q_HEADS / 8))


def test_the_second_level_scores_as_one_level_does_where_it_prunes_nothing():
    rows, queries = _rows(64), _queries(2)
    one, two = (Centroids(levels=levels, group_pages=4) for levels in (1, 2))
    torch.testing.assert_close(
        two.score(queries, _summary(two, rows), 0, 64, LAYER), one.score(queries, _summary(one, rows), 0, 64, LAYER)
    )


def test_the_second_level_leaves_out_groups_that_the_first_keeps_for_last():
    rows, queries = _rows(320), _queries(1)
    one, two = (Centroids(levels=levels, group_pages=4) for levels in (1, 2))
    loud = Election(PageVote.MAX, 1, 1.0)
    fine, pruned = (select.score(queries, _summary(select, rows), 0, 320, loud) for select in (one, two))
    kept = pruned > -1000
    assert kept.sum().item() == 80
    torch.testing.assert_close(pruned[kept], fine[kept])
    best = set(fine[0].topk(16).indices.tolist())
    assert len(best & set(pruned[0].topk(16).indices.tolist())) >= 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("bits", "group"), [(8, 64), (4, 32)])
@pytest.mark.parametrize("page_size", [8, 16, 64])
@pytest.mark.parametrize("name", ["min-max", "mean-key"])
def test_what_is_kept_of_pages_of_a_pool_is_what_their_decoded_keys_give(name, page_size, bits, group, dtype):
    selector, rng = make_page_selector(name), torch.Generator().manual_seed(4)
    group, device = min(group, page_size), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = torch.randn(7 * page_size, KV_HEADS, DIM, generator=rng) + 3.0 * torch.randn(KV_HEADS, DIM, generator=rng)
    codes = quantize_kv(rows.to(device, dtype), bits=bits, token_group=group, channel_group=1)
    decoded = torch.empty(7 * page_size, KV_HEADS, DIM, dtype=dtype, device=device)
    dequantize_kv(codes, decoded, token_group=group)
    expected = selector.summarise(PageRows(decoded.view(7, page_size, KV_HEADS, DIM)))
    kept = tuple(torch.full((9, *part.shape[1:]), 7.0, dtype=part.dtype, device=device) for part in expected)
    keys = QuantizedBlocks(*(part.unflatten(0, (7, -1)).contiguous() for part in codes), bits)
    selector.keep(keys, torch.tensor([5, 1, 2], device=device), kept, dtype)
    for mine, of_all in zip(kept, expected, strict=True):
        assert torch.equal(mine[[1, 2, 5]], of_all[[1, 2, 5]])
        assert bool((mine[[0, 3, 4, 6, 7, 8]] == 7).all())


def test_representatives_are_the_keys_that_were_looked_at_most():
    rows = _rows(3)
    selector = RepresentativeKeys(count=2)
    (means,) = selector.summarise(rows)
    most = rows.received[1, :, 0].topk(2).indices
    torch.testing.assert_close(means[1, 0], rows.keys[1, most, 0].mean(0))


def test_a_selector_that_needs_what_was_not_kept_says_so():
    summaries = PageSummaries(RepresentativeKeys(), 1)
    with pytest.raises(KVCacheError, match="representative-4 needs the attention that rows received"):
        summaries.append(0, PageRows(_keys(2)))


def test_in_a_soft_vote_a_loud_head_counts_as_much_as_a_quiet_one():
    logits = torch.tensor([[[9.0, 1.0, 0.0], [0.0, 2.0, 0.0], [0.0, 2.0, 0.0]]])
    soft, added, highest = (pool_votes(logits, Election(vote, 1, 1.0))[0] for vote in PageVote)
    assert (soft.argmax().item(), added.argmax().item()) == (1, 0)
    assert soft.sum().item() == pytest.approx(3.0)
    assert highest.tolist() == [9.0, 2.0, 0.0]


def test_key_heads_that_choose_for_themselves_hear_their_own_query_heads_only():
    logits = torch.zeros(2, 4, 5)
    logits[:, :2, 3] = 4.0
    logits[:, 2:, 1] = 4.0
    assert pool_votes(logits, Election(PageVote.SOFTMAX, 2, 1.0)).argmax(-1).tolist() == [3, 1]


@pytest.mark.parametrize("vote", PageVote)
@pytest.mark.parametrize("groups", [1, KV_HEADS])
def test_scores_on_a_cpu_rank_pages_as_the_kernels_definition_does(vote, groups):
    keys, queries = _keys(12), _queries(2)
    election = Election(vote, groups, 0.25)
    pooling = {PageVote.SOFTMAX: Pooling.VOTE, PageVote.SUM: Pooling.MEAN, PageVote.MAX: Pooling.MAX}[vote]
    bounds = KeyBounds(keys.unflatten(1, (2, 4)).amin(2), keys.unflatten(1, (2, 4)).amax(2))
    for mine, summaries in (
        (score_vectors(queries, keys, election), keys),
        (score_bounds(queries, bounds, election), bounds),
    ):
        kernel = page_scores_torch(queries, summaries, pooling=pooling, per_head=groups > 1, scale=0.25)
        factor = (
            2 * Q_HEADS / groups if vote is PageVote.SUM else 1.0
        )  # the kernel takes the mean of what is added here
        torch.testing.assert_close(mine, kernel * factor, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", BEST)
@pytest.mark.parametrize(("kv_heads", "head_dim", "size"), [(2, 64, 64), (1, 128, 16)])
def test_the_bytes_that_summaries_take_are_known_before_there_are_any(name, kv_heads, head_dim, size):
    selector, pages = make_page_selector(name), 8000
    spec = LayerSpec(kv_heads, head_dim, None)
    expected = PageSummaryShapes(selector, KVLayout((spec, spec), torch.bfloat16), size).nbytes(pages)
    made = PageSummaries(selector, 2)
    rows = PageRows(torch.randn(48, size, kv_heads, head_dim).bfloat16(), torch.rand(48, size, kv_heads))
    for layer in range(2):
        made.append(layer, rows)
    fitted = 2 * sum(part.nbytes for part in made.fitted(0))  # of the document, however many pages it has
    assert expected == (made.nbytes - fitted) * pages / 48
    small = PageSummaryShapes(selector, KVLayout((spec,), torch.bfloat16), size).nbytes(pages // 2)
    assert expected == 4 * small


def test_an_unknown_selector_is_refused_by_name():
    with pytest.raises(KVCacheError, match="no page selector 'best'; there are everything, window, mean-key"):
        make_page_selector("best")
