import math

import pytest
import torch

from ragkit.errors import KernelInputError
from ragkit.kernels import page_log_sums as module
from ragkit.kernels.backend import Backend
from ragkit.kernels.log_sums_tile import LogSumsTile, log_sums_tile, pages_at_once
from ragkit.kernels.page_log_sums import page_log_sums, page_log_sums_torch
from ragkit.kernels.quantize_kv import quantize_kv
from ragkit.kernels.quantized_blocks import QuantizedBlocks
from ragkit.kernels.testing import assert_matches, guarded

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TILES = {
    "queries first": LogSumsTile(16, 16, 4, 2, 8),
    "keys first": LogSumsTile(32, 8, 1, 3, 10, keys_first=True),
    "queries first, in halves": LogSumsTile(32, 16, 4, 2, 8, in_halves=True),
    "keys first, in halves": LogSumsTile(32, 8, 1, 3, 10, keys_first=True, in_halves=True),
    "small tiles, in halves": LogSumsTile(16, 8, 1, 2, 2, keys_first=True, in_halves=True),
    "many voters, in halves": LogSumsTile(32, 32, 4, 2, 4, keys_first=True, in_halves=True),
}


def _inputs(tokens, pages, q_heads, kv_heads, head_dim, dtype, device, rng, page_size=32):
    """Queries as a view over a fused projection, and keys."""
    qkv = guarded(torch.randn(tokens, q_heads + 2, head_dim, device=device, generator=rng).to(dtype))
    qkv[:, q_heads:] = math.nan
    keys = torch.randn(pages, page_size, kv_heads, head_dim, device=device, generator=rng)
    return qkv[:, :q_heads], guarded(keys.to(dtype))


def _codes(keys, bits, group):
    """Keys as codes of which `group` rows share a scale, between rows that are no numbers."""
    parts = quantize_kv(keys.flatten(0, 1), bits=bits, token_group=group, channel_group=1)
    codes, scales, zeros = (part.unflatten(0, (keys.shape[0], -1)).contiguous() for part in parts)
    return QuantizedBlocks(codes, guarded(scales), guarded(zeros), bits)


def _compare(queries, keys, tile=None):
    scale = queries.shape[2] ** -0.5
    got = page_log_sums(queries, keys, scale=scale, backend=Backend.TRITON, tile=tile)
    wide = keys.float() if isinstance(keys, torch.Tensor) else keys
    assert got.dtype == torch.float32
    expected = page_log_sums_torch(queries.float(), wide, scale=scale)
    # Codes become numbers of the queries' type before they are multiplied.
    assert_matches(got if isinstance(keys, torch.Tensor) else got.to(queries.dtype), expected, reduced=4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "pages"), [(0, 3), (1, 0), (1, 1), (1, 9), (7, 5)])
@pytest.mark.parametrize("page_size", [16, 64])
def test_matches_the_definition(page_size, tokens, pages, dtype, device, rng):
    _compare(*_inputs(tokens, pages, 6, 2, 32, dtype, device, rng, page_size))


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize(("q_heads", "kv_heads"), [(9, 3), (20, 1)])
def test_matches_the_definition_for_every_head_size(head_dim, q_heads, kv_heads, device, rng):
    _compare(*_inputs(1, 2, q_heads, kv_heads, head_dim, torch.bfloat16, device, rng))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("head_dim", [32, 80])
def test_codes_count_as_the_numbers_they_stand_for(head_dim, bits, dtype, device, rng):
    queries, keys = _inputs(2, 5, 4, 2, head_dim, dtype, device, rng)
    parts = quantize_kv(keys.flatten(0, 1), bits=bits, token_group=16, channel_group=1)
    _compare(queries, QuantizedBlocks(*(part.unflatten(0, (5, -1)).contiguous() for part in parts), bits))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [0, 8, 4])
