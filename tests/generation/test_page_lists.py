from dataclasses import replace

import pytest
import torch

from ragkit.config import PagePositions
from ragkit.generation.page_lists import PageLayout
from ragkit.generation.page_options import PageOptions
from ragkit.kvcache.page_selectors import make_page_selector

OPTIONS = PageOptions(
    make_page_selector("mean-key"), page_size=8, sink_pages=1, local_pages=2, budget_pages=3, found_times=2
)


def test_pages_are_sinks_candidates_and_the_local_window():
    layout = PageLayout.of(163, OPTIONS)  # 20 pages and 3 tokens
    assert (layout.first, layout.stop, layout.end, layout.num_candidates) == (1, 19, 21, 18)
    assert (layout.num_found, layout.num_chosen) == (6, 3)
    assert layout.num_rows == layout.start == 6 * 8 - 5


@pytest.mark.parametrize(("tokens", "pages"), [(0, (0, 0, 0)), (5, (1, 1, 1)), (24, (1, 1, 3)), (25, (1, 2, 4))])
def test_short_documents_have_no_candidates_before_they_have_all_the_others(tokens, pages):
    layout = PageLayout.of(tokens, OPTIONS)
    assert (layout.first, layout.stop, layout.end) == pages
    assert layout.num_rows == tokens


@pytest.mark.parametrize(("selector", "chosen"), [("everything", 18), ("window", 0), ("min-max", 3)])
def test_what_a_selector_takes_says_how_many_are_chosen(selector, chosen):
    assert PageLayout.of(163, replace(OPTIONS, selector=make_page_selector(selector))).num_chosen == chosen


def test_reindexed_pages_stand_behind_each_other_and_before_the_own_rows():
    layout = PageLayout.of(163, OPTIONS)
    listed = layout.listed(torch.tensor([[4, 9, 12]]))
    assert listed.tolist() == [[0, 4, 9, 12, 19, 20]]
    rows = layout.row_positions(listed, OPTIONS)[0][: layout.num_rows]
    assert rows.tolist() == list(range(43))
    assert layout.start == 43


def test_clamped_pages_stand_at_one_place_and_the_local_window_ends_before_the_own_rows():
    options = replace(OPTIONS, positions=PagePositions.CLAMPED)
    layout = PageLayout.of(163, options)
    rows = layout.row_positions(layout.listed(torch.tensor([[4, 9, 12]])), options)[0][: layout.num_rows].tolist()
    assert rows[:32] == [0] * 32
    assert rows[32:] == list(range(5, 16))  # 11 rows of the local window
    assert layout.start == 16


def test_true_positions_are_those_in_the_document_for_each_key_head():
    options = replace(OPTIONS, positions=PagePositions.TRUE)
    layout = PageLayout.of(163, options)
    rows = layout.row_positions(layout.listed(torch.tensor([[4, 9, 12], [2, 3, 18]])), options)
    assert rows[0, 8:16].tolist() == list(range(32, 40))
    assert rows[1, 24:35].tolist() == [*range(144, 152), 152, 153, 154]
    assert layout.start == 163
