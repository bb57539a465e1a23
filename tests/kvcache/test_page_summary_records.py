import pytest
import torch
from page_doubles import RecordsInMemory

from ragkit.kvcache.chunk_kv import ChunkRef
from ragkit.kvcache.kv_key import KVKey
from ragkit.kvcache.page_selector import PageRows
from ragkit.kvcache.page_selectors import make_page_selector
from ragkit.kvcache.page_summaries import PageSummaries
from ragkit.kvcache.page_summary_records import PageSummaryRecords

REFS = [ChunkRef(KVKey(f"{window:064x}"), (window,), "owner") for window in range(2)]
PAGES = 16  # of both windows


def summaries_of(name):
    made = PageSummaries(make_page_selector(name), 2, PAGES)
    generator = torch.Generator().manual_seed(1)
    for layer in range(2):
        made.append(layer, PageRows(torch.randn((PAGES, 16, 2, 32), generator=generator)))
    return made


@pytest.mark.parametrize("name", ["mean-key", "min-max", "low-rank", "soft-vote", "centroids", "centroids-2"])
def test_a_section_comes_back_bit_by_bit(name):
    made, records = summaries_of(name), PageSummaryRecords(RecordsInMemory(), REFS, 2)
    records.write(made, range(2), 0, PAGES)
    records.flush()
    stored = records.parsed(records.load(made.selector, range(2), page_locked=False))
    for layer, one in enumerate(stored):
        for mine, other in ((one.fitted, made.fitted(layer)), (one.parts, made.between(layer, 0, PAGES))):
            assert [part.dtype for part in mine] == [part.dtype for part in other]
            assert all(map(torch.equal, mine, other))
    assert records.load(make_page_selector("representative"), range(2), page_locked=False) is None


@pytest.mark.parametrize(
    "content",
    [
        b"short", bytes(8), (1 << 40).to_bytes(8, "little"), (2).to_bytes(8, "little") + b"[]",
        (4).to_bytes(8, "little") + b"null", (3).to_bytes(8, "little") + b"{x}",
        (13).to_bytes(8, "little") + b'{"0": {"a":1}}'[:13], (10).to_bytes(8, "little") + b'{"0": 123}',
    ],
)  # fmt: skip
def test_a_section_that_makes_no_sense_is_none(monkeypatch, content):
    made, records = summaries_of("min-max"), PageSummaryRecords(RecordsInMemory(), REFS, 2)
    monkeypatch.setattr("ragkit.kvcache.page_summary_records.save", lambda tensors: content)
    records.write(made, range(2), 0, PAGES)
    records.flush()
    assert records.parsed(records.load(made.selector, range(2), page_locked=False)) is None
