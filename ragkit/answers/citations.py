"""From retrieved chunks to quotes: the few sentences that support the answer, with exact offsets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ragkit.answers.base import RankedChunk
from ragkit.answers.evidence import Evidence, Sentence, gather_evidence, support_probabilities
from ragkit.answers.narrowing import narrowed
from ragkit.config import AnswerConfig
from ragkit.retrieval.base import Embedder
from ragkit.types import Citation

PageLookup = Callable[[str, int], int | None]

_SAME_WORDS = 0.9  # share of common content words from which two sentences say the same


@dataclass(frozen=True, slots=True)
class _Quote:
    hit: int
    start: int
    stop: int
    score: float


def cite(
    question: str,
    answer: str | None,
    hits: Sequence[RankedChunk],
    embedder: Embedder,
    config: AnswerConfig,
    page_at: PageLookup | None = None,
) -> tuple[Citation, ...]:
    """Return the spans that support the answer, best first.

    Sentences are taken until one of them holds the answer with probability `config.citation_mass`, at most
    `config.max_citations`. One longer than `config.max_quote_chars` is narrowed around its support; neighbours are
    merged where they fit together; sentences that say the same are cited once.

    Args:
        question: what was asked.
        answer: the generated text, or None.
        hits: the retrieved chunks, best first.
        embedder: the one that the chunks were embedded with.
        config: limits.
        page_at: page of (doc_id, char_start); each chunk's first page where left out.
    """
    evidence = gather_evidence(question, answer, hits)
    probabilities = support_probabilities(question, evidence, embedder)
    chosen: list[int] = []
    quotes: list[_Quote] = []
    mass = 0.0
    for index in np.argsort(-probabilities, kind="stable").tolist():
        if mass >= config.citation_mass or probabilities[index] <= 0:
            break
        mass += float(probabilities[index])
        sentence = evidence.sentences[index]
        if any(_says_the_same(sentence, evidence.sentences[other], hits) for other in chosen):
            continue
        quote = _quote(sentence, float(probabilities[index]), evidence, config.max_quote_chars)
        quotes = _merged(quotes, quote, hits, config.max_quote_chars)
        if len(quotes) > config.max_citations:
            quotes.pop()
            break
        chosen.append(index)
    quotes.sort(key=lambda quote: -quote.score)
    return tuple(_citation(quote, hits[quote.hit], page_at) for quote in quotes)


def _quote(sentence: Sentence, score: float, evidence: Evidence, max_chars: int) -> _Quote:
    start, stop = narrowed(sentence.text, sentence.terms, evidence.weights, max_chars)
    return _Quote(sentence.hit, sentence.char_start + start, sentence.char_start + stop, score)


def _merged(quotes: list[_Quote], new: _Quote, hits: Sequence[RankedChunk], max_chars: int) -> list[_Quote]:
    """Return `quotes` with `new`, put together with a neighbour of the same chunk where both fit into one quote."""
    for place, quote in enumerate(quotes):
        first, second = sorted((quote, new), key=lambda one: one.start)
        chunk = hits[quote.hit].chunk
        between = chunk.text[max(0, first.stop - chunk.char_start) : second.start - chunk.char_start]
        if quote.hit == new.hit and not between.strip() and second.stop - first.start <= max_chars:
            joined = replace(first, stop=second.stop, score=first.score + second.score)
            return _merged(quotes[:place] + quotes[place + 1 :], joined, hits, max_chars)
    return [*quotes, new]


def _says_the_same(one: Sentence, other: Sentence, hits: Sequence[RankedChunk]) -> bool:
    same_document = hits[one.hit].chunk.doc_id == hits[other.hit].chunk.doc_id
    if same_document and one.char_start < other.char_stop and other.char_start < one.char_stop:
        return True
    mine, theirs = ({term.stem for term in sentence.terms} for sentence in (one, other))
    if not mine or not theirs:
        return one.text == other.text
    return len(mine & theirs) >= _SAME_WORDS * len(mine | theirs)


def _citation(quote: _Quote, hit: RankedChunk, page_at: PageLookup | None) -> Citation:
    chunk = hit.chunk
    return Citation(
        doc_id=chunk.doc_id,
        uri=hit.uri,
        page=chunk.page if page_at is None else page_at(chunk.doc_id, quote.start),
        char_start=quote.start,
        char_stop=quote.stop,
        quote=chunk.text[quote.start - chunk.char_start : quote.stop - chunk.char_start],
        score=quote.score,
    )
