# ruff: noqa: ANN001, ANN201, ANN202 (Triton reads the annotations of kernels, and pointers have none)
# mypy: disable-error-code="no-untyped-def"
"""Decode entropy-coded keys or values: many independent streams, each four channels of all tokens of a chunk.

    symbol, frequency, behind = slots[table, state mod 4096]
    state <- frequency * floor(state / 4096) + behind,  and takes in a 16-bit word while below 2^16
    level_t = symbol + floor(predictor * level_(t-1) / 2),   x_t = (level_t + mean) * step   for t >= 1, level_0 = 0

The first token is stored as it is.
Source: range ANS, arXiv 1311.2540, section 2.3; neighbour deltas and coding by channel: CacheGen, arXiv 2310.07240.
Cost: latency of dependent table look-ups, hidden by having tens of thousands of streams.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ragkit.errors import KernelInputError
from ragkit.kernels.backend import Backend, ceil_div, jit, resolve_backend, tl
from ragkit.kernels.launched import launched
from ragkit.kernels.rans_tables import (
    CHANNELS_PER_STREAM,
    ESCAPE,
    FREQUENCY_BITS,
    RAW_BITS,
    STATE_FLOOR,
    SYMBOL_ZERO,
    TABLES,
    rans_tables,
)

_STREAMS_PER_PROGRAM = 32  # one warp: lanes that wait for a look-up hold up nobody else


class EntropyStreams(NamedTuple):
    """Streams of one or more matrices (tokens, width), stream by stream and matrix by matrix.

    Attributes:
        words: int16, the words of all streams; two words of state lead each stream, the high one first.
        starts: (streams,) int64, where each stream's words start.
        tables: (streams, 4) uint8, each channel's table in six bits and above them its predictor: 0, 1 or 2.
        means: (streams, 4) float16, in steps.
        steps: (streams, 4) uint8, logarithmic (`RansTables.steps`).
        firsts: (streams, 4) float16, the first token's numbers, which are not in the words.
    """

    words: Tensor
    starts: Tensor
    tables: Tensor
    means: Tensor
    steps: Tensor
    firsts: Tensor


def entropy_decode_kv(
    streams: EntropyStreams, tokens: int, width: int, dtype: torch.dtype, backend: Backend | None = None
) -> Tensor:
    """Return (matrices, tokens, width) in `dtype`.

    Args:
        streams: what to decode.
        tokens: tokens of each matrix, the first included.
        width: channels of one matrix, a multiple of 4.
        dtype: of the result.
        backend: an implementation to insist on.

    Raises:
        KernelInputError: shapes do not fit.
    """
    _check_inputs(streams, width)
    if resolve_backend(streams.words, backend) is Backend.TORCH:
        return entropy_decode_kv_torch(streams, tokens, width, dtype)
    count = len(streams.starts)
    device = streams.words.device
    out = torch.empty((count * CHANNELS_PER_STREAM // width, tokens, width), dtype=dtype, device=device)
    if out.numel() == 0:
        return out
    slots, steps = device_tables(device)
    _entropy_decode_kv_kernel[(ceil_div(count, _STREAMS_PER_PROGRAM),)](
        streams.words, streams.starts, streams.tables, streams.means, streams.steps, streams.firsts, slots, steps, out,
        tokens, count, len(streams.words), width // CHANNELS_PER_STREAM, STREAMS=_STREAMS_PER_PROGRAM, num_warps=1,
    )  # fmt: skip
    return out


def entropy_decode_kv_torch(streams: EntropyStreams, tokens: int, width: int, dtype: torch.dtype) -> Tensor:
    """Return what `entropy_decode_kv` returns: the definition, one symbol of every stream at a time, on the CPU."""
    levels = decode_levels(streams, max(tokens - 1, 0))
    steps = rans_tables().steps[streams.steps.cpu().numpy()]
    means, firsts = (part.cpu().numpy().astype(np.float32) for part in (streams.means, streams.firsts))
    numbers = (levels.astype(np.float32) + means) * steps  # (tokens but the first, streams, 4)
    if tokens:
        numbers = np.concatenate((firsts[None], numbers))
    count = numbers.shape[1] * CHANNELS_PER_STREAM // width
    matrices = torch.from_numpy(numbers).view(tokens, count, width).transpose(0, 1)
    return matrices.to(dtype=dtype, device=streams.words.device).contiguous()


def decode_levels(streams: EntropyStreams, tokens: int) -> NDArray[np.int32]:
    """Return (tokens, streams, 4): the integers that were coded, of all tokens but the first, before mean and step."""
    reader = _Reader(streams)
    tables = streams.tables.cpu().numpy()
    table = (tables & (TABLES - 1)).astype(np.uint32) << np.uint32(FREQUENCY_BITS)
    predictor = (tables >> 6).astype(np.int32)
    out = np.zeros((tokens, *tables.shape), dtype=np.int32)
    levels = np.zeros(tables.shape, dtype=np.int32)
    for token in range(tokens):
        for channel in range(CHANNELS_PER_STREAM):
            residual = reader.symbol(table[:, channel]) - SYMBOL_ZERO
            escaped = np.flatnonzero(residual == ESCAPE - SYMBOL_ZERO)
            if len(escaped):
                residual[escaped] = reader.escaped(escaped)
            levels[:, channel] = residual + ((predictor[:, channel] * levels[:, channel]) >> 1)
        out[token] = levels
    return out


class _Reader:
    """The states of all streams."""

    def __init__(self, streams: EntropyStreams) -> None:
        # Two words of zeros behind the end: a damaged stream may ask for more, but never outside.
        self._words = np.append(streams.words.cpu().numpy().view(np.uint16), np.zeros(2, np.uint16)).astype(np.uint32)
        self._at = streams.starts.cpu().numpy() + 2
        self._state = (self._words[self._at - 2] << 16) | self._words[self._at - 1]
        self._slots = rans_tables().slots

    def symbol(self, table: NDArray[np.uint32]) -> NDArray[np.int32]:
        """Return the next symbol of every stream; `table` is the start of each one's table in the slots."""
        entry = self._slots[table + (self._state & 4095)]
        self._state = ((entry >> 8) & 4095) * (self._state >> FREQUENCY_BITS) + (entry >> 20)
        self._take(np.flatnonzero(self._state < STATE_FLOOR))
        symbol: NDArray[np.int32] = (entry & 255).astype(np.int32)
        return symbol

    def escaped(self, which: NDArray[np.intp]) -> NDArray[np.int32]:
        """Return the plain 16-bit numbers that follow in these streams."""
        value = np.zeros(len(which), dtype=np.uint32)
        for _ in range(2):
            state = self._state[which]
            value = (value << RAW_BITS) | ((state & 4095) >> 4)
            self._state[which] = ((state >> FREQUENCY_BITS) << 4) + (state & 15)
            self._take(which[self._state[which] < STATE_FLOOR])
        return value.astype(np.uint16).view(np.int16).astype(np.int32)

    def _take(self, which: NDArray[np.intp]) -> None:
        at = np.minimum(self._at[which], len(self._words) - 1)
        self._state[which] = (self._state[which] << 16) | self._words[at]
        self._at[which] += 1


