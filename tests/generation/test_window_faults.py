"""Faults while a document's windows come from the device: those that were kept are written, none is mixed up."""

from __future__ import annotations

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from page_doubles import At, RecordsInMemory, interrupted

from ragkit.errors import KVCacheError
from ragkit.generation.graph_recorder import GraphRecorder
from ragkit.generation.paged_prefill import PagedPrefill
from ragkit.generation.rotary_cache import RotaryCache
from ragkit.kvcache import arriving_windows, page_records
from ragkit.kvcache.encoded_windows import ComingWindow, EncodedWindows
from ragkit.kvcache.page_summaries import PageSummaries

from .conftest import decoder_of, hf_model
from .test_paged_faults import FullDisk
from .test_paged_prefill import Replays, logits_over, pages_of
from .test_window_graph import OPTIONS, TOKENS, WINDOWS, Launches, assert_alike


@pytest.fixture
def llama():
    return decoder_of(hf_model("llama", num_hidden_layers=2))


def reader(decoder, make_recorder=Replays):
    return PagedPrefill(decoder, RotaryCache(decoder), OPTIONS, make_recorder=make_recorder)


def document(decoder, tier=None, tokens=TOKENS):
    return pages_of(decoder, tokens, OPTIONS, codec="int8", resident=True, tier=tier)


def launched(decoder):
    pages = document(decoder)
    assert reader(decoder, None).read(pages)
    return pages


@pytest.mark.parametrize("step", ["of", "wait"])
@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt, RuntimeError])
def test_a_window_that_could_not_be_brought_is_read_again(llama, monkeypatch, step, error):
    tier, pages = RecordsInMemory(), None

    def fails(*_):
        raise error

    def from_now_on():
        patch.setattr(ComingWindow, step, fails)

    pages = document(llama, tier)
    with monkeypatch.context() as patch, pytest.raises(error):
        reader(llama).read(pages, At(12, from_now_on))
    assert pages.num_windows in (11, 12)
    pages.flush()
    assert tier.saved >= pages.num_windows  # none counts that nobody keeps
    assert reader(llama).read(pages)
    assert tier.holds([ref.key for ref in pages.refs]) == {ref.key for ref in pages.refs}
    assert_alike(llama, OPTIONS, launched(llama), pages)


@pytest.mark.parametrize("resident", [False, True])
def test_reading_goes_on_behind_a_window_that_was_half_added_when_it_was_interrupted(llama, monkeypatch, resident):
    def read_with(interrupted):
        pages = pages_of(llama, TOKENS[:328], OPTIONS, codec="int8", resident=resident)
        prefill, append, layers = reader(llama, None), PageSummaries.append, []

        def interrupts(summaries, layer, rows):
            append(summaries, layer, rows)
            layers.append(layer)
            if len(layers) == 9 and interrupted:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(PageSummaries, "append", interrupts)
            if interrupted:
                with pytest.raises(KeyboardInterrupt):
                    prefill.read(pages)
                assert layers[-1] == 0  # of two layers
            assert prefill.read(pages)
        return pages, logits_over(llama, pages, prefill)

    (whole, expected), (pages, got) = read_with(interrupted=False), read_with(interrupted=True)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    for layer in range(2):
        kept = (one.summaries(OPTIONS.selector).of(layer) for one in (pages, whole))
        assert all(map(torch.equal, *kept))
        assert len(pages.cache._block_of[layer]) + len(pages.cache._free[layer]) == pages.cache.num_pages


def test_reading_goes_on_behind_a_replayed_window_that_summaries_alone_count(llama, monkeypatch):
    tier = RecordsInMemory()
    pages, counted = document(llama, tier), []
    count = PageSummaries.count

    def interrupts(summaries, pages):
        count(summaries, pages)
        counted.append(pages)
        if len(counted) == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(PageSummaries, "count", interrupts)
        with pytest.raises(KeyboardInterrupt):
            reader(llama).read(pages)
    assert reader(llama).read(pages)
    assert_alike(llama, OPTIONS, launched(llama), pages)


