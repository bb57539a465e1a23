import numpy as np
import pytest
import torch

from ragkit.errors import KernelInputError
from ragkit.kernels.backend import Backend
from ragkit.kernels.entropy_decode_kv import (
    EntropyStreams,
    decode_levels,
    entropy_decode_kv,
    entropy_decode_kv_torch,
)
from ragkit.kernels.rans_tables import rans_tables
from ragkit.kernels.testing import assert_matches
from ragkit.kvcache.rans_encode import choose_predictors, choose_tables, encode_streams

KINDS = ("narrow", "wide", "escapes", "walk")


def _levels(kind, tokens, channels, seed=0):
    random = np.random.default_rng(seed)
    levels = random.normal(0, {"narrow": 0.3, "wide": 40, "escapes": 3, "walk": 1}[kind], (tokens, channels))
    if kind == "escapes":
        rare = random.random((tokens, channels)) < 0.05
        levels[rare] = random.integers(-16000, 16000, int(rare.sum()))
    if kind == "walk":
        levels = levels.cumsum(axis=0)
    return np.rint(levels).astype(np.int32)


def _streams(levels, device):
    predictors, residuals = choose_predictors(levels)
    tables = choose_tables(residuals)
    words, lengths = encode_streams(residuals, tables)
    random = np.random.default_rng(1)
    means = random.uniform(-300, 300, levels.shape[1]).astype(np.float16)
    steps = random.integers(110, 140, levels.shape[1]).astype(np.uint8)
    starts = np.cumsum(lengths) - lengths
    firsts = random.uniform(-50, 50, levels.shape[1]).astype(np.float16)
    channels = [part.reshape(-1, 4) for part in (tables | predictors << 6, means, steps, firsts)]
    parts = [words.view(np.int16), starts, *channels]
    return EntropyStreams(*(torch.from_numpy(np.ascontiguousarray(part)).to(device) for part in parts))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [0, 1, 2, 50])
def test_the_integers_come_back_exactly(kind, tokens, device):
    levels = _levels(kind, tokens, 24)
    assert np.array_equal(decode_levels(_streams(levels, device), tokens).reshape(tokens, 24), levels)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_the_kernel_matches_the_definition(kind, dtype, tokens, device):
    streams = _streams(
        _levels(kind, max(tokens - 1, 0), 160) // (50 if kind == "escapes" else 1), device
    )  # 40 streams, two programs
    got = entropy_decode_kv(streams, tokens, 32, dtype, Backend.TRITON)
    expected = entropy_decode_kv_torch(streams, tokens, 32, dtype)
    assert got.shape == (5, tokens, 32)
    assert_matches(got, expected)
    if dtype == torch.float32:
        assert torch.equal(got, expected)


def test_the_kernel_reads_escapes(device):
    levels = _levels("escapes", 5, 160)
    streams = _streams(levels, device)
    got = entropy_decode_kv(streams, 6, 160, torch.float32, Backend.TRITON)
    assert torch.equal(got, entropy_decode_kv_torch(streams, 6, 160, torch.float32))


def test_the_first_token_is_as_it_was_stored(device):
    streams = _streams(_levels("walk", 3, 16), device)
    got = entropy_decode_kv(streams, 4, 16, torch.float32, Backend.TRITON)
    assert torch.equal(got[0, 0], streams.firsts.float().flatten())


def test_streams_may_lie_in_any_order(device):
    streams = _streams(_levels("walk", 20, 16), device)
    order = torch.tensor([2, 0, 3, 1], device=device)
    moved = EntropyStreams(streams.words, *(part[order] for part in streams[1:]))
    expected = decode_levels(streams, 20)[:, order.cpu().numpy()]
    assert np.array_equal(decode_levels(moved, 20), expected)


@pytest.mark.parametrize(("kind", "bits"), [("narrow", 0.6), ("wide", 7.45), ("walk", 2.2)])
def test_the_code_is_near_the_entropy(kind, bits, device):
    levels = _levels(kind, 1000, 8)
    streams = _streams(levels, device)
    assert len(streams.words) * 16 / levels.size <= bits


def test_every_table_sums_to_its_total_and_can_escape():
    tables = rans_tables()
    assert set(tables.frequencies.sum(axis=1).tolist()) == {4096}
    assert int(tables.frequencies[:, 255].min()) >= 1
    assert int(tables.frequencies.max()) < 4096


def test_shapes_that_do_not_fit_are_refused(device):
    streams = _streams(_levels("narrow", 5, 16), device)
    with pytest.raises(KernelInputError, match="not matrices of width 12"):
        entropy_decode_kv(streams, 5, 12, torch.float32)
    with pytest.raises(KernelInputError, match="tables, means, steps and firsts"):
        entropy_decode_kv(streams._replace(starts=streams.starts[:2]), 5, 16, torch.float32)
    with pytest.raises(KernelInputError, match="int16"):
        entropy_decode_kv(streams._replace(words=streams.words.int()), 5, 16, torch.float32)
