"""Damage and full disks while a document in pages is read and asked about."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from page_doubles import RecordsInMemory

from ragkit.errors import KVCacheError
from ragkit.generation.page_options import PageOptions
from ragkit.generation.paged_prefill import PagedPrefill
from ragkit.generation.rotary_cache import RotaryCache
from ragkit.kvcache import page_records
from ragkit.kvcache.page_selectors import make_page_selector

from .conftest import decoder_of, hf_model
from .test_paged_prefill import SMALL, TOKENS, logits_over, pages_of, read


class FullDisk(RecordsInMemory):
    """A tier that takes nothing while it is full."""

    is_full = False

    def save(self, chunks):
        if self.is_full:
            raise KVCacheError("the disk is full")
        return super().save(chunks)


@pytest.fixture
def llama():
    return decoder_of(hf_model("llama"))


def damage(tier, ref):
    record = bytearray(tier.records[ref.key])
    record[-5000] ^= 1
    tier.records[ref.key] = bytes(record)


@pytest.mark.parametrize("selector", ["mean-key", "low-rank", "soft-vote", "centroids-2"])
def test_a_damaged_window_is_mended_while_what_a_selector_keeps_is_made_again(llama, selector):
    tier = RecordsInMemory()
    options = replace(SMALL, selector=make_page_selector(selector))
    first, prefill = read(llama, TOKENS[:200], options, tier=tier)
    expected = logits_over(llama, first, prefill)
    windows = {ref.key: tier.records[ref.key] for ref in first.refs}
    tier.records = windows  # what the selector keeps is gone
    damage(tier, first.refs[9])
    again = pages_of(llama, TOKENS[:200], options, tier=tier)
    torch.testing.assert_close(logits_over(llama, again, prefill), expected, rtol=0, atol=1e-5)
    assert again.repaired == 1


def test_a_damaged_window_is_mended_in_memory_where_the_disk_is_full(llama, caplog):
    tier = FullDisk()
    options = replace(SMALL, budget_pages=30)  # every page is asked for
    first, prefill = read(llama, TOKENS[:200], options, tier=tier)
    expected = logits_over(llama, first, prefill)
    damage(tier, first.refs[7])
    tier.is_full = True
    again = pages_of(llama, TOKENS[:200], options, tier=tier, memory=1)
    torch.testing.assert_close(logits_over(llama, again, prefill), expected, rtol=0, atol=1e-5)
    assert again.repaired == 1
    assert "a window that was computed again stays in memory: the disk is full" in caplog.text


def test_windows_that_a_full_disk_did_not_take_are_written_when_there_is_room(llama, monkeypatch):
    monkeypatch.setattr(page_records, "_SAVED_BYTES", 1)
    tier = FullDisk()
    pages = pages_of(llama, TOKENS[:200], SMALL, tier=tier)
    prefill = PagedPrefill(llama, RotaryCache(llama), SMALL)
    tier.is_full = True
    with pytest.raises(KVCacheError, match="the disk is full"):
        prefill.read(pages)
    assert not tier.records
    tier.is_full = False
    assert prefill.read(pages)
    assert tier.holds([ref.key for ref in pages.refs]) == {ref.key for ref in pages.refs}


def test_key_heads_that_choose_for_themselves_need_room_for_the_pages_of_each():
    options = PageOptions(make_page_selector("min-max"), sink_pages=2, local_pages=16, budget_pages=10, found_times=3)
    assert options.pages_needed(1000, kv_heads=8) == 18 + 30
    assert replace(options, per_key_head=True).pages_needed(1000, kv_heads=8) == 18 + 240
    assert replace(options, per_key_head=True).pages_needed(100, kv_heads=8) == 100
