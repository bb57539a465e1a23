"""Which documents a GPU is to hold as a whole, by what of its memory is free."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from ragkit.config import KVConfig, PagesConfig
from ragkit.errors import CacheCapacityError
from ragkit.generation import paging
from ragkit.generation.paging import Paging
from ragkit.kvcache.layout import KVLayout, LayerSpec
from ragkit.kvcache.page_codec import PageCodec

LAYOUT = KVLayout((LayerSpec(8, 64, None),) * 16, torch.bfloat16)  # the shape of Llama 3.2 1B
PAGES = 4096


@pytest.fixture
def holds(engine, monkeypatch):
    """Return whether so many pages are to lie on a GPU with so many free bytes."""
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(paging, "ResidentPages", lambda *arguments: arguments)

    def asked(codec: str, free: int, **settings) -> bool:
        config = PagesConfig(codec=codec, **settings)
        own = Paging(engine, config, KVConfig(), None)
        monkeypatch.setattr(own, "_engine", SimpleNamespace(
            decoder=SimpleNamespace(device=torch.device("cuda"), layout=LAYOUT)
        ))  # fmt: skip
        monkeypatch.setattr(own, "_codec", PageCodec(codec, LAYOUT, config.page_tokens))
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 2 * free))
        return own._resident(PAGES) is not None

    return asked


def pages_bytes(codec):
    return PageCodec(codec, LAYOUT, 64).bytes_per_page * PAGES


def test_pages_may_take_four_fifths_of_what_is_free(holds):
    nbytes = pages_bytes("bf16")
    assert holds("bf16", int(nbytes / 0.79), selector="everything", reading_selector="window")
    assert not holds("bf16", int(nbytes / 0.81), selector="everything", reading_selector="window")


@pytest.mark.parametrize("codec", ["int8", "int4"])
def test_what_finds_the_pages_needs_room_beside_them(holds, codec):
    # Bounds of 16 tokens in bf16 take 8 bytes a channel and page, keys of rank 32 in 4 bits with their scales 18.
    kept = PAGES * 16 * 8 * 64 * (2 * 4 * 2 + 16 + 2)
    nbytes = pages_bytes(codec)
    assert not holds(codec, int(nbytes / 0.79))
    assert holds(codec, int((nbytes + kept) / 0.88))
    assert not holds(codec, int((nbytes + kept) / 0.92))
    only_bounds = PAGES * 16 * 8 * 64 * 2 * 4 * 2
    assert holds(codec, int((nbytes + only_bounds) / 0.88), selector="min-max")


@pytest.mark.parametrize("kind", ["", "reading_"])
@pytest.mark.parametrize("setting", [{"found_times": 50}, {"selector": "everything"}])
def test_a_cache_that_is_too_small_names_the_settings_that_ask_for_more(engine, setting, kind):
    config = PagesConfig(cache_mb=2, **{kind + name: value for name, value in setting.items()})
    own = Paging(engine, config, KVConfig(), None)
    named = f"lower pages.budget_tokens or pages.{kind}found_times, or take another pages.{kind}selector"
    with pytest.raises(CacheCapacityError, match=named):
        own._cache(PAGES)
