"""A text as units: sentences or paragraphs, those over the cap in parts. What scored boundaries lie between."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from ragkit.chunking.assembly import Span
from ragkit.chunking.boundaries import Boundary, boundary_offsets
from ragkit.chunking.packing import level_of, pack, piece_level, word_level
from ragkit.chunking.segmenter import RuleSegmenter, SentenceSegmenter
from ragkit.chunking.words import Offsets, WordCounter, Words

# (block, its words, the starts of its stretches) -> starts of the units, which of them open a sentence
_Cut = Callable[[str, Words, list[int]], tuple[list[int], list[bool]]]
# (text, counter, most tokens of a unit, further offsets at which units start, who finds sentences) -> its units
CutUnits = Callable[[str, WordCounter, int, Sequence[int], SentenceSegmenter], "Units"]
_RULES = RuleSegmenter()
_BLOCK = 1 << 20  # code points whose words are held at once


@dataclass(frozen=True, slots=True)
class Units:
    """The units of a text, in order and without gaps.

    Attributes:
        starts: (units + 1,) offset of each unit; the last entry is the length of the text.
        tokens_before: (units,) estimated tokens up to the end of each unit.
        tokens_after: (units,) the same up to its start; `Level` in `ragkit.chunking.packing` says how they differ.
        opens_sentence: (units,) False for the second and later parts of what was over the cap of a unit.
        opens_paragraph: (units,) True where a paragraph starts.
    """

    starts: Offsets
    tokens_before: Offsets
    tokens_after: Offsets
    opens_sentence: NDArray[np.bool_]
    opens_paragraph: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.tokens_before)

    def spans(self, cuts: Offsets, overlap_tokens: int = 0) -> list[Span]:
        """Return the spans of the chunks that open with unit 0 and with each unit of `cuts`.

        With an overlap a chunk reaches back to the first unit within it, but not to where the one before starts.
        """
        if not len(self):
            return []
        opened = np.concatenate([[0], cuts])
        if overlap_tokens and len(cuts):
            earliest = np.searchsorted(self.tokens_after, self.tokens_after[cuts] - overlap_tokens)
            opened[1:] = np.minimum(np.maximum(earliest, opened[:-1] + 1), cuts)
        stops = np.append(self.starts[cuts], self.starts[-1])
        return list(zip(self.starts[opened].tolist(), stops.tolist(), strict=True))

    def texts(self, text: str, start: int, stop: int) -> list[str]:
        """Return the texts of the units `start` to `stop - 1`."""
        edges = self.starts[start : stop + 1].tolist()
        return [text[begin:end] for begin, end in pairwise(edges)]


def sentence_units(
    text: str,
    counter: WordCounter,
    max_tokens: int,
    boundaries: Sequence[int] = (),
    segmenter: SentenceSegmenter = _RULES,
) -> Units:
    """Return the sentences of `text` as units; a sentence over `max_tokens` is cut at lines, words, then graphemes.

    `boundaries` are more offsets at which a unit starts, those of blocks of another kind than sentences.
    """
    sentences = [0, *boundary_offsets(text, Boundary.SENTENCE, segmenter.starts)] if text else []
    if len(boundaries):
        sentences = sorted({*sentences, *(offset for offset in boundaries if 0 < offset < len(text))})

    def inner(sentence: str) -> list[int]:
        return _inner_cuts(sentence, counter, max_tokens)

    return _units(text, sentences, counter, _cutting_large(inner, max_tokens))


def _cutting_large(inner_cuts: Callable[[str], list[int]], max_tokens: int) -> _Cut:
    """Return what keeps the stretches of a block as units, and cuts those over `max_tokens` at their `inner_cuts`."""

    def cut(block: str, words: Words, starts: list[int]) -> tuple[list[int], list[bool]]:
        level = level_of(words, starts)
        sizes = np.asarray(level.tokens_before[1:]) - np.asarray(level.tokens_after[:-1])
        parts: list[int] = []
        opens: list[bool] = []
        for size, (start, stop) in zip(sizes.tolist(), pairwise([*starts, len(block)]), strict=True):
            inner = inner_cuts(block[start:stop]) if size > max_tokens else []
            parts += [start, *(start + offset for offset in inner)]
            opens += [True, *(False for _ in inner)]
        return parts, opens

    return cut


def _inner_cuts(sentence: str, counter: WordCounter, max_tokens: int) -> list[int]:
    words = counter.measure(sentence)
    levels = [level_of(words, boundary_offsets(sentence, Boundary.LINE)), word_level(words), piece_level(words)]
    return [packed.start for packed in pack(levels, max_tokens)][1:]


def paragraph_units(
    text: str,
    counter: WordCounter,
    max_tokens: int,
    boundaries: Sequence[int] = (),
    segmenter: SentenceSegmenter = _RULES,
) -> Units:
    """Return the paragraphs of `text` as units, its lines where it has no blank one.

    A paragraph over `max_tokens` is cut at lines, sentences, words, then graphemes. `boundaries` are where headings
    start, at which a unit starts as well.
    """
    starts = boundary_offsets(text, Boundary.PARAGRAPH) or boundary_offsets(text, Boundary.LINE)
    offsets = sorted({0, *starts, *(offset for offset in boundaries if 0 < offset < len(text))}) if text else []
    kinds = (Boundary.LINE, Boundary.SENTENCE)

    def inner(paragraph: str) -> list[int]:
        words = counter.measure(paragraph)
        levels = [level_of(words, boundary_offsets(paragraph, kind, segmenter.starts)) for kind in kinds]
        return [packed.start for packed in pack([*levels, word_level(words), piece_level(words)], max_tokens)][1:]

    return _units(text, offsets, counter, _cutting_large(inner, max_tokens))


def word_units(
    text: str,
    counter: WordCounter,
    max_tokens: int,
    boundaries: Sequence[int] = (),
    segmenter: SentenceSegmenter = _RULES,
) -> Units:
    """Return the words of `text` as units; those over 32 characters come in pieces. Nothing else is looked at."""
    del max_tokens, boundaries, segmenter
    lines = [0, *boundary_offsets(text, Boundary.LINE)] if text else []

    def cut(_block: str, words: Words, _starts: list[int]) -> tuple[list[int], list[bool]]:
        return words.starts[:-1].tolist(), words.opens_word.tolist()

    return _units(text, lines, counter, cut)


def packed_units(text: str, counter: WordCounter, max_tokens: int, segmenter: SentenceSegmenter = _RULES) -> Units:
    """Return `text` packed up to `max_tokens` as units, cut at paragraphs, else at lines, sentences, words."""
    paragraphs = [0, *boundary_offsets(text, Boundary.PARAGRAPH)] if text else []
    kinds = (Boundary.PARAGRAPH, Boundary.LINE, Boundary.SENTENCE)

    def cut(block: str, words: Words, _: list[int]) -> tuple[list[int], list[bool]]:
        levels = [level_of(words, boundary_offsets(block, kind, segmenter.starts)) for kind in kinds]
        starts = [packed.start for packed in pack([*levels, word_level(words), piece_level(words)], max_tokens)]
        return starts, [True] * len(starts)

    return _units(text, paragraphs, counter, cut)


def _units(text: str, offsets: list[int], counter: WordCounter, cut: _Cut) -> Units:
    """Return the units that `cut` makes of blocks of about a million code points, each of whole stretches."""
    starts: list[int] = []
    before: list[Offsets] = []
    after: list[Offsets] = []
    opens: list[bool] = []
    total = at = 0
    while at < len(offsets):
        stop = max(at + 1, int(np.searchsorted(offsets, offsets[at] + _BLOCK)))
        begin, end = offsets[at], offsets[stop] if stop < len(offsets) else len(text)
        block = text[begin:end]
        words = counter.measure(block)
        parts, part_opens = cut(block, words, [offset - begin for offset in offsets[at:stop]])
        level = level_of(words, parts)
        before.append(np.asarray(level.tokens_before[1:]) + total)
        after.append(np.asarray(level.tokens_after[:-1]) + total)
        starts += [begin + part for part in parts]
        opens += part_opens
        total += int(words.tokens[-1])
        at = stop
    edges = np.asarray([*starts, len(text)], dtype=np.int64)
    return Units(
        starts=edges,
        tokens_before=np.concatenate(before) if before else np.zeros(0, np.int64),
        tokens_after=np.concatenate(after) if after else np.zeros(0, np.int64),
        opens_sentence=np.asarray(opens, dtype=np.bool_),
        opens_paragraph=np.isin(edges[:-1], np.asarray(boundary_offsets(text, Boundary.PARAGRAPH), dtype=np.int64)),
    )
