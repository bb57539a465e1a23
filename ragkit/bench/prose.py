"""Running text as a haystack: public essays, other prose behind them, and made text where all of it ends."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ragkit.bench.drawn_texts import DrawnTexts
from ragkit.bench.haystacks import Haystack, Pieces
from ragkit.bench.made_text import made_sentences
from ragkit.chunking.sentences import sentence_spans
from ragkit.errors import UsageError
from ragkit.types import TextTokenizer

_OWN_SENTENCES = 2000  # of made text, within which documents begin where there is no other
_BATCH = 2048  # pieces tokenised at once
_SEARCHED = 200  # pieces among which the last one of a document is looked for


class Prose:
    """Running text in sentences: a finite part within which documents begin, and one without end behind it.

    Threads may take text at the same time; what they get does not depend on each other.

    Args:
        sentences: the finite part, each sentence with the white space before it.
        beyond: what follows when all of it is used up; its sentences are drawn as they are needed, and kept.
        tokenizer: counts.

    Attributes:
        own_tokens: of the finite part.
    """

    def __init__(self, sentences: Sequence[str], beyond: Iterator[str], tokenizer: TextTokenizer) -> None:
        self._drawn = DrawnTexts(sentences, beyond, tokenizer.count_batch, _BATCH)
        self._size = len(self._drawn.texts)
        self.own_tokens = int(sum(self._drawn.counts))

    def starting_at(self, place: float) -> Haystack:
        """Return the text from `place`, a share of the finite part, on; what stands before it follows at its end."""
        return _ProseFrom(self, int(place * self._size))

    def first(self, tokens: float, start: int) -> Pieces:
        """Return what `Haystack.take` returns, from sentence `start` on."""
        own = np.concatenate([np.arange(start, self._size), np.arange(start)])
        while True:
            there = len(self._drawn.texts)  # another thread may draw more meanwhile
            order = np.concatenate([own, np.arange(self._size, there)])
            counts = np.asarray(self._drawn.counts[:there])[order]
            whole = int(np.searchsorted(np.cumsum(counts), tokens, side="right"))
            if whole + _SEARCHED <= len(order):  # what is looked at must not depend on what was drawn before
                break
            self._drawn.draw(there + 1)
        chosen = list(order[:whole])
        rest = tokens - float(counts[:whole].sum())
        following = counts[whole : whole + _SEARCHED]
        if len(following) and following.min() <= rest:  # the sentence that fills the rest best, instead of the next
            chosen.append(order[whole + int(np.where(following <= rest, following, 0).argmax())])
        return Pieces([self._drawn.texts[at] for at in chosen], [self._drawn.counts[at] for at in chosen])


@dataclass(frozen=True, slots=True)
class _ProseFrom:
    prose: Prose
    start: int

    def take(self, tokens: float) -> Pieces:
        return self.prose.first(tokens, self.start)


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
