"""The chunker behind `token`, `sentence` and `recursive`: they differ in the boundaries that they cut at."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence

from ragkit.chunking.assembly import Assembler, Span
from ragkit.chunking.boundaries import Boundary, boundary_offsets
from ragkit.chunking.packing import Level, level_of, pack, piece_level, word_level
from ragkit.chunking.segmenter import RuleSegmenter, SentenceSegmenter
from ragkit.chunking.words import WordCounter, Words
from ragkit.types import Chunk, Document, TextTokenizer

_RULES_VERSION = 1  # raised when the cuts change
_WINDOW = 1 << 20  # code points worked on at once: bounds the memory
_SETTLED = 512  # a boundary this close to the end of a window may depend on what follows


class PackedChunker:
    """Packs text greedily up to the cap and cuts at the strongest of its boundaries that lies within.

    A text is worked on in windows of about a million code points, each starting where the last settled chunk
    stopped, so memory does not grow with the text beyond the chunks themselves. Each code point is tokenised once
    for its chunk's count, unless the tokenizer's words add up, and where its word was not seen before, once for the
    estimate.
    """

    def __init__(
        self,
        name: str,
        boundaries: Sequence[Boundary],
        tokenizer: TextTokenizer,
        max_tokens: int,
        overlap_tokens: int = 0,
        window: int = _WINDOW,
        segmenter: SentenceSegmenter | None = None,
    ) -> None:
        self._name = name
        self._boundaries = tuple(boundaries)
        self._max_tokens = max_tokens
        self._overlap_tokens = overlap_tokens
        self._window = window
        self._segmenter = segmenter or RuleSegmenter()
        self._counter = WordCounter(tokenizer)
        self._assembler = Assembler(tokenizer, self._counter, max_tokens)
        rules = [name, _RULES_VERSION, max_tokens, overlap_tokens, window, tokenizer.tokenizer_id]
        if self._segmenter.fingerprint:
            rules.append(self._segmenter.fingerprint)
        self._fingerprint = hashlib.sha256(json.dumps(rules).encode()).hexdigest()

    @property
    def name(self) -> str:
        """The name that `--chunker` takes."""
        return self._name

    @property
    def fingerprint(self) -> str:
        """Hex digest of everything that changes the cuts, the tokenizer included."""
        return self._fingerprint

    def chunk(self, document: Document) -> list[Chunk]:
        """Return the chunks of `document`, in order.

        Raises:
            ChunkingError: a single code point has more tokens than the cap.
        """
        return list(self.iter_chunks(document))

    def iter_chunks(self, document: Document) -> Iterator[Chunk]:
        """Yield the chunks of `document` one window at a time, for texts whose chunks should not all be held."""
        covered = index = 0
        for spans, known in self._windows(document.text):
            counted = self._assembler.counted(document, spans, covered, known)
            yield from self._assembler.chunks(document, counted, index)
            covered = spans[-1][1]
            index += len(counted)

    def _windows(self, text: str) -> Iterator[tuple[list[Span], list[int | None]]]:
        """Yield the spans of window after window, and their tokens where the words tell them exactly."""
        begin = covered = 0
        size = self._window
        while covered < len(text):
            window = text[begin : begin + size]
            last = begin + len(window) == len(text)
            settled = len(window) + 1 if last else len(window) - _SETTLED
            words = self._counter.measure(window)
            spans: list[Span] = []
            first = begin
            for start, stop, reach in pack(
                self._levels(window, words), self._max_tokens, self._overlap_tokens, covered - begin
            ):
                if reach > settled:
                    begin += start
                    break
                spans.append((start, stop))
            if spans:
                covered = first + spans[-1][1]
                size = self._window
                known = words.true_counts(window, spans)
                yield [(first + start, first + stop) for start, stop in spans], known
            else:
                size *= 2  # not one chunk fits in: the cap is large

    def _levels(self, text: str, words: Words) -> list[Level]:
        levels = [
            word_level(words)
            if kind is Boundary.WORD
            else level_of(words, boundary_offsets(text, kind, self._segmenter.starts))
            for kind in self._boundaries
        ]
        return [*levels, piece_level(words)]