def test_windows_before_one_that_cannot_be_stored_are_written_at_once(llama):
    tier = RecordsInMemory()
    pages = document(llama, tier, TOKENS[: 20 * 32])
    # The last window is looked at when reading ends.
    with pytest.raises(KVCacheError, match="not finite"):
        reader(llama).read(pages, At(19, lambda: llama.weights.embedding.fill_(float("nan"))))
    assert (tier.saved, pages.num_windows) == (19, 19)


def test_windows_are_written_although_the_device_fails_at_the_end(llama):
    tier, pages = RecordsInMemory(), None

    class Broken(Replays):
        def wait(self):
            if "end" in self.log and self.log[-1] == "end" and pages.num_windows == 12:
                raise RuntimeError("the device is gone")

    pages = document(llama, tier)
    with pytest.raises(RuntimeError, match="the device is gone"):
        reader(llama, Broken).read(pages, At(12, interrupted))
    assert tier.saved == 12


def test_a_window_is_kept_where_what_selectors_keep_of_its_section_cannot_be(llama, monkeypatch):
    monkeypatch.setattr("ragkit.kvcache.page_summary_records.SECTION_WINDOWS", 10)

    class NoSummaries(RecordsInMemory):
        is_full = True

        def save(self, chunks):
            if self.is_full and any(not chunk.ref.token_ids for chunk in chunks):
                raise KVCacheError("the disk is full")
            return super().save(chunks)

    for make in (None, Replays):
        tier = NoSummaries()
        pages = document(llama, tier)
        with monkeypatch.context() as patch:
            prefill = reader(llama, make)

            def writes_at_once(patch=patch):
                patch.setattr(page_records, "_SAVED_BYTES", 1)

            with pytest.raises(KVCacheError, match="the disk is full"):
                prefill.read(pages, At(2, writes_at_once))
        with pytest.raises(KVCacheError, match="the disk is full"):
            pages.flush()
        assert pages.num_windows >= 10
        assert tier.holds([ref.key for ref in pages.refs[: pages.num_windows]]) == {
            ref.key for ref in pages.refs[: pages.num_windows]
        }


def test_a_window_is_mended_although_the_batch_before_it_was_not_written(llama, monkeypatch, caplog):
    tier = FullDisk()
    first = document(llama, tier, TOKENS[:320])
    assert reader(llama).read(first)
    again = document(llama, tier, TOKENS[:320])
    rows = reader(llama)._rows(again, 3)
    monkeypatch.setattr(EncodedWindows, "flush", lambda _: None)
    tier.is_full = True
    monkeypatch.setattr(page_records, "_SAVED_BYTES", 1)
    again.replace(2, reader(llama)._rows(again, 2))  # fails while the next is computed
    again.replace(3, rows)
    assert again.repaired == 2
    assert "stays in memory: the disk is full" in caplog.text


def test_an_interrupt_before_anything_was_added_leaves_what_is_stored_there(llama, monkeypatch):
    tier = RecordsInMemory()
    assert reader(llama).read(document(llama, tier, TOKENS[:320]))
    again = document(llama, tier, TOKENS[:320])

    with monkeypatch.context() as patch:
        patch.setattr(EncodedWindows, "settle", interrupted)
        with pytest.raises(KeyboardInterrupt):
            again.flush()
    assert again.is_complete


def test_the_memory_of_a_closed_document_is_free_at_once(llama):
    pages = document(llama)
    prefill = reader(llama)
    assert prefill.read(pages)
    assert logits_over(llama, pages, prefill).isfinite().all()
    gc.collect()
    gc.disable()
    try:
        room = weakref.ref(pages.resident)
        pages.close()
        del pages
        assert room() is None
    finally:
        gc.enable()


