"""Sentence vectors as a stream: every unit embedded once, in batches that run across texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ragkit.chunking.units import Units
from ragkit.errors import ChunkingError

Vectors = NDArray[np.float32]

_BATCH = 512  # units embedded at once


class SentenceEmbedder(Protocol):
    """What semantic chunkers need from an embedder."""

    @property
    def embedder_id(self) -> str:
        """Changes with everything that changes the vectors."""
        ...

    def encode(self, texts: Sequence[str]) -> Vectors:
        """Return (texts, dim) rows of unit length."""
        ...


class VectorStream:
    """The vectors of the units of some texts, in order, each unit embedded once and none kept."""

    def __init__(
        self, embedder: SentenceEmbedder, texts: Sequence[str], units: Sequence[Units], batch: int = _BATCH
    ) -> None:
        self._batches = _batches(embedder, texts, units, batch)
        self._left: Vectors = np.zeros((0, 0), np.float32)

    def take(self, count: int) -> Iterator[Vectors]:
        """Yield the next `count` vectors in pieces of (some, dim)."""
        while count:
            if not len(self._left):
                self._left = next(self._batches)
            piece, self._left = self._left[:count], self._left[count:]
            count -= len(piece)
            yield piece


def _batches(embedder: SentenceEmbedder, texts: Sequence[str], units: Sequence[Units], batch: int) -> Iterator[Vectors]:
    waiting: list[str] = []
    for text, some in zip(texts, units, strict=True):
        at = 0
        while at < len(some):
            stop = min(len(some), at + batch - len(waiting))
            waiting += some.texts(text, at, stop)
            at = stop
            if len(waiting) == batch:
                yield _embedded(embedder, waiting)
                waiting = []
    if waiting:
        yield _embedded(embedder, waiting)


def _embedded(embedder: SentenceEmbedder, texts: list[str]) -> Vectors:
    vectors = np.asarray(embedder.encode(texts), dtype=np.float32)
    if vectors.ndim != 2 or len(vectors) != len(texts):
        raise ChunkingError(
            f"embedder {embedder.embedder_id} returned an array of shape {vectors.shape} for {len(texts)} sentences"
        )
    finite = np.isfinite(vectors).all(axis=1)
    if not finite.all():
        text = texts[int(finite.argmin())]
        raise ChunkingError(
            f"embedder {embedder.embedder_id} returned a vector that is not finite for the sentence {text[:80]!r}; "
            "use another embedder or a chunker without one"
        )
    return vectors
