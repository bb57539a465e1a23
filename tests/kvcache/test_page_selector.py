import pytest
import torch

from ragkit.config import PageSelectorName, PageVote
from ragkit.errors import KVCacheError
from ragkit.kvcache.page_selector import PageRows, best_pages, pool_votes
from ragkit.kvcache.page_selectors import make_page_selector
from ragkit.kvcache.page_summaries import PageSummaries

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


@pytest.mark.parametrize("name", PageSelectorName)
def test_scores_have_a_logit_for_each_query_head_and_page(name):
    selector = make_page_selector(name)
    logits = selector.score(_queries(3), _summary(selector, _rows(11)), 2, 9, 0.25)
    assert logits.shape == (3, Q_HEADS, 7)
    assert logits.dtype == torch.float32
    assert bool(logits.isfinite().all())


@pytest.mark.parametrize("name", PageSelectorName)
def test_the_score_of_a_page_does_not_depend_on_which_others_are_asked_for(name):
    selector = make_page_selector(name)
    summary = _summary(selector, _rows(11))
    whole = selector.score(_queries(2), summary, 0, 11, 0.25)
    torch.testing.assert_close(selector.score(_queries(2), summary, 3, 6, 0.25), whole[..., 3:6])


def test_the_mean_key_scores_a_page_by_the_products_of_each_query_head_with_its_key_heads_mean():
    selector = make_page_selector("mean-key")
    keys, queries = _keys(3), _queries(1)
    logits = selector.score(queries, _summary(selector, PageRows(keys)), 0, 3, 0.5)
    expected = 0.5 * queries[0, 4] @ keys[2, :, 1].mean(0)  # query heads 3 to 5 belong to key head 1
    assert logits[0, 4, 2].item() == pytest.approx(expected.item(), abs=1e-5)


def test_in_a_soft_vote_a_loud_head_counts_as_much_as_a_quiet_one():
    logits = torch.tensor([[[9.0, 1.0, 0.0], [0.0, 2.0, 0.0], [0.0, 2.0, 0.0]]])
    soft, added = (pool_votes(logits, vote, 1)[0] for vote in (PageVote.SOFTMAX, PageVote.SUM))
    assert (soft.argmax().item(), added.argmax().item()) == (1, 0)
    assert soft.sum().item() == pytest.approx(3.0)
    assert pool_votes(logits, PageVote.MAX, 1)[0].tolist() == [9.0, 2.0, 0.0]


def test_key_heads_that_choose_for_themselves_hear_their_own_query_heads_only():
    logits = torch.zeros(2, 4, 5)
    logits[:, :2, 3] = 4.0
    logits[:, 2:, 1] = 4.0
    assert pool_votes(logits, PageVote.SOFTMAX, 2).argmax(-1).tolist() == [3, 1]


def test_the_best_pages_come_in_the_order_of_the_document():
    scores = torch.tensor([[0.1, 0.9, 0.2, 0.8], [0.5, 0.1, 0.4, 0.3]])
    assert best_pages(scores, 10, 2).tolist() == [[11, 13], [10, 12]]


def test_an_unknown_selector_is_refused_by_name():
    with pytest.raises(KVCacheError, match="no page selector 'best'; there are everything, window, mean-key"):
        make_page_selector("best")