@pytest.mark.parametrize("name", list(TILES))
def test_every_tile_matches_the_definition(name, bits, dtype, device, rng):
    if device.type == "cuda" and dtype == torch.float32 and bits and not TILES[name].in_halves:
        pytest.skip("products of fp32 have tiles of their own, which the tests above run")
    queries, keys = _inputs(3, 5, 12, 2, 32, dtype, device, rng, page_size=64)
    keys = _codes(keys, bits, 32) if bits else keys
    got = page_log_sums(queries, keys, scale=0.25, backend=Backend.TRITON, tile=TILES[name])
    expected = page_log_sums_torch(queries.float(), keys if bits else keys.float(), scale=0.25)
    # Numbers that are taken in halves are rounded to fp16; otherwise keys become numbers of the queries' type.
    rounded = torch.float16 if bits and TILES[name].in_halves else dtype
    assert_matches(got.to(rounded) if bits else got, expected, reduced=4)


@pytest.mark.parametrize("tokens", [0, 1, 2, 5])
@pytest.mark.parametrize("group", [32, 64])
@pytest.mark.parametrize(("head_dim", "bits"), [(64, 4), (80, 8), (80, 4), (96, 4), (128, 8), (256, 4)])
def test_codes_in_halves_match_the_definition_for_every_head_size(head_dim, bits, group, tokens, device, rng):
    queries, keys = _inputs(tokens, 3, 6, 2, head_dim, torch.bfloat16, device, rng, page_size=64)
    tile = TILES["keys first, in halves"]._replace(rows=group)
    keys = _codes(keys, bits, group)
    got = page_log_sums(queries, keys, scale=head_dim**-0.5, backend=Backend.TRITON, tile=tile)
    expected = page_log_sums_torch(queries.float(), keys, scale=head_dim**-0.5)
    assert_matches(got.half(), expected)


@pytest.mark.parametrize("bits", [8, 4])
def test_keys_in_halves_of_realistic_size_are_off_by_few_hundredths_of_a_nat(bits, device, rng):
    queries, keys = _inputs(1, 9, 8, 2, 128, torch.bfloat16, device, rng, page_size=64)
    keys[..., 5] = keys[..., 5] + 25.0  # channels far from zero, as models have
    queries[..., 77] *= 20.0
    codes = _codes(keys, bits, 32)
    got = page_log_sums(queries, codes, scale=128**-0.5, backend=Backend.TRITON, tile=TILES["keys first, in halves"])
    error = (got - page_log_sums_torch(queries.float(), codes, scale=128**-0.5)).abs()
    assert float(error.max()) < 0.02
    assert float(error.square().mean().sqrt()) < 0.005


def test_queries_beyond_the_range_of_halves_count_as_the_largest(device, rng):
    queries, keys = _inputs(1, 2, 4, 2, 32, torch.bfloat16, device, rng, page_size=64)
    codes, tile = _codes(keys, 4, 32), TILES["keys first, in halves"]
    got = page_log_sums(queries * 1e6, codes, scale=1.0, backend=Backend.TRITON, tile=tile)
    expected = page_log_sums_torch((queries * 1e6).float().clamp(-65504, 65504), codes, scale=1.0)
    assert_matches(got.to(torch.bfloat16), expected)


@pytest.mark.parametrize("name", ["keys first", "keys first, in halves"])
@pytest.mark.parametrize("lists", [[[6, 0, 6, 3]], [[5, 1], [2, 2]]])
def test_tiles_for_few_queries_read_listed_pages(lists, name, device, rng):
    queries, keys = _inputs(1, 7, 4, 2, 32, torch.bfloat16, device, rng, page_size=64)
    codes = _codes(keys, 4, 32)
    listed = torch.tensor(lists, dtype=torch.int32, device=device)
    got = page_log_sums(queries, codes, scale=0.5, listed=listed, backend=Backend.TRITON, tile=TILES[name])
    expected = page_log_sums_torch(queries.float(), codes, scale=0.5, listed=listed)
    assert_matches(got.to(torch.bfloat16), expected)


def test_few_queries_of_codes_take_a_warp_a_page_and_many_do_not(device, rng):
    queries, keys = _inputs(64, 2, 8, 2, 128, torch.bfloat16, device, rng, page_size=64)
    codes = _codes(keys, 4, 32)
    few = log_sums_tile(queries[:2], codes)
    assert (few.pairs, few.warps, few.keys_first, few.in_halves) == (8, 1, True, True)
    window, question = log_sums_tile(queries[:8], codes), log_sums_tile(queries, codes)
    assert (window.pairs, window.warps, window.keys_first) == (32, 1, True)
    assert (question.pairs, question.warps, question.keys_first) == (128, 8, False)
    low_rank = log_sums_tile(queries[:2, :, :32], _codes(keys[..., :32].contiguous(), 4, 64))
    assert (low_rank.rows, low_rank.warps) == (64, 1)  # as many as share scales
    assert not log_sums_tile(queries[:2].float(), codes).in_halves
    assert not log_sums_tile(queries[:2], keys).keys_first


