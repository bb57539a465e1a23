import pytest
import torch
from kv_samples import key_of
from page_doubles import RecordsInMemory
from safetensors.torch import save

from ragkit.kvcache.chunk_kv import ChunkRef
from ragkit.kvcache.document_summaries import DocumentSummaries
from ragkit.kvcache.layout import KVLayout, LayerSpec
from ragkit.kvcache.page_grid import PageGrid
from ragkit.kvcache.page_selector import PageRows
from ragkit.kvcache.page_selector_centroids import Centroids
from ragkit.kvcache.page_selectors import make_page_selector

WINDOWS, PAGE, PAGES = 70, 16, 140  # two sections: of 64 windows and of 6
REFS = tuple(ChunkRef(key_of(number), (number,) * 2 * PAGE, "chunk") for number in range(WINDOWS))
GRID = PageGrid(PAGES * PAGE, 2 * PAGE, PAGE)
LAYOUT = KVLayout((LayerSpec(2, 32, None),) * 2, torch.float32)
KEYS = torch.randn(2, PAGES, PAGE, 2, 32, generator=torch.Generator().manual_seed(0))


class Reading:
    """Gives keys of windows, and notes which."""

    def __init__(self):
        self.windows = []

    def __call__(self, layer, windows):
        self.windows.append((layer, windows))
        return PageRows(KEYS[layer, 2 * windows.start : 2 * windows.stop])


def summaries_of(tier, selector, *, on_device):
    reading, summaries = Reading(), DocumentSummaries(tier, REFS, GRID, LAYOUT, torch.device("cpu"))
    made = summaries.of(selector, WINDOWS, reading, on_device=on_device)
    summaries.close()
    return made, reading.windows


@pytest.mark.parametrize(("name", "loads"), [("low-rank", False), ("min-max", False), ("centroids", True)])
def test_what_the_device_can_make_sooner_is_not_loaded_nor_stored_again(name, loads):
    tier, selector = RecordsInMemory(), make_page_selector(name)
    first, _ = summaries_of(tier, selector, on_device=False)
    stored, tier.opened = dict(tier.records), 0
    assert len(stored) == 2
    again, read = summaries_of(tier, selector, on_device=True)
    assert (tier.opened, bool(read)) == ((2, False) if loads else (0, True))
    assert tier.records == stored
    assert all(tier.records[key] is content for key, content in stored.items())
    for layer in range(2):
        for mine, other in zip(again.between(layer, 0, PAGES), first.between(layer, 0, PAGES), strict=True):
            assert torch.equal(mine, other)


def test_what_the_device_makes_is_stored_where_it_is_not_yet():
    tier, selector = RecordsInMemory(), make_page_selector("low-rank")
    summaries_of(tier, selector, on_device=True)
    assert len(tier.records) == 2
    lost = next(iter(tier.records))
    content = tier.records.pop(lost)
    _, read = summaries_of(tier, selector, on_device=True)
    assert tier.records[lost] == content
    assert {windows for _, windows in read} == {range(64), range(64, 70)}


def test_windows_that_the_device_does_not_hold_are_asked_for_one_by_one():
    _, read = summaries_of(RecordsInMemory(), make_page_selector("min-max"), on_device=False)
    assert {len(windows) for _, windows in read} == {1}
    assert len(read) == 2 * WINDOWS


def one_more(tensors):
    return {**tensors, str(sum(name.isdigit() for name in tensors)): torch.zeros(3)}


def one_less(tensors):
    return {name: part for name, part in tensors.items() if name != "0"} | {"0": torch.tensor(1.0)}


def short(tensors):
    return {**tensors, "0": tensors["0"][:-1]}


def of_another_type(tensors):
    return {**tensors, "0": tensors["0"].to(torch.int64)}


def of_other_heads(tensors):
    return {**tensors, "0": tensors["0"].flatten(1)}


def of_nothing(tensors):
    return {}


@pytest.mark.parametrize("name", ["mean-key", "low-rank", "centroids-2"])
@pytest.mark.parametrize("broken", [one_more, one_less, short, of_another_type, of_other_heads, of_nothing])
def test_what_is_stored_in_another_shape_is_made_again(monkeypatch, name, broken):
    tier, selector = RecordsInMemory(), make_page_selector(name)
    expected, _ = summaries_of(RecordsInMemory(), selector, on_device=False)
    with monkeypatch.context() as patched:
        patched.setattr("ragkit.kvcache.page_summary_records.save", lambda tensors: save(broken(tensors)))
        summaries_of(tier, selector, on_device=False)
    made, read = summaries_of(tier, selector, on_device=False)
    assert len(read) == 2 * WINDOWS
    for layer in range(2):
        for mine, other in zip(made.of(layer), expected.of(layer), strict=True):
            assert torch.equal(mine, other)
    assert not summaries_of(tier, selector, on_device=False)[1], "what was made again was not stored"


def test_groups_that_a_section_would_cut_are_made_again_and_not_stored():
    tier, selector = RecordsInMemory(), Centroids(group_pages=5)
    assert 128 % selector.group_pages
    expected, _ = summaries_of(tier, selector, on_device=False)
    made, read = summaries_of(tier, selector, on_device=False)
    assert {windows.start for _, windows in read} >= set(range(64))
    for layer in range(2):
        for mine, other in zip(made.of(layer), expected.of(layer), strict=True):
            assert torch.equal(mine, other)