def _check_inputs(streams: EntropyStreams, width: int) -> None:
    count = len(streams.starts)
    shapes = {tuple(part.shape) for part in streams[2:]}
    if shapes != {(count, CHANNELS_PER_STREAM)}:
        raise KernelInputError(
            f"tables, means, steps and firsts must be ({count}, {CHANNELS_PER_STREAM}), got {shapes}"
        )
    if width < 1 or width % CHANNELS_PER_STREAM or (count * CHANNELS_PER_STREAM) % width:
        raise KernelInputError(f"{count} streams of {CHANNELS_PER_STREAM} channels are not matrices of width {width}")
    kinds = streams.words.dtype, streams.means.dtype, streams.firsts.dtype
    if kinds != (torch.int16, torch.float16, torch.float16) or not all(part.is_contiguous() for part in streams):
        raise KernelInputError(f"words must be int16, means and firsts float16 and all contiguous, got {kinds}")


@functools.cache
def device_tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the slots of all tables and the steps, on `device`."""
    tables = rans_tables()
    return torch.from_numpy(tables.slots.view(np.int32)).to(device), torch.from_numpy(tables.steps).to(device)


@jit
def _refill(state, at, words_ptr, num_words, needed):
    # States below the floor take in a word.
    word = tl.load(words_ptr + tl.minimum(at, num_words - 1), mask=needed, other=0).to(tl.int32) & 0xFFFF
    return tl.where(needed, (state << 16) | word.to(tl.uint32), state), at + needed.to(tl.int64)


@jit
def next_levels(level, state, at, table, predictor, real, words_ptr, num_words, slots_ptr):
    """Return the levels (STREAMS, 4) of the next token of each stream, and the streams' states and places then."""
    # A column is a channel; columns are picked by masks, since lanes cannot be indexed.
    channel = tl.arange(0, 4)
    predicted = (predictor * level) >> 1
    for index in tl.static_range(4):
        mine = (channel == index)[None, :]
        own_table = tl.sum(tl.where(mine, table, 0), axis=1)
        entry = tl.load(slots_ptr + own_table + (state & 4095).to(tl.int32), mask=real, other=0).to(tl.uint32)
        state = ((entry >> 8) & 4095) * (state >> 12) + (entry >> 20)
        state, at = _refill(state, at, words_ptr, num_words, real & (state < 65536))
        symbol = (entry & 255).to(tl.int32)
        residual = symbol - 127
        escaped = real & (symbol == 255)
        if tl.max(escaped.to(tl.int32), axis=0) > 0:
            first = ((state & 4095) >> 4).to(tl.int32)
            state = tl.where(escaped, ((state >> 12) << 4) + (state & 15), state)
            state, at = _refill(state, at, words_ptr, num_words, escaped & (state < 65536))
            second = ((state & 4095) >> 4).to(tl.int32)
            state = tl.where(escaped, ((state >> 12) << 4) + (state & 15), state)
            state, at = _refill(state, at, words_ptr, num_words, escaped & (state < 65536))
            value = (first << 8) | second
            residual = tl.where(escaped, tl.where(value > 32767, value - 65536, value), residual)
        level = tl.where(mine, residual[:, None] + predicted, level)
    return level, state, at


