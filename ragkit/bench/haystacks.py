"""What surrounds the needles: running text, lines that say nothing, or whatever a task makes; and how needles go in.

Pieces of text are tokenised once, each on its own; a document is put together by their counts, so that its length costs
one pass over its text (`fitted` counts the whole of it) however long it is.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from ragkit.bench.made_text import made_sentences
from ragkit.chunking.sentences import sentence_spans
from ragkit.errors import UsageError
from ragkit.types import TextTokenizer

NOISE = "The river is wide. The stone is cold. The morning is clear. Off we walk. Home again by dark.\n"

_AIM, _LEAST = 0.997, 0.993  # of the tokens that a document may have: what is aimed at, and what is good enough
_ROUNDS = 4
_SHRUNK = 0.99  # what is left of a haystack whose next smaller piece is looked for
_OWN_SENTENCES = 2000  # of made text, within which documents begin where there is no other
_BATCH = 2048  # pieces tokenised at once
_SEARCHED = 200  # pieces among which the last one of a document is looked for


class TooShortError(UsageError):
    """Nothing fits into a document of so few tokens."""


@dataclass(frozen=True, slots=True)
class Pieces:
    """Pieces of text that follow each other, and the tokens of each."""

    texts: Sequence[str]
    counts: Sequence[float]


class Haystack(Protocol):
    """Gives as much text as is wanted."""

    def take(self, tokens: float) -> Pieces:
        """Return pieces of at most `tokens` tokens, and nearly as many."""
        ...


class Prose:
    """Running text in sentences: a finite part within which documents begin, and one without end behind it.

    Args:
        sentences: the finite part, each sentence with the white space before it.
        beyond: what follows when all of it is used up; its sentences are drawn as they are needed, and kept.
        tokenizer: counts.

    Attributes:
        own_tokens: of the finite part.
    """

    def __init__(self, sentences: Sequence[str], beyond: Iterator[str], tokenizer: TextTokenizer) -> None:
        self._texts = list(sentences)
        self._counts = _counted(self._texts, tokenizer)
        self._size = len(self._texts)
        self._beyond = beyond
        self._tokenizer = tokenizer
        self.own_tokens = int(sum(self._counts))

    def starting_at(self, place: float) -> Haystack:
        """Return the text from `place`, a share of the finite part, on; what stands before it follows at its end."""
        return _ProseFrom(self, int(place * self._size))

    def first(self, tokens: float, start: int) -> Pieces:
        """Return what `Haystack.take` returns, from sentence `start` on."""
        while True:
            own = np.concatenate([np.arange(start, self._size), np.arange(start)])
            order = np.concatenate([own, np.arange(self._size, len(self._texts))])
            counts = np.asarray(self._counts)[order]
            whole = int(np.searchsorted(np.cumsum(counts), tokens, side="right"))
            if whole + _SEARCHED <= len(order):  # what is looked at must not depend on what was drawn before
                break
            self._draw()
        chosen = list(order[:whole])
        rest = tokens - float(counts[:whole].sum())
        following = counts[whole : whole + _SEARCHED]
        if len(following) and following.min() <= rest:  # the sentence that fills the rest best, instead of the next
            chosen.append(order[whole + int(np.where(following <= rest, following, 0).argmax())])
        return Pieces([self._texts[at] for at in chosen], [self._counts[at] for at in chosen])

    def _draw(self) -> None:
        texts = list(itertools.islice(self._beyond, _BATCH))
        self._texts += texts
        self._counts += _counted(texts, self._tokenizer)


@dataclass(frozen=True, slots=True)
class _ProseFrom:
    prose: Prose
    start: int

    def take(self, tokens: float) -> Pieces:
        return self.prose.first(tokens, self.start)


@dataclass(frozen=True, slots=True)
class NoiseLines:
    """One line again and again."""

    tokens_a_line: float

    def take(self, tokens: float) -> Pieces:
        """Return what `Haystack.take` says."""
        lines = int(tokens / self.tokens_a_line)
        return Pieces([NOISE] * lines, [self.tokens_a_line] * lines)


@dataclass(frozen=True, slots=True)
class Needle:
    """A text that goes into a haystack; `depth` is its place as a share of the haystack's tokens."""

    text: str
    depth: float


@dataclass(frozen=True, slots=True)
class Draft:
    """A document, and where each needle begins in it, in the order in which they were given."""

    text: str
    starts: tuple[int, ...]


