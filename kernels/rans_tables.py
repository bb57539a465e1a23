"""The fixed symbol statistics of the entropy-coded KV, and the constants of its coder.

Small chunks cannot afford a table of their own for each channel (CacheGen's code spends half of a 256-token chunk's
bytes on them), so a channel names one of 64 fixed distributions in six bits: a Gaussian or a Laplacian of 32 widths,
integrated over unit bins. Symbols are integers from -127 to 127; what lies beyond, or is too rare for its table, is an
escape followed by 16 plain bits.

The coder is range ANS (arXiv 1311.2540, section 2.3) with 32-bit states, 16-bit words and 12-bit frequencies.
"""

from __future__ import annotations

import functools
import hashlib
import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

FREQUENCY_BITS = 12
STATE_FLOOR = 1 << 16  # a state below it takes in a word
ESCAPE = 255
SYMBOL_ZERO = 127  # the symbol that means 0
RAW_BITS = 8  # an escape's value follows as two symbols of equal frequencies
TABLES = 64  # six bits of a channel's table byte; the other two are its predictor
CHANNELS_PER_STREAM = 4
SMALLEST_WIDTH, LARGEST_WIDTH = 0.12, 60.0

_TOTAL = 1 << FREQUENCY_BITS


class RansTables(NamedTuple):
    """Every fixed distribution.

    Attributes:
        frequencies: (TABLES, 256) uint32 of each symbol, summing to 4096; 0 where a symbol needs an escape.
        starts: (TABLES, 256) uint32, the sum of the frequencies before each symbol.
        slots: (TABLES * 4096,) uint32, for each state's low bits the symbol (8 bits), its frequency (12) and how far
            the low bits are behind its start (12).
        costs: (256, TABLES) float64 bits that coding a symbol takes, escapes paid for.
        steps: (256,) float32, the quantisation step that each step byte means, a quarter of an octave apart.
    """

    frequencies: NDArray[np.uint32]
    starts: NDArray[np.uint32]
    slots: NDArray[np.uint32]
    costs: NDArray[np.float64]
    steps: NDArray[np.float32]


@functools.cache
def rans_tables() -> RansTables:
    """Return the tables, made once a process."""
    frequencies = np.stack([_frequencies(table) for table in range(TABLES)])
    starts = np.cumsum(frequencies, axis=1) - frequencies
    symbols = np.stack([np.repeat(np.arange(256), row) for row in frequencies])
    rows = np.arange(TABLES)[:, None]
    behind = np.arange(_TOTAL) - starts[rows, symbols]
    slots = symbols | (frequencies[rows, symbols] << 8) | (behind << 20)
    with np.errstate(divide="ignore"):
        bits = FREQUENCY_BITS - np.log2(frequencies)
    escape = bits[:, ESCAPE:] + 2 * RAW_BITS
    bits = np.where(frequencies > 0, bits, escape)
    bits[:, ESCAPE] = escape[:, 0]
    steps = np.exp2((np.arange(256) - 128) / 4)
    return RansTables(
        frequencies.astype(np.uint32),
        starts.astype(np.uint32),
        slots.reshape(-1).astype(np.uint32),
        bits.T.copy(),
        steps.astype(np.float32),
    )


@functools.cache
def tables_digest() -> str:
    """Return eight hex digits of the tables: they come from floating-point functions that machines may round apart."""
    tables = rans_tables()
    return hashlib.sha256(tables.slots.tobytes() + tables.steps.tobytes()).hexdigest()[:8]


def _frequencies(table: int) -> NDArray[np.int64]:
    """Return (256,) whole frequencies that sum to 4096, at least 1 for the escape."""
    width = SMALLEST_WIDTH * (LARGEST_WIDTH / SMALLEST_WIDTH) ** ((table // 2) / (TABLES // 2 - 1))
    edges = np.arange(ESCAPE + 1) - SYMBOL_ZERO - 0.5
    below = np.array([(_gaussian if table % 2 == 0 else _laplacian)(edge / width) for edge in edges])
    counts = np.rint(np.diff(below) * _TOTAL).astype(np.int64)
    out = np.append(counts, max(1, _TOTAL - int(counts.sum())))
    out[SYMBOL_ZERO] += _TOTAL - int(out.sum())  # the largest bears what rounding left over
    return out


def _gaussian(x: float) -> float:
    return 0.5 * math.erfc(-x / math.sqrt(2))


def _laplacian(x: float) -> float:
    # of unit variance
    tail = 0.5 * math.exp(-math.sqrt(2) * abs(x))
    return tail if x < 0 else 1 - tail
