"""From proposed spans to chunks: every chunk's tokens are counted as they are, and the cap holds without exception."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence

from ragkit.chunking.boundaries import Boundary, boundary_offsets
from ragkit.chunking.packing import level_of, pack, piece_level, word_level
from ragkit.chunking.words import WordCounter, Words
from ragkit.errors import ChunkingError
from ragkit.types import Chunk, Document, TextTokenizer, chunk_id_of

logger = logging.getLogger(__name__)

Span = tuple[int, int]
CountedSpan = tuple[int, int, int]


class Assembler:
    """Turns spans that cover a text into chunks under a hard cap.

    Every chunker ends here, whatever it cuts by: spans over the cap are cut again at sentences, words, grapheme
    clusters and, for a single cluster over the cap, code points (logged).
    """

    def __init__(self, tokenizer: TextTokenizer, counter: WordCounter, max_tokens: int) -> None:
        self._tokenizer = tokenizer
        self._counter = counter
        self._max_tokens = max_tokens
        self._broken: list[int] = []  # starts of the grapheme clusters that had to be cut

    def counted(
        self, document: Document, spans: Sequence[Span], covered: int = 0, known: Sequence[int | None] = ()
    ) -> list[CountedSpan]:
        """Return (start, stop, tokens) spans under the cap that cover what `spans` cover, in order.

        Args:
            document: whose text the spans are offsets of.
            spans: ascending spans that go on from `covered` without gaps; they may overlap the one before.
            covered: up to where the text belongs to an earlier chunk.
            known: the tokens of each span where the words told them exactly, None where they did not.

        Raises:
            ChunkingError: one code point alone has more tokens than the cap.
        """
        counts = self._true_counts(document.text, spans, known)
        result: list[CountedSpan] = []
        self._broken = []
        for (start, stop), count in zip(spans, counts, strict=True):
            # Where the span before was cut again, its last part may start where this one's overlap does.
            repeats = bool(result) and start <= result[-1][0]
            if count <= self._max_tokens and not repeats:
                result.append((start, stop, count))
            else:
                result += self._under_cap(document, max(start, covered), stop)
            covered = stop
        if self._broken:
            logger.warning(
                "%s: %d characters have more than %d tokens and were cut inside, the first at %d",
                *(document.uri, len(self._broken), self._max_tokens, min(self._broken)),
            )
        return result

    def chunks(self, document: Document, spans: Iterable[CountedSpan], first_index: int = 0) -> Iterator[Chunk]:
        """Yield the chunks of counted spans, numbered from `first_index`."""
        for index, (start, stop, count) in enumerate(spans, first_index):
            yield Chunk(
                chunk_id=chunk_id_of(document.doc_id, start, stop),
                doc_id=document.doc_id,
                index=index,
                text=document.text[start:stop],
                char_start=start,
                char_stop=stop,
                token_count=count,
                page=document.page_at(start),
            )

    def _true_counts(self, text: str, spans: Sequence[Span], known: Sequence[int | None]) -> list[int]:
        unknown = [span for span, count in zip(spans, known, strict=True) if count is None] if known else spans
        counted = iter(self._counts(text, unknown))
        return [next(counted) if count is None else count for count in known] if known else list(counted)

    def _counts(self, text: str, spans: Sequence[Span]) -> list[int]:
        return self._tokenizer.count_batch([text[start:stop] for start, stop in spans])

    def _under_cap(self, document: Document, start: int, stop: int) -> list[CountedSpan]:
        spans: list[Span] = [(start, stop)]
        while True:
            counts = self._counts(document.text, spans)
            if max(counts) <= self._max_tokens:
                return [(*span, count) for span, count in zip(spans, counts, strict=True)]
            spans = [
                part
                for span, count in zip(spans, counts, strict=True)
                for part in ([span] if count <= self._max_tokens else self._cut(document, span, count))
            ]

    def _cut(self, document: Document, span: Span, count: int) -> list[Span]:
        """Return two or more parts of a span that is over the cap."""
        start, stop = span
        text = document.text[start:stop]
        for measure in (self._counter.measure, self._counter.measure_graphemes, self._counter.measure_code_points):
            words = measure(text)
            if len(words.starts) > 2:
                if measure == self._counter.measure_code_points:
                    self._broken.append(start)
                parts = _parts(text, words, self._max_tokens)
                return [(start + part_start, start + part_stop) for part_start, part_stop in parts]
        raise ChunkingError(
            f"{document.uri}: the character {text!r} at {start} alone has {count} tokens, the cap is "
            f"{self._max_tokens}; raise chunking.max_tokens to at least {count}"
        )


def _parts(text: str, words: Words, max_tokens: int) -> list[Span]:
    estimate = int(words.tokens[-1])
    # An estimate near the cap was wrong by a little: two halves. One far above it can be packed as it stands.
    target = max_tokens if 2 * estimate > 3 * max_tokens else max(1, (estimate * 3 + 4) // 5)
    levels = [level_of(words, boundary_offsets(text, Boundary.SENTENCE)), word_level(words), piece_level(words)]
    parts = [(start, stop) for start, stop, _ in pack(levels, target)]
    if len(parts) > 1:
        return parts
    middle = int(words.starts[len(words.starts) // 2])
    return [(0, middle), (middle, len(text))]