@launched
def _entropy_decode_kv_kernel(
    words_ptr, start_ptr, table_ptr, mean_ptr, step_ptr, first_ptr, slots_ptr, steps_ptr, out_ptr,
    tokens, num_streams, num_words, streams_per_matrix, STREAMS: tl.constexpr,
):  # fmt: skip
    # This program decodes STREAMS streams, one in each lane, token after token.
    stream = tl.program_id(0) * STREAMS + tl.arange(0, STREAMS)
    real = stream < num_streams
    at = tl.load(start_ptr + stream, mask=real, other=0)
    high = tl.load(words_ptr + at, mask=real, other=1).to(tl.uint32) & 0xFFFF
    low = tl.load(words_ptr + at + 1, mask=real, other=0).to(tl.uint32) & 0xFFFF
    state = (high << 16) | low
    at += 2
    matrix = (stream // streams_per_matrix).to(tl.int64)
    column = (stream % streams_per_matrix) * 4
    width = streams_per_matrix * 4
    out_at = matrix * tokens * width + column

    channel = tl.arange(0, 4)
    cell = stream[:, None] * 4 + channel[None, :]
    both = tl.load(table_ptr + cell, mask=real[:, None], other=0).to(tl.int32)
    table = (both & 63) * 4096
    predictor = both >> 6
    mean = tl.load(mean_ptr + cell, mask=real[:, None], other=0.0).to(tl.float32)
    step = tl.load(
        steps_ptr + tl.load(step_ptr + cell, mask=real[:, None], other=0).to(tl.int32), mask=real[:, None], other=0.0
    )
    first = tl.load(first_ptr + cell, mask=real[:, None], other=0.0).to(tl.float32)
    place = out_ptr + out_at[:, None] + channel[None, :]
    tl.store(place, first.to(out_ptr.dtype.element_ty), mask=real[:, None])
    level = tl.zeros((STREAMS, 4), dtype=tl.int32)
    for token in range(1, tokens):
        level, state, at = next_levels(level, state, at, table, predictor, real, words_ptr, num_words, slots_ptr)
        numbers = (level.to(tl.float32) + mean) * step
        tl.store(place + token * width, numbers.to(out_ptr.dtype.element_ty), mask=real[:, None])
