"""Decoding of entropy-coded KV at the shape of Llama 3 8B: all layers of a few chunks, as they come from the disk."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from kernel_case import KernelCase
from kernel_inputs import model_shape
from torch import Tensor

from ragkit.kernels.backend import Backend
from ragkit.kernels.entropy_decode_kv import EntropyStreams, entropy_decode_kv, entropy_decode_kv_torch
from ragkit.kernels.testing import assert_matches
from ragkit.kvcache.rans_encode import choose_predictors, choose_tables, encode_streams

TOKENS = 256
# Levels of a channel: how far they spread around its mean. The codec's finest and coarsest settings lie about there.
SPREADS = {"fine": 3.0, "coarse": 0.8}
LIKENESS = 0.6  # correlation of neighbouring tokens


def cases(device: torch.device) -> list[KernelCase]:
    """Return all 32 layers of one chunk and of eight, finely and coarsely coded; on a CPU one matrix."""
    layers, counts, tokens = (32, (1, 8), TOKENS) if device.type == "cuda" else (1, (1,), 20)
    width = model_shape(device).kv_heads * model_shape(device).head_dim
    coded = {
        name: _encoded(_levels(tokens - 1, 2 * layers * width, spread), device) for name, spread in SPREADS.items()
    }
    return [
        _case(name, streams, tokens, layers, chunks, device) for name, streams in coded.items() for chunks in counts
    ]


def _case(name: str, coded: EntropyStreams, tokens: int, layers: int, chunks: int, device: torch.device) -> KernelCase:
    shape = model_shape(device)
    width = shape.kv_heads * shape.head_dim
    streams = _repeated(coded, chunks)  # chunks hold the same numbers at different places

    def run() -> Tensor:
        return entropy_decode_kv(streams, tokens, width, shape.dtype, Backend.TRITON)

    def check() -> None:
        # The definition decodes one symbol at a time on the CPU: two matrices, of every chunk.
        got, matrices = run().unflatten(0, (chunks, 2 * layers)), 2
        few = _first(coded, matrices * width // 4)
        expected = entropy_decode_kv_torch(few, tokens, width, torch.float32)
        for chunk in got:
            assert_matches(chunk[:matrices], expected)

    out_bytes = chunks * 2 * layers * tokens * shape.kv_bytes
    bits = 16 * len(coded.words) / (tokens * 2 * layers * width)
    return KernelCase(
        name=f"entropy_decode_kv, {name}",
        shape=f"{chunks} x {tokens} tokens, {layers} layers, {bits:.1f} bits a number; rate of what comes out",
        run=run,
        check=check,
        work=out_bytes,
        kind="bandwidth",
        baseline_name="copy of the plain rows from pinned memory",
        baseline=_copied(out_bytes, device),
    )


def _levels(tokens: int, channels: int, spread: float) -> np.ndarray:
    """Return (tokens, channels) int32 of channels that differ in spread and whose neighbours are alike."""
    random = np.random.default_rng(0)
    levels = random.standard_normal((tokens, channels), dtype=np.float32)
    for token in range(1, tokens):
        levels[token] = LIKENESS * levels[token - 1] + (1 - LIKENESS**2) ** 0.5 * levels[token]
    return np.rint(levels * spread * random.uniform(0.5, 2.0, channels)).astype(np.int32)


def _encoded(levels: np.ndarray, device: torch.device) -> EntropyStreams:
    predictors, residuals = choose_predictors(levels)
    tables = choose_tables(residuals)
    words, lengths = encode_streams(residuals, tables)
    random = np.random.default_rng(1)
    means = random.uniform(-30, 30, levels.shape[1]).astype(np.float16)
    steps = random.integers(110, 130, levels.shape[1]).astype(np.uint8)
    firsts = random.standard_normal(levels.shape[1]).astype(np.float16)
    channels = [part.reshape(-1, 4) for part in (tables | predictors << 6, means, steps, firsts)]
    parts = [words.view(np.int16), np.cumsum(lengths) - lengths, *channels]
    return EntropyStreams(*(torch.from_numpy(np.ascontiguousarray(part)).to(device) for part in parts))


def _repeated(streams: EntropyStreams, times: int) -> EntropyStreams:
    starts = [streams.starts + copy * len(streams.words) for copy in range(times)]
    rest = [part.repeat(times, 1) for part in streams[2:]]
    return EntropyStreams(streams.words.repeat(times), torch.cat(starts), *rest)


def _first(streams: EntropyStreams, count: int) -> EntropyStreams:
    return EntropyStreams(streams.words, *(part[:count] for part in streams[1:]))


def _copied(size: int, device: torch.device) -> Callable[[], object]:
    source = torch.zeros(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
    target = torch.empty(size, dtype=torch.uint8, device=device)
    return lambda: target.copy_(source, non_blocking=True)
