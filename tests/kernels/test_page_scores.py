import math

import pytest
import torch

from ragkit.errors import KernelInputError
from ragkit.kernels import page_scores as module
from ragkit.kernels import page_votes
from ragkit.kernels.backend import Backend
from ragkit.kernels.page_scores import KeyBounds, Pooling, page_scores, page_scores_torch
from ragkit.kernels.testing import assert_matches, guarded

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _queries(tokens, q_heads, head_dim, dtype, device, rng):
    """Queries as a view over a fused projection."""
    qkv = guarded(torch.randn(tokens, q_heads + 2, head_dim, device=device, generator=rng).to(dtype))
    qkv[:, q_heads:] = math.nan
    return qkv[:, :q_heads]


def _keys(pages, parts, kv_heads, head_dim, dtype, device, rng):
    return guarded(torch.randn(pages, parts, kv_heads, head_dim, device=device, generator=rng).to(dtype))


def _key_bounds(pages, parts, kv_heads, head_dim, dtype, device, rng):
    low, high = (_keys(pages, parts, kv_heads, head_dim, dtype, device, rng) for _ in range(2))
    return KeyBounds(guarded(torch.minimum(low, high)), guarded(torch.maximum(low, high)))


def _compare(queries, summaries, **options):
    options = {"scale": queries.shape[2] ** -0.5, "per_head": True} | options
    got = page_scores(queries, summaries, **options, backend=Backend.TRITON)
    wide = KeyBounds(*(part.float() for part in summaries)) if isinstance(summaries, KeyBounds) else summaries.float()
    expected = page_scores_torch(queries.float(), wide, **options)
    assert got.dtype == torch.float32
    if not expected.isfinite().any():
        assert torch.equal(got, expected)
        return
    # The operands are exact in fp32, so the products are rounded as those of fp32 whatever the type.
    assert_matches(got, expected, reduced=4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pooling", list(Pooling))
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("kind", [_keys, _key_bounds])
def test_matches_the_definition(kind, per_head, pooling, dtype, device, rng):
    queries = _queries(5, 6, 32, dtype, device, rng)
    _compare(queries, kind(37, 2, 2, 32, dtype, device, rng), pooling=pooling, per_head=per_head)


@pytest.mark.parametrize("pooling", list(Pooling))
@pytest.mark.parametrize("pages", [0, 1, 15, 16, 17, 63])
@pytest.mark.parametrize("tokens", [0, 1, 9])
def test_matches_the_definition_for_every_number_of_pages_and_tokens(tokens, pages, pooling, device, rng):
    summaries = _keys(pages, 1, 2, 16, torch.float32, device, rng)
    _compare(_queries(tokens, 4, 16, torch.float32, device, rng), summaries, pooling=pooling)


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize(("q_heads", "kv_heads"), [(9, 3), (2, 2), (20, 1)])
def test_matches_the_definition_for_every_head_size(head_dim, q_heads, kv_heads, device, rng):
    queries = _queries(1, q_heads, head_dim, torch.bfloat16, device, rng)
    summaries = _key_bounds(20, 1, kv_heads, head_dim, torch.bfloat16, device, rng)
    _compare(queries, summaries, pooling=Pooling.VOTE)
    _compare(queries, summaries.lower, pooling=Pooling.MEAN)


@pytest.mark.parametrize("sum_parts", [False, True])
@pytest.mark.parametrize("parts", [1, 3, 4])
def test_parts_are_added_up_or_the_highest_counts(parts, sum_parts, device, rng):
    summaries = _keys(20, parts, 2, 16, torch.float32, device, rng)
    queries = _queries(3, 4, 16, torch.float32, device, rng)
    _compare(queries, summaries, pooling=Pooling.MAX, sum_parts=sum_parts)
    _compare(queries, summaries, pooling=Pooling.VOTE, sum_parts=sum_parts)


@pytest.mark.parametrize("pooling", list(Pooling))
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("bounds", [(2, 30, 35), (0, 0, 0), (16, 32, 40), (0, 99, 99), (20, 10, 40)])
def test_pages_outside_the_bounds_are_not_read(bounds, per_head, pooling, device, rng):
    queries = _queries(2, 4, 16, torch.float32, device, rng)
    summaries = _key_bounds(40, 2, 2, 16, torch.float32, device, rng)
    for part in summaries:
        part[: bounds[0]], part[bounds[1] :] = math.nan, math.nan
    chosen = torch.tensor(bounds, dtype=torch.int32, device=device)
    _compare(queries, summaries, pooling=pooling, per_head=per_head, bounds=chosen)


def test_pages_at_any_stride_are_read_in_place(device, rng):
    layers = torch.randn(20, 3, 2, 2, 16, device=device, generator=rng)
    layers[:, 0], layers[:, 2] = math.nan, math.nan
    _compare(_queries(1, 4, 16, torch.float32, device, rng), layers[:, 1], pooling=Pooling.VOTE)


def _formula(queries, summaries, pooling, per_head, scale):
    """The docstring's formulas, in fp64, of the maximum over parts."""
    scores = []
    for head, query in enumerate(queries.double().unbind(1)):
        parts = [part[:, :, head * summaries[0].shape[2] // queries.shape[1]].double() for part in summaries]
        products = [query[:, None, None, :] * part for part in parts]
        scores.append(torch.stack(products).amax(dim=0).sum(dim=-1).amax(dim=-1) * scale)  # (tokens, pages)
    voters = torch.stack(scores).unflatten(0, (summaries[0].shape[2] if per_head else 1, -1)).flatten(1, 2)
    if pooling is Pooling.VOTE:
        return voters.softmax(dim=-1).sum(dim=1).float()
    return (voters.mean(dim=1) if pooling is Pooling.MEAN else voters.amax(dim=1)).float()


@pytest.mark.parametrize("held", [500, 1 << 24])
@pytest.mark.parametrize("backend", list(Backend))
@pytest.mark.parametrize("pooling", list(Pooling))
@pytest.mark.parametrize("kind", [_keys, _key_bounds])
def test_scores_are_the_formula_however_few_are_held(kind, pooling, backend, held, device, rng, monkeypatch):
    monkeypatch.setattr(module, "_KEPT_SCORES", held)
    queries = _queries(5, 6, 16, torch.float32, device, rng)
    summaries = kind(20, 2, 2, 16, torch.float32, device, rng)
    sides = summaries if isinstance(summaries, KeyBounds) else (summaries,)
    for per_head in (False, True):
        got = page_scores(queries, summaries, pooling=pooling, per_head=per_head, scale=0.3, backend=backend)
        assert_matches(got, _formula(queries, sides, pooling, per_head, 0.3), reduced=4)


@pytest.mark.parametrize("each", [0, 1 << 30], ids=["merged ahead", "merged by each"])
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("bounds", [None, (51, 58, 100), (15, 70, 100)])
def test_votes_of_several_rounds_over_many_tiles_match_the_definition(
    bounds, per_head, each, device, rng, monkeypatch
):  # fmt: skip
    monkeypatch.setattr(module, "_KEPT_SCORES", 2 * 4 * 100)  # of two tokens; the second round has one
    monkeypatch.setattr(page_votes, "_MERGED_BY_EACH", each)
    queries = _queries(3, 4, 16, torch.float32, device, rng)
    summaries = _keys(100, 1, 2, 16, torch.float32, device, rng)
    chosen = None if bounds is None else torch.tensor(bounds, dtype=torch.int32, device=device)
    _compare(queries, summaries, pooling=Pooling.VOTE, per_head=per_head, bounds=chosen)


@pytest.mark.parametrize("backend", list(Backend))
def test_votes_of_a_row_sum_to_its_voters_and_large_scores_do_not_overflow(backend, device, rng):
    queries = _queries(3, 6, 16, torch.float32, device, rng) * 300
    summaries = _keys(50, 1, 2, 16, torch.float32, device, rng)
    votes = page_scores(queries, summaries, pooling=Pooling.VOTE, per_head=True, scale=1.0, backend=backend)
    assert votes.sum(dim=1).tolist() == pytest.approx([9.0, 9.0], rel=1e-5)


@pytest.mark.parametrize("backend", list(Backend))
def test_a_vote_hears_a_quiet_head_that_a_mean_does_not(backend, device):
    queries = torch.tensor([[[8.0, 0.0], [0.0, 1.0]]], device=device).repeat(1, 1, 8)
    pages = torch.zeros(4, 1, 1, 16, device=device)
    pages[:, 0, 0, 0] = torch.tensor([1.0, 1.0, 1.0, 0.9])  # the loud head finds three pages alike
    pages[3, 0, 0, 1] = 3.0  # the quiet one finds one
    options = {"per_head": False, "scale": 1.0, "backend": backend}
    assert int(page_scores(queries, pages, pooling=Pooling.VOTE, **options).argmax()) == 3
    assert (
        int(
            page_scores(
                queries * torch.tensor([[[1.0], [0.1]]], device=device), pages, pooling=Pooling.MEAN, **options
            ).argmax()
        )
        != 3
    )


@pytest.mark.parametrize("pooling", list(Pooling))
def test_two_runs_give_the_same_bits(pooling, device, rng):
    queries = _queries(5, 8, 32, torch.bfloat16, device, rng)
    summaries = _keys(40, 1, 2, 32, torch.bfloat16, device, rng)
    options = {"pooling": pooling, "per_head": False, "scale": 0.2, "backend": Backend.TRITON}
    assert torch.equal(page_scores(queries, summaries, **options), page_scores(queries, summaries, **options))


def test_inputs_that_do_not_fit_are_refused(device, rng):
    queries = _queries(2, 4, 16, torch.float32, device, rng)
    keys = _keys(5, 2, 2, 16, torch.float32, device, rng)
    for changed, message in (
        ({"queries": queries[..., :8]}, r"queries must be \(tokens, heads, 16\)"),
        ({"queries": queries[:, :3]}, "3 query heads cannot score 2 parts of 2 key heads"),
        ({"queries": queries.transpose(0, 1).contiguous().transpose(0, 1)}, "of queries must be contiguous"),
        ({"queries": queries.half()}, "must share a type, got torch.float16 and torch.float32"),
        ({"summaries": keys[0]}, r"summaries must be \(pages, parts, kv_heads, head_dim\)"),
        ({"summaries": keys.transpose(1, 2)}, "a page contiguous"),
        ({"summaries": KeyBounds(keys, keys[:4])}, "both bounds must be"),
        ({"scale": 0.0}, "scale must be above zero"),
        ({"bounds": torch.zeros(3, device=device)}, r"bounds must be \(3,\) int32"),
    ):
        options = {"queries": queries, "summaries": keys, "pooling": Pooling.MAX, "per_head": True, "scale": 1.0}
        with pytest.raises(KernelInputError, match=message):
            page_scores(**(options | changed))
