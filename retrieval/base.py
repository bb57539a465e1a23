"""The seams of retrieval: what embeds text, what finds the nearest vectors, and what a store must offer for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

FloatMatrix = NDArray[np.float32]
IdVector = NDArray[np.int64]


class Embedder(Protocol):
    """Turns texts into unit vectors.

    A text longer than the model's window is embedded in windows and pooled; nothing is truncated silently.
    """

    @property
    def embedder_id(self) -> str:
        """`NAME@DIGEST`: changes with weights, pooling, normalisation and prompts, not with the backend."""
        ...

    @property
    def dim(self) -> int:
        """Length of a vector."""
        ...

    @property
    def max_tokens(self) -> int:
        """The model's window in its own tokens, special tokens included."""
        ...

    def encode(self, texts: Sequence[str], on_tokens: Callable[[int], None] | None = None) -> FloatMatrix:
        """Return (texts, dim) fp32 rows of unit length; `on_tokens` is told the tokens done, for progress bars.

        Raises:
            RetrievalError: the model gave a vector that is not finite.
        """
        ...

    def encode_queries(self, texts: Sequence[str]) -> FloatMatrix:
        """Return what `encode` returns, for questions: models with a prompt for queries get it."""
        ...


class VectorIndex(Protocol):
    """Finds the stored vectors with the largest inner product. Row ids are the store's int64 ids."""

    def __len__(self) -> int: ...

    def search(self, queries: FloatMatrix, k: int, allowed: IdVector | None = None) -> tuple[FloatMatrix, IdVector]:
        """Return scores and row ids, (queries, min(k, hits)), best first; `allowed` (sorted) restricts the rows."""
        ...
