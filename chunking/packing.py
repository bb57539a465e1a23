"""Greedy packing: chunks as long as the cap allows, each cut at the strongest boundary within reach.

The counts are estimates (`ragkit.chunking.words`); `ragkit.chunking.assembly` takes the true ones afterwards.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ragkit.chunking.words import Offsets, Words


class Cut(NamedTuple):
    """A place to cut: the estimated tokens up to it when a chunk stops there, and when one starts there.

    The two differ where a cut goes through a piece: the space before a word stays with the sentence before it.
    """

    offset: int
    tokens_before: int
    tokens_after: int


class Packed(NamedTuple):
    """One chunk's span; `reach` is how far the text had to be known to choose it, past the end for the last one."""

    start: int
    stop: int
    reach: int


@dataclass(frozen=True, slots=True)
class Level:
    """The cuts of one kind of boundary, as three ascending columns; the last cut is the end of the text."""

    offsets: list[int]
    tokens_before: list[int]
    tokens_after: list[int]

    def cut(self, index: int) -> Cut:
        """Return one row."""
        return Cut(self.offsets[index], self.tokens_before[index], self.tokens_after[index])


def level_of(words: Words, offsets: Sequence[int] | Offsets) -> Level:
    """Return the level that cuts at `offsets` (ascending) and at the end of the text."""
    cuts = np.append(np.asarray(offsets, dtype=np.int64), words.starts[-1])
    piece = np.searchsorted(words.starts, cuts, side="right") - 1
    after = words.tokens[piece]
    # A cut through a piece leaves white space before it, of a token a character at most.
    before = np.minimum(after + cuts - words.starts[piece], words.tokens[np.minimum(piece + 1, len(words.tokens) - 1)])
    return Level(cuts.tolist(), before.tolist(), after.tolist())


def word_level(words: Words) -> Level:
    """Return the level that cuts before every word."""
    return level_of(words, words.starts[:-1][words.opens_word][1:])


def piece_level(words: Words) -> Level:
    """Return the level that cuts before every piece, those of long words included."""
    return level_of(words, words.starts[1:-1])


def pack(levels: Sequence[Level], max_tokens: int, overlap_tokens: int = 0, covered: int = 0) -> Iterator[Packed]:
    """Yield chunk after chunk, from the start of the text to its end.

    A chunk stops at the last cut within the cap, of the first level that has one; if none has, at the next cut of
    the last level, over the cap. With an overlap, the next chunk starts at a cut within `overlap_tokens` before
    that. `covered` says up to where the text belongs to an earlier chunk already.
    """
    finest = levels[-1]
    start = Cut(0, 0, 0)
    done = _next_cut(finest, covered - 1) if covered else start
    while done.offset < finest.offsets[-1]:
        limit = start.tokens_after + max_tokens
        stop = _last_cut(levels, done.offset, limit)
        if stop is None and start.offset < done.offset:  # no room for anything new behind the overlap
            start = done
            continue
        if stop is None:
            stop = _next_cut(finest, done.offset)
        beyond = bisect_right(finest.tokens_before, limit)
        reach = finest.offsets[beyond] if beyond < len(finest.offsets) else finest.offsets[-1] + 1
        yield Packed(start.offset, stop.offset, reach)
        start = _overlapping(levels, start, stop, overlap_tokens) if overlap_tokens else stop
        done = stop


def _last_cut(levels: Sequence[Level], above: int, limit: int) -> Cut | None:
    for level in levels:
        index = bisect_right(level.tokens_before, limit) - 1
        if index >= 0 and level.offsets[index] > above:
            return level.cut(index)
    return None


def _next_cut(level: Level, above: int) -> Cut:
    return level.cut(bisect_right(level.offsets, above))


def _overlapping(levels: Sequence[Level], start: Cut, stop: Cut, overlap_tokens: int) -> Cut:
    """Return where the chunk after `stop` starts: at the strongest cut that makes at least half the overlap."""
    for level in levels:
        index = bisect_left(level.tokens_after, stop.tokens_before - overlap_tokens)
        index = max(index, bisect_right(level.offsets, start.offset))
        if level.offsets[index] < stop.offset:
            cut = level.cut(index)
            if level is levels[-1] or 2 * (stop.tokens_before - cut.tokens_after) >= overlap_tokens:
                return cut
    return stop