def test_a_window_behind_a_gap_that_is_damaged_before_it_is_placed_is_mended(llama, monkeypatch):
    tier, recorder = RecordsInMemory(), Replays()
    first = document(llama, tier)
    assert reader(llama).read(first)
    for gone in (12, 25):
        del tier.records[first.refs[gone].key]
    again = document(llama, tier)
    again.memory.budget_bytes = 1  # adopted windows stay on disk
    adopt = again.adopt

    def adopt_and_damage():
        adopted = adopt()
        if adopted:
            tier.records[again.refs[20].key] = b"cut off"
        return adopted

    monkeypatch.setattr(again, "adopt", adopt_and_damage)
    assert reader(llama, lambda: recorder).read(again)
    assert again.repaired == 1
    assert "record" in recorder.log
    again.bring_windows(WINDOWS)
    assert_alike(llama, OPTIONS, first, again)


def test_memory_that_windows_came_through_is_free_before_a_damaged_one_is_computed_again(llama, monkeypatch):
    tier, prefill, batches, held = RecordsInMemory(), reader(llama), [], []
    first = document(llama, tier)
    assert prefill.read(first)
    tier.records[first.refs[20].key] = b"cut off"

    class Noted(arriving_windows._Batch):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            batches.append(weakref.ref(self))

    def repair(window):
        held.append(sum(batch() is not None for batch in batches))
        prefill._repair(again, window)

    monkeypatch.setattr(arriving_windows, "_Batch", Noted)
    again = document(llama, tier)
    again.repair = repair
    again.bring_windows(WINDOWS)
    assert (again.repaired, held) == (1, [0])
    assert_alike(llama, OPTIONS, first, again)


def on_gpu():
    return decoder_of(hf_model("llama", num_hidden_layers=2, head_dim=32, hidden_size=192).cuda())


def keys_of(pages):
    return [pages.resident.keys(layer, range(pages.num_pages)).clone() for layer in range(pages.num_layers)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_windows_that_cannot_be_recorded_are_launched_and_have_the_same_numbers(caplog):
    decoder = on_gpu()

    class Asks(GraphRecorder):
        def record(self, work):
            def asks():
                work()
                if torch.cuda.is_current_stream_capturing():
                    torch.cuda.synchronize()  # which a recording must not do

            return super().record(asks)

    expected, pages, tier = document(decoder), None, RecordsInMemory()
    assert reader(decoder, Launches).read(expected)
    for _ in range(2):
        pages = document(decoder, tier := RecordsInMemory())
        assert reader(decoder, lambda: Asks(decoder.device)).read(pages)
        assert "could not be recorded" in caplog.text
        assert all(map(torch.equal, keys_of(pages), keys_of(expected)))
        assert tier.saved == WINDOWS


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_documents_that_threads_read_at_once_have_the_numbers_of_those_read_alone(caplog):
    decoder = on_gpu()
    rotary = RotaryCache(decoder)
    rotary.table(1, 1)
    texts = [TOKENS[start:] + TOKENS[:start] for start in range(0, 400, 100)]

    def keys_with(tokens, tier=None):
        with torch.cuda.stream(torch.cuda.Stream(decoder.device)):
            pages = document(decoder, tier, tokens)
            prefill = PagedPrefill(decoder, rotary, OPTIONS)
            assert prefill.read(pages)
            logits = logits_over(decoder, pages, prefill)
            found = *keys_of(pages), logits
            torch.cuda.current_stream().synchronize()
            pages.close()
            return found

    alone = [keys_with(tokens) for tokens in texts]
    for make in (lambda: None, RecordsInMemory) * 6:  # more streams than torch has
        with ThreadPoolExecutor(len(texts)) as threads:
            at_once = list(threads.map(lambda tokens, make=make: keys_with(tokens, make()), texts))
        for mine, other in zip(at_once, alone, strict=True):
            assert all(map(torch.equal, mine[:-1], other[:-1]))
            torch.testing.assert_close(mine[-1], other[-1], rtol=0, atol=1e-4)
    assert "could not be recorded" not in caplog.text
