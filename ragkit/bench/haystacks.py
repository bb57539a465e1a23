"""Documents of a length: pieces of text as long as is wanted, with needles between them.

Pieces of text are tokenised once, each on its own; a document is put together by their counts, so that its length costs
one pass over its text (`fitted` counts the whole of it) however long it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ragkit.errors import UsageError
from ragkit.types import TextTokenizer

NOISE = "The river is wide. The stone is cold. The morning is clear. Off we walk. Home again by dark.\n"

_AIM, _LEAST = 0.997, 0.993  # of the tokens that a document may have: what is aimed at, and what is good enough
_ROUNDS = 4
_SHRUNK = 0.99  # what is left of a haystack whose next smaller piece is looked for


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