def test_programs_share_pages_evenly_and_take_one_at_least():
    tile, cpu = LogSumsTile(32, 8, 1, 3, 10), torch.device("cpu")
    assert [pages_at_once(pages, 8, tile, cpu) for pages in (1, 5, 100)] == [1, 4, 80]


@pytest.mark.parametrize("backend", list(Backend))
def test_the_softmax_over_pages_is_the_attention_that_they_receive(backend, device, rng, monkeypatch):
    monkeypatch.setattr(module, "_TORCH_PAGES", 3)
    queries, keys = _inputs(2, 7, 4, 2, 16, torch.float32, device, rng)
    logits = page_log_sums(queries, keys, scale=2.0, backend=backend)
    rows = keys.flatten(0, 1).repeat_interleave(2, dim=1)
    weights = (torch.einsum("thd,rhd->thr", queries, rows) * 2.0).softmax(dim=2)
    assert_matches(logits.softmax(dim=2), weights.unflatten(2, (7, 32)).sum(dim=3), reduced=16)


@pytest.mark.parametrize("backend", list(Backend))
@pytest.mark.parametrize("bits", [0, 4])
@pytest.mark.parametrize("lists", [[[6, 0, 6, 3]], [[5, 1], [2, 2]]])
def test_listed_pages_have_the_logits_that_they_have_among_all(lists, bits, backend, device, rng):
    queries, keys = _inputs(3, 7, 4, 2, 16, torch.float32, device, rng)
    if bits:
        parts = quantize_kv(keys.flatten(0, 1), bits=bits, token_group=16, channel_group=1)
        keys = QuantizedBlocks(*(part.unflatten(0, (7, -1)).contiguous() for part in parts), bits)
    listed = torch.tensor(lists, dtype=torch.int32, device=device)
    some = page_log_sums(queries, keys, scale=0.5, listed=listed, backend=backend)
    every = page_log_sums(queries, keys, scale=0.5, backend=backend).unflatten(1, (2, 2))
    expected = [every[:, head][..., pages] for head, pages in enumerate(listed.long().expand(2, -1))]
    assert_matches(some, torch.cat(expected, dim=1), reduced=4)


@pytest.mark.parametrize("backend", list(Backend))
def test_large_products_do_not_overflow(backend, device, rng):
    queries, keys = _inputs(1, 3, 4, 2, 16, torch.float32, device, rng)
    assert bool(page_log_sums(queries * 1e4, keys, scale=1.0, backend=backend).isfinite().all())


def test_inputs_that_do_not_fit_are_refused(device, rng):
    queries, keys = _inputs(2, 3, 4, 2, 16, torch.float32, device, rng)
    parts = quantize_kv(keys.flatten(0, 1), bits=8, token_group=1, channel_group=8)
    codes = QuantizedBlocks(*(part.unflatten(0, (3, -1)).contiguous() for part in parts), 8)
    for wrong_queries, wrong_keys, message in (
        (queries[0], keys, r"queries must be \(tokens, heads, head_dim\)"),
        (queries[:, :3], keys, "3 query heads cannot share 2 key heads"),
        (queries, keys[..., :8], r"keys must be \(pages, page_size, kv_heads, 16\)"),
        (queries, keys.transpose(0, 1), "keys must be contiguous"),
        (queries, codes, "channel by channel, got groups of 8"),
        (queries, keys[:, :8].contiguous(), "powers of two from 16 rows on, got 8 and 8"),
    ):
        with pytest.raises(KernelInputError, match=message):
            page_log_sums(wrong_queries, wrong_keys, scale=1.0)
    for listed in (torch.zeros(3, 4, dtype=torch.int32), torch.zeros(1, 4)):
        with pytest.raises(KernelInputError, match=r"listed must be \(1 or 2, pages\) int32"):
            page_log_sums(queries, keys, scale=1.0, listed=listed.to(device))