def insert(pieces: Pieces, needles: Sequence[Needle], *, before: str, after: str) -> Draft:
    """Return the pieces as one text with `needles` between them, each with `before` and `after` around it.

    White space at the very beginning falls away.
    """
    edges = np.concatenate([[0.0], np.cumsum(pieces.counts)]) if len(pieces.counts) else np.zeros(1)
    wanted = np.asarray([needle.depth for needle in needles]) * edges[-1]
    after_edge = np.searchsorted(edges, wanted)
    previous = np.maximum(after_edge - 1, 0)
    following = np.minimum(after_edge, len(edges) - 1)
    places = np.where(wanted - edges[previous] <= edges[following] - wanted, previous, following)
    parts: list[str] = []
    starts = [0] * len(needles)
    size = position = 0
    for at in sorted(range(len(needles)), key=lambda at: int(places[at])):
        for text in (*pieces.texts[position : places[at]], before):
            parts.append(text if size else text.lstrip())
            size += len(parts[-1])
        position = int(places[at])
        starts[at] = size
        parts += [needles[at].text, after]
        size += len(needles[at].text) + len(after)
    rest = "".join(pieces.texts[position:])
    parts.append(rest if size else rest.lstrip())
    return Draft("".join(parts), tuple(starts))


def fitted(
    assemble: Callable[[float], Draft], room: int, tokenizer: TextTokenizer, fixed: float = 0
) -> tuple[Draft, int]:
    """Return the draft that fills `room` tokens best, and its tokens: at most `room`, and nearly as many.

    Args:
        assemble: gives a document around so many tokens of haystack.
        room: most tokens.
        tokenizer: counts the whole document, at most four times.
        fixed: tokens that stand in the document besides the haystack.

    Raises:
        TooShortError: even the least document is too long.
    """
    wanted = _AIM * room - fixed
    best: tuple[Draft, int] | None = None
    counted: dict[str, int] = {}
    while True:
        draft = assemble(max(0.0, wanted))
        is_new = draft.text not in counted
        if is_new:
            if len(counted) == _ROUNDS:
                break
            counted[draft.text] = tokenizer.count_batch([draft.text])[0]
        tokens = counted[draft.text]
        if tokens <= room and (best is None or tokens > best[1]):
            best = draft, tokens
        if _LEAST * room <= tokens <= room or (not is_new and tokens <= room) or (wanted <= 0 and tokens > room):
            break
        if is_new:  # pieces tokenise another way beside each other than apart: by so much the estimate was wrong
            wanted *= max(0.0, _AIM * room - fixed) / max(1.0, tokens - fixed)
        else:  # the same large pieces again
            wanted = _SHRUNK * wanted - 1
    if best is None:
        raise TooShortError(f"a document of {room:,} tokens has no room for what the task puts into it")
    return best


def read_prose(data: Path | None, tokenizer: TextTokenizer) -> Prose:
    """Return the essays of `data` (needle/PaulGrahamEssays/*.txt), other prose there behind them, then made text.

    Raises:
        UsageError: a file cannot be read as what it should be.
    """
    made = made_sentences(0)
    essays = sorted((data / "needle" / "PaulGrahamEssays").glob("*.txt")) if data is not None else []
    if data is None or not essays:
        return Prose(list(itertools.islice(made, _OWN_SENTENCES)), made, tokenizer)
    try:
        texts = [path.read_text(encoding="utf-8") for path in essays]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{essays[0].parent} does not hold the essays as published: {error}") from error
    return Prose(list(_sentences(texts)), itertools.chain(_sentences(_other_prose(data)), made), tokenizer)


def _other_prose(data: Path) -> Iterator[str]:
    """Yield the paragraphs of Emma and the passages of 2WikiMultihopQA, where `data` holds them."""
    try:
        for path in sorted((data / "emma").glob("*Paragraph.jsonl")):
            yield from (json.loads(line)["Chunk"] for line in path.read_text(encoding="utf-8").splitlines())
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} does not hold a novel's paragraphs: {type(error).__name__}: {error}") from error
    yield from wiki_passages(data)


def wiki_passages(data: Path) -> Iterator[str]:
    """Yield the passages of 2WikiMultihopQA's corpus (wiki2_corpus/*.json), where `data` holds them.

    Raises:
        UsageError: a file is not as published.
    """
    try:
        for path in sorted((data / "wiki2_corpus").glob("*.json")):
            yield from (passage["text"] for passage in json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} does not hold passages as published: {type(error).__name__}: {error}") from error


def _sentences(texts: Sequence[str] | Iterator[str]) -> Iterator[str]:
    """Yield sentences on one line each, with an empty line before the first of a paragraph, else a space."""
    for text in texts:
        before = "\n\n"
        for start, stop in sentence_spans(text):
            sentence = text[start:stop]
            line = " ".join(sentence.split())
            if line:
                yield before + line
                before = " "
            if sentence[len(sentence.rstrip()) :].count("\n") > 1:
                before = "\n\n"


def _counted(texts: Sequence[str], tokenizer: TextTokenizer) -> list[float]:
    return [float(count) for count in tokenizer.count_batch(texts)] if texts else []
