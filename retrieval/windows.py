"""Windows over texts that are longer than an embedder's window, and how their vectors become one.

A long text is cut into the fewest windows, of equal size within a token or so, at the starts of words; its vector is
the mean of the windows' unit vectors weighted by their tokens, brought back to unit length. Nothing is truncated.
Late chunking keeps token states instead and lets windows overlap; every token is then taken from one of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ragkit.errors import RetrievalError
from ragkit.retrieval.base import FloatMatrix


def split_windows(word_of_token: Sequence[int | None], limit: int) -> list[tuple[int, int]]:
    """Return half-open token spans of at most `limit` tokens that tile the text.

    Args:
        word_of_token: for each token the word it belongs to; a cut before a token of the same word is moved to the
            word's first token, unless the word alone fills the window.
        limit: tokens that a window holds, special tokens left out.
    """
    total = len(word_of_token)
    if limit < 1:
        raise RetrievalError(f"a window must hold at least one token, got {limit}")
    spans: list[tuple[int, int]] = []
    start = 0
    while total - start > limit:
        windows_left = -(-(total - start) // limit)
        stop = start + -(-(total - start) // windows_left)
        while stop > start and _inside_word(word_of_token, stop):
            stop -= 1
        if stop == start:
            stop = start + limit
        spans.append((start, stop))
        start = stop
    spans.append((start, total))
    return spans


class Window(NamedTuple):
    """Tokens `start` to `stop` of a text; the states of `own_start` to `own_stop` are taken from this window."""

    start: int
    stop: int
    own_start: int
    own_stop: int


def overlapping_windows(total: int, limit: int, overlap: int) -> list[Window]:
    """Return windows over `total` tokens, each of `limit` tokens where the text has that many.

    Neighbours share `overlap` tokens at least, spread evenly. Each half of what two share belongs to the window in
    which it stands further from an edge, so a state has seen overlap / 2 tokens on both sides of it. Averaging the two
    windows' states instead would mix in those that have seen next to nothing on one side, and blur both.
    """
    if limit < 1 or not 0 <= overlap < limit:
        raise RetrievalError(f"windows of {limit} tokens cannot overlap by {overlap}")
    if total <= limit:
        return [Window(0, total, 0, total)]
    count = -(-(total - overlap) // (limit - overlap))
    starts = [index * (total - limit) // (count - 1) for index in range(count)]
    cuts = [(start + limit + following) // 2 for start, following in pairwise(starts)]
    edges = pairwise([0, *cuts, total])
    return [Window(start, start + limit, first, last) for start, (first, last) in zip(starts, edges, strict=True)]


def pool_windows(
    vectors: FloatMatrix, weights: NDArray[np.int64], owners: NDArray[np.int64], texts: int
) -> FloatMatrix:
    """Return (texts, dim) unit vectors from the unit vectors of windows.

    Args:
        vectors: (windows, dim).
        weights: tokens of each window.
        owners: the text of each window, ascending.
        texts: how many texts there are; every one owns at least one window.
    """
    if len(vectors) == texts:
        return vectors
    weighted = vectors * np.maximum(weights, 1).astype(np.float32)[:, None]
    starts = np.searchsorted(owners, np.arange(texts))
    return unit_rows(np.add.reduceat(weighted, starts, axis=0))


def unit_rows(vectors: FloatMatrix) -> FloatMatrix:
    """Return the rows brought to length one.

    Raises:
        RetrievalError: a row holds NaN or infinity.
    """
    norms = np.sqrt(np.einsum("ij,ij->i", vectors, vectors, dtype=np.float64))
    finite = np.isfinite(norms)
    if not finite.all():
        row = int(np.flatnonzero(~finite)[0])
        raise RetrievalError(
            f"the embedder gave a vector that is not finite for text {row} of {len(vectors)}; its weights are damaged"
        )
    scaled: FloatMatrix = (vectors / np.maximum(norms, 1e-12)[:, None]).astype(np.float32, copy=False)
    return scaled


def _inside_word(word_of_token: Sequence[int | None], token: int) -> bool:
    word = word_of_token[token]
    return word is not None and word_of_token[token - 1] == word
