"""Chunks under a cap of characters: packing that looks at no words and tokenises nothing.

Under a cap of tokens every word has to be counted. A cap of characters needs only the places to cut: paragraphs and
lines are found in one scan, sentences and words only where nothing stronger lies in reach of a chunk's end.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence

from ragkit.chunking.assembly import Assembler, Span
from ragkit.chunking.boundaries import Boundary, boundary_offsets
from ragkit.chunking.graphemes import grapheme_runs
from ragkit.chunking.segmenter import RuleSegmenter, SentenceSegmenter
from ragkit.chunking.words import WordCounter, word_starts
from ragkit.types import Chunk, Document

_RULES_VERSION = 2  # raised when the cuts change
_NEAR = 192  # characters before the cap, the segmenter's context aside, in which a sentence is looked for first
_UNSURE = 60  # of these, the first ones: what stands before them is not seen, and tells a title or an abbreviation
_CLUSTER = 64  # a grapheme cluster longer than this may be cut


class CharacterTokenizer:
    """A `TextTokenizer` whose tokens are code points: with it a cap counts characters."""

    tokenizer_id = "characters-1"

    def encode(self, text: str) -> list[int]:
        """Return the code points of `text`."""
        return list(map(ord, text))

    def count_batch(self, texts: Sequence[str]) -> list[int]:
        """Return the length of each text."""
        return list(map(len, texts))

    def offsets(self, text: str) -> list[tuple[int, int]]:
        """Return the span of each code point."""
        return [(at, at + 1) for at in range(len(text))]

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of code points."""
        return "".join(map(chr, token_ids))


class CharacterChunker:
    """Packs text up to a cap of characters and cuts at the strongest of its boundaries that lies within.

    Args:
        name: the name that `--chunker` takes.
        kinds: boundaries, strongest first.
        max_characters, overlap_characters: the cap, and how much of a chunk the next one repeats at most.
        segmenter: who finds sentences; the rules where it is left out.
    """

    def __init__(
        self,
        name: str,
        kinds: Sequence[Boundary],
        max_characters: int,
        overlap_characters: int = 0,
        segmenter: SentenceSegmenter | None = None,
    ) -> None:
        self._name = name
        self._kinds = tuple(kinds)
        self._cap = max_characters
        self._overlap = overlap_characters
        self._segmenter = segmenter or RuleSegmenter()
        tokenizer = CharacterTokenizer()
        self._assembler = Assembler(tokenizer, WordCounter(tokenizer), max_characters)
        rules = [name, "characters", _RULES_VERSION, max_characters, overlap_characters, self._segmenter.fingerprint]
        self._fingerprint = hashlib.sha256(json.dumps(rules).encode()).hexdigest()

    @property
    def name(self) -> str:
        """The name that `--chunker` takes."""
        return self._name

    @property
    def fingerprint(self) -> str:
        """Hex digest of everything that changes the cuts."""
        return self._fingerprint

    def chunk(self, document: Document) -> list[Chunk]:
        """Return the chunks of `document`, in order; none is over the cap."""
        spans = [(start, stop, stop - start) for start, stop in self._spans(document.text)]
        return list(self._assembler.chunks(document, spans))

    def _spans(self, text: str) -> Iterator[Span]:
        known = {kind: boundary_offsets(text, kind) for kind in self._kinds if kind in _SCANNED}
        start = done = 0
        while start < len(text):
            limit = start + self._cap
            if limit >= len(text):
                yield start, len(text)
                return
            stop = self._cut(text, known, start, done, limit)
            if stop is None:  # no room for anything new behind the overlap
                start = done
                continue
            yield start, stop
            start, done = self._next_start(text, known, start, stop), stop

    def _cut(self, text: str, known: dict[Boundary, list[int]], start: int, done: int, limit: int) -> int | None:
        """Return the last place to cut in (done, limit], of the first kind that has one."""
        for kind in self._kinds:
            offsets = known.get(kind)
            if offsets is None:
                found = self._last_local(text, kind, max(start, done), limit)
                if found is not None:
                    return found
            else:
                index = bisect_right(offsets, limit) - 1
                if index >= 0 and offsets[index] > done:
                    return offsets[index]
        if start < done:
            return None
        return start + _inside_word(text[start : limit + _CLUSTER], self._cap)

    def _last_local(self, text: str, kind: Boundary, above: int, limit: int) -> int | None:
        """Return the last sentence or word that opens in (above, limit], looked for near the limit first."""
        near = limit - _NEAR - self._segmenter.context
        if near - _UNSURE > above:
            found = self._local(text, kind, near, limit)
            if found and found[-1] > near + _UNSURE:
                return found[-1]
        found = self._local(text, kind, above, limit)
        return found[-1] if found else None

    def _local(self, text: str, kind: Boundary, start: int, limit: int) -> list[int]:
        """Return the sentences or words that open in (start, limit], found in this stretch alone."""
        stretch = text[start : limit + self._segmenter.context]
        if kind is Boundary.WORD:
            found = word_starts(stretch[: limit - start + 2])
        else:
            found = boundary_offsets(stretch, kind, self._segmenter.starts)
        return [start + offset for offset in found if 0 < offset <= limit - start]

    def _next_start(self, text: str, known: dict[Boundary, list[int]], start: int, stop: int) -> int:
        """Return where the chunk after `stop` starts: at the strongest cut that makes at least half the overlap."""
        first = max(start + 1, stop - self._overlap)
        if not self._overlap or first >= stop:
            return stop
        for kind in self._kinds:
            found = known[kind] if kind in known else self._local(text, kind, start, stop - 1)
            index = bisect_left(found, first)
            if index < len(found) and found[index] < stop and 2 * (stop - found[index]) >= self._overlap:
                return found[index]
        return stop


_SCANNED = (Boundary.PARAGRAPH, Boundary.LINE)


def _inside_word(stretch: str, cap: int) -> int:
    """Return how much of a word to take: whole grapheme clusters up to `cap`, code points where one is longer."""
    taken = 0
    for cluster in grapheme_runs(stretch, 1):
        if taken + len(cluster) > cap:
            break
        taken += len(cluster)
    return taken or cap
