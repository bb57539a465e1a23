"""The encoder of the entropy-coded KV: every stream at once, one symbol of each at a time, last symbol first.

Range ANS (arXiv 1311.2540, section 2.3) reads back what was written last, so the encoder walks backwards and the
decoder (kernels/entropy_decode_kv.py) forwards.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ragkit.kernels.rans_tables import (
    CHANNELS_PER_STREAM,
    ESCAPE,
    FREQUENCY_BITS,
    RAW_BITS,
    STATE_FLOOR,
    SYMBOL_ZERO,
    rans_tables,
)

PREDICTORS = (0, 1, 2)  # halves of the level before

Residuals = NDArray[np.int32]  # (tokens, channels)


def choose_predictors(levels: Residuals) -> tuple[NDArray[np.uint8], Residuals]:
    """Return each channel's predictor (channels,) and what it leaves of `levels` (tokens, channels)."""
    before = np.zeros_like(levels)
    before[1:] = levels[:-1]
    candidates = np.stack([levels - ((predictor * before) >> 1) for predictor in PREDICTORS])
    if len(levels) == 0:
        return np.zeros(levels.shape[1], np.uint8), levels
    # The logarithm of the mean size tells the code length; and it is the same order without the logarithm.
    best = np.abs(candidates).mean(axis=1).argmin(axis=0)
    residuals = np.take_along_axis(candidates, best[None, None, :], axis=0)[0]
    return best.astype(np.uint8), residuals


def choose_tables(residuals: Residuals) -> NDArray[np.uint8]:
    """Return for each channel (channels,) the table that codes its residuals in the fewest bits."""
    channels = residuals.shape[1]
    symbols = _symbols(residuals)
    flat = np.bincount((symbols + 256 * np.arange(channels)).reshape(-1), minlength=256 * channels)
    costs: NDArray[np.float64] = flat.reshape(channels, 256).astype(np.float64) @ rans_tables().costs
    best: NDArray[np.uint8] = costs.argmin(axis=1).astype(np.uint8)
    return best


def encode_streams(residuals: Residuals, tables: NDArray[np.uint8]) -> tuple[NDArray[np.uint16], NDArray[np.int64]]:
    """Return the words of all streams behind each other, and how many each has (channels / 4,)."""
    tokens, channels = residuals.shape
    known = rans_tables()
    symbols = _symbols(residuals)
    rare = known.frequencies[tables, symbols] == 0
    symbols[rare] = ESCAPE
    shape = (tokens, channels // CHANNELS_PER_STREAM, CHANNELS_PER_STREAM)
    frequencies = known.frequencies[tables, symbols].astype(np.uint64).reshape(shape)
    starts = known.starts[tables, symbols].astype(np.uint64).reshape(shape)
    escaped = (symbols == ESCAPE).reshape(shape)
    plain = (residuals & 0xFFFF).astype(np.uint64).reshape(shape)
    writer = _Writer(shape[1], tokens)
    for token in range(tokens - 1, -1, -1):
        for channel in range(CHANNELS_PER_STREAM - 1, -1, -1):
            which = np.flatnonzero(escaped[token, :, channel])
            if len(which):
                value = plain[token, which, channel]
                writer.put_plain(which, value & 0xFF)  # backwards: the decoder reads the high half first
                writer.put_plain(which, value >> RAW_BITS)
            writer.put(frequencies[token, :, channel], starts[token, :, channel])
    return writer.finish()


class _Writer:
    """The states of all streams, and their words from the last to the first."""

    def __init__(self, streams: int, tokens: int) -> None:
        # A symbol takes 12 bits at most, and an escape 16 more; two words of state stand in front.
        longest = tokens * CHANNELS_PER_STREAM * (FREQUENCY_BITS + 2 * RAW_BITS) // 16 + 4
        self._words = np.zeros((streams, longest), dtype=np.uint16)
        self._at = np.full(streams, longest)
        self._state: NDArray[np.uint64] = np.full(streams, STATE_FLOOR, dtype=np.uint64)
        self._all = np.arange(streams)

    def put(self, frequency: NDArray[np.uint64], start: NDArray[np.uint64]) -> None:
        """Write one symbol to every stream."""
        self._spill(self._all, frequency)
        high: NDArray[np.uint64] = self._state // frequency
        low: NDArray[np.uint64] = self._state % frequency
        shift = np.uint64(FREQUENCY_BITS)
        self._state = (high << shift) + low + start

    def put_plain(self, which: NDArray[np.intp], value: NDArray[np.uint64]) -> None:
        """Write eight plain bits to some streams."""
        self._spill(which, np.full(len(which), 1 << (FREQUENCY_BITS - RAW_BITS), dtype=np.uint64))
        state = self._state[which]
        self._state[which] = ((state >> 4) << FREQUENCY_BITS) + (state & 15) + (value << 4)

    def finish(self) -> tuple[NDArray[np.uint16], NDArray[np.int64]]:
        """Return all words and the number of each stream's."""
        for half in (self._state & 0xFFFF, self._state >> 16):
            self._at -= 1
            self._words[self._all, self._at] = half
        longest = self._words.shape[1]
        written = np.arange(longest) >= self._at[:, None]
        return self._words[written], longest - self._at

    def _spill(self, which: NDArray[np.intp], frequency: NDArray[np.uint64]) -> None:
        # A state that would outgrow 32 bits gives its low half away first; once is always enough.
        full = self._state[which] >= frequency << (32 - FREQUENCY_BITS)
        which = which[full]
        self._at[which] -= 1
        self._words[which, self._at[which]] = self._state[which] & 0xFFFF
        self._state[which] >>= np.uint64(16)


def _symbols(residuals: Residuals) -> NDArray[np.int64]:
    near = np.abs(residuals) <= SYMBOL_ZERO
    return np.where(near, residuals + SYMBOL_ZERO, ESCAPE).astype(np.int64)
