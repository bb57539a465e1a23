"""Windows of a long document that are recorded once and replayed: the same pages as when each is launched."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from page_doubles import At, RecordsInMemory, interrupted

from ragkit.config import PagePositions, PageVote
from ragkit.errors import KVCacheError
from ragkit.generation import window_graph
from ragkit.generation.page_options import PageOptions
from ragkit.generation.paged_prefill import PagedPrefill
from ragkit.generation.rotary_cache import RotaryCache
from ragkit.kernels.backend import Backend
from ragkit.kernels.launched import LaunchedKernel
from ragkit.kvcache import page_records
from ragkit.kvcache.page_selector import PageRows
from ragkit.kvcache.page_selectors import make_page_selector
from ragkit.kvcache.window_writer import WindowWriter

from .conftest import decoder_of, hf_model
from .test_page_steps import Watched
from .test_paged_faults import FullDisk
from .test_paged_prefill import Replays, logits_over, pages_of

TOKENS = torch.randint(3, 300, (1000,), generator=torch.Generator().manual_seed(5)).tolist()
OPTIONS = PageOptions(
    make_page_selector("min-max"), page_size=16, sink_pages=1, local_pages=2, budget_pages=2, found_times=2,
    window_tokens=32,
)  # fmt: skip
WINDOWS = 32  # of TOKENS, the last of 8 tokens
LAUNCHED = 4  # windows before the first that finds fewer pages than there are, which is recorded


@pytest.fixture(scope="module")
def llama():
    return decoder_of(hf_model("llama", num_hidden_layers=2))


def reader(decoder, options, recorder):
    return PagedPrefill(decoder, RotaryCache(decoder), options, make_recorder=None if recorder is None else recorder)


def read_both(decoder, options, codec="int8", tiers=(None, None)):
    """Return a document whose windows were launched, and one whose windows were replayed, with their recorder."""
    recorder, documents = Replays(), []
    for tier, make in zip(tiers, (None, lambda: recorder), strict=True):
        pages = pages_of(decoder, TOKENS, options, codec=codec, resident=True, tier=tier)
        assert reader(decoder, options, make).read(pages)
        documents.append(pages)
    return *documents, recorder


def assert_alike(decoder, options, launched, replayed):
    everything = range(launched.num_pages)
    for layer in range(launched.num_layers):
        # A number on the edge of two codes takes the other one where a sum was rounded otherwise.
        torch.testing.assert_close(
            replayed.resident.keys(layer, everything), launched.resident.keys(layer, everything), rtol=0, atol=0.02
        )
        kept = [pages.summaries(options.selector).of(layer) for pages in (replayed, launched)]
        for mine, other in zip(*kept, strict=True):
            torch.testing.assert_close(mine, other, rtol=0, atol=0.03)
    prefill = reader(decoder, options, None)
    mine, other = (logits_over(decoder, pages, prefill) for pages in (replayed, launched))
    torch.testing.assert_close(mine, other, rtol=0, atol=2e-3)


@pytest.mark.parametrize(
    "changes",
    [
        {}, {"positions": PagePositions.CLAMPED}, {"per_key_head": True}, {"selector": make_page_selector("mean-key")},
        {"found_times": 1}, {"vote": PageVote.MAX}, {"vote": PageVote.SUM}, {"layer_interval": 2},
    ],
    ids=str,
)  # fmt: skip
def test_replayed_windows_have_the_pages_of_launched_ones(llama, changes):
    options = replace(OPTIONS, **changes)
    launched, replayed, recorder = read_both(llama, options)
    assert "replay" in recorder.log
    assert_alike(llama, options, launched, replayed)


@pytest.mark.parametrize("codec", ["int8", "int4"])
def test_replayed_windows_are_stored_as_launched_ones_are(llama, codec):
    tiers = RecordsInMemory(), RecordsInMemory()
    launched, replayed, _ = read_both(llama, OPTIONS, codec, tiers)
    first, second = (tier.records for tier in tiers)
    assert first.keys() == second.keys()
    assert tiers[1].saved == WINDOWS
    assert_alike(llama, OPTIONS, launched, replayed)
    again = pages_of(llama, TOKENS, OPTIONS, codec=codec, tier=tiers[1], resident=True)
    assert again.is_complete
    again.bring_windows(WINDOWS)
    everything = range(again.num_pages)
    for layer in range(again.num_layers):
        assert torch.equal(again.resident.keys(layer, everything), replayed.resident.keys(layer, everything))
    assert again.use().bytes_by_tier["disk"] > 0


@pytest.mark.parametrize("codec", ["int8", "int4"])
@pytest.mark.parametrize("selector", ["min-max", "mean-key"])
def test_what_is_kept_of_replayed_windows_is_what_their_pages_give(llama, selector, codec):
    options = replace(OPTIONS, selector=make_page_selector(selector))
    _, replayed, _ = read_both(llama, options, codec)
    for layer in range(replayed.num_layers):
        kept = replayed.summaries(options.selector).of(layer)
        keys = replayed.resident.keys(layer, range(replayed.num_pages))
        for mine, expected in zip(kept, options.selector.summarise(PageRows(keys)), strict=True):
            assert torch.equal(mine, expected)


def test_a_layer_of_a_window_is_written_by_three_launches(llama, be_a_gpu, monkeypatch):
    pages = pages_of(llama, TOKENS[: 4 * 32], OPTIONS, codec="int8", resident=True)
    assert reader(llama, OPTIONS, None).read(pages)
    writer, names = WindowWriter(pages, pages.summaries(OPTIONS.selector)), []
    writer.begin()
    be_a_gpu()
    monkeypatch.setattr("ragkit.kernels.quantize_kv.resolve_backend", lambda *_: Backend.TRITON)
    monkeypatch.setattr(LaunchedKernel, "_launch", lambda self, *_, **__: names.append(self.source.fn.__name__))
    rows = torch.randn(2, 32, 2, 8)
    with Watched() as watched:
        writer.write(1, rows[0], rows[1])
    assert names == ["_quantize_kv_kernel", "_quantize_kv_kernel", "_page_bounds_kernel"]
    assert not watched.launched


def test_a_window_is_recorded_again_each_time_the_pages_have_doubled(llama, monkeypatch):
    monkeypatch.setattr(window_graph, "_LEAST_PAGES", 16)
    _, _, recorder = read_both(llama, OPTIONS)
    # 8 pages stand before the first; 16, 32 and all 63 are looked at.
    done = [entry for entry in recorder.log if entry in ("record", "replay")]
    at = [index + LAUNCHED for index, entry in enumerate(done) if entry == "record"]
    assert at == [4, 9, 17]
    assert len(done) == WINDOWS - LAUNCHED - 1  # the last one is not whole


def test_a_replayed_window_asks_the_device_nothing(llama, be_a_gpu):
    be_a_gpu()
    pages = pages_of(llama, TOKENS[: 14 * 32], OPTIONS, codec="int8", resident=True)
    watched = []

    class Watches(Replays):
        def record(self, work):
            replay = super().record(work)

            def watch():
                with Watched() as seen:
                    replay()
                watched.append(seen.launched)

            return watch

    assert reader(llama, OPTIONS, Watches).read(pages)
    assert len(watched) == 14 - LAUNCHED - 1  # the first is recorded
    assert all(one == watched[0] for one in watched)  # what a graph replays is the same for every window


@pytest.mark.parametrize(
    "changes",
    [
        {"selector": make_page_selector("low-rank")}, {"selector": make_page_selector("window")},
        {"selector": make_page_selector("everything")}, {"budget_pages": 40},
        {"positions": PagePositions.TRUE, "budget_pages": 4},
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_replayed_is_launched(llama, changes):
    options, recorder = replace(OPTIONS, **changes), Replays()
    pages = pages_of(llama, TOKENS[:200], options, codec="int8", resident=True)
    assert reader(llama, options, lambda: recorder).read(pages)
    assert recorder.log == []


def test_raw_pages_and_short_documents_are_launched(llama):
    recorder = Replays()
    for tokens, codec in ((TOKENS, "fp32"), (TOKENS[: 11 * 32], "int8")):
        pages = pages_of(llama, tokens, OPTIONS, codec=codec, resident=True)
        assert reader(llama, OPTIONS, lambda: recorder).read(pages)
    assert recorder.log == []


def test_reading_that_fails_behind_a_replayed_window_keeps_it(llama):
    tier, recorder = RecordsInMemory(), Replays()
    pages = pages_of(llama, TOKENS, OPTIONS, codec="int8", resident=True, tier=tier)
    with pytest.raises(KeyboardInterrupt):
        reader(llama, OPTIONS, lambda: recorder).read(pages, At(10, interrupted))
    assert (tier.saved, pages.num_windows) == (10, 10)
    again = pages_of(llama, TOKENS, OPTIONS, codec="int8", resident=True, tier=tier)
    assert again.num_windows == 10
    assert reader(llama, OPTIONS, lambda: recorder).read(again)
    whole = pages_of(llama, TOKENS, OPTIONS, codec="int8", resident=True)
    assert reader(llama, OPTIONS, None).read(whole)
    assert_alike(llama, OPTIONS, whole, again)


def test_a_full_disk_ends_replayed_reading_and_it_goes_on_when_there_is_room(llama, monkeypatch):
    monkeypatch.setattr(page_records, "_SAVED_BYTES", 1)
    tier, recorder = FullDisk(), Replays()
    pages = pages_of(llama, TOKENS, OPTIONS, codec="int8", resident=True, tier=tier)
    prefill = reader(llama, OPTIONS, lambda: recorder)

    with pytest.raises(KVCacheError, match="the disk is full"):
        prefill.read(pages, At(12, lambda: setattr(tier, "is_full", True)))
    assert 10 <= tier.saved <= pages.num_windows <= 14  # a window comes from the device, and one is being written
    tier.is_full = False
    assert prefill.read(pages)
    assert tier.saved == WINDOWS
    whole = pages_of(llama, TOKENS, OPTIONS, codec="int8", resident=True)
    assert reader(llama, OPTIONS, None).read(whole)
    assert_alike(llama, OPTIONS, whole, pages)


@pytest.mark.parametrize("is_stored", [False, True])
def test_numbers_that_no_codec_takes_end_replayed_reading(is_stored):
    decoder = decoder_of(hf_model("llama", num_hidden_layers=2))
    tier = RecordsInMemory() if is_stored else None
    pages = pages_of(decoder, TOKENS, OPTIONS, codec="int8", resident=True, tier=tier)
    prefill = reader(decoder, OPTIONS, Replays)

    with pytest.raises(KVCacheError, match="not finite"):
        prefill.read(pages, At(12, lambda: decoder.weights.embedding.fill_(float("nan"))))
    assert pages.num_windows == (12 if is_stored else 0)
    if tier is not None:
        assert tier.saved == 12


class Launches:
    """A recorder that records nothing: every window is launched step by step."""

    begin = end = wait = staticmethod(lambda: None)
    record = staticmethod(lambda work: work() or work)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("selector", ["min-max", "mean-key"])
@pytest.mark.parametrize("codec", ["int8", "int4"])
def test_graphs_give_the_pages_of_launched_windows(selector, codec, caplog, monkeypatch):
    monkeypatch.setattr(window_graph, "_LEAST_PAGES", 16)  # so that windows are recorded three times
    decoder = decoder_of(hf_model("llama", num_hidden_layers=2, head_dim=32, hidden_size=192).cuda())
    options = replace(OPTIONS, selector=make_page_selector(selector))
    tiers, documents, asked = (RecordsInMemory(), RecordsInMemory()), [], []
    for tier, make in zip(tiers, (Launches, None), strict=True):
        pages = pages_of(decoder, TOKENS, options, codec=codec, resident=True, tier=tier)
        prefill = PagedPrefill(decoder, RotaryCache(decoder), options, make_recorder=make)
        assert prefill._make_recorder is not None
        assert prefill.read(pages)
        documents.append(pages)
        asked.append(logits_over(decoder, pages, prefill))
        again = pages_of(decoder, TOKENS, options, codec=codec, resident=True, tier=tier)
        again.bring_windows(WINDOWS)
        for layer in range(again.num_layers):
            stored, kept = (one.resident.keys(layer, range(one.num_pages)) for one in (again, pages))
            assert torch.equal(stored, kept)
    assert "could not be recorded" not in caplog.text
    everything = range(documents[0].num_pages)
    for layer in range(documents[0].num_layers):
        launched, replayed = (pages.resident.keys(layer, everything) for pages in documents)
        assert torch.equal(replayed, launched)
    torch.testing.assert_close(*asked, rtol=0, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_numbers_that_no_codec_takes_are_noticed_behind_graphs():
    decoder = decoder_of(hf_model("llama", num_hidden_layers=2, head_dim=32, hidden_size=192).cuda())
    tier = RecordsInMemory()
    pages = pages_of(decoder, TOKENS, OPTIONS, codec="int8", resident=True, tier=tier)

    with pytest.raises(KVCacheError, match="not finite"):
        PagedPrefill(decoder, RotaryCache(decoder), OPTIONS).read(
            pages, At(12, lambda: decoder.weights.embedding.fill_(float("nan")))
        )
    assert tier.saved == pages.num_windows == 12
