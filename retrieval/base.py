"""The seams of retrieval: what embeds text, what finds the nearest vectors, and what a store must offer for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from ragkit.types import MetadataValue

if TYPE_CHECKING:
    from torch import Tensor

    from ragkit.store.base import DocumentSpans, IndexRecord, StoredChunk, VectorTable

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


@runtime_checkable
class TokenEmbedder(Embedder, Protocol):
    """An embedder that also gives the states of its tokens: what late chunking pools."""

    @property
    def averages_tokens(self) -> bool:
        """Whether its vector of a text is the mean of the text's token states, brought to length one."""
        ...

    @property
    def document_prompt(self) -> str:
        """The text that `encode` puts before a document."""
        ...

    @property
    def special_ids(self) -> tuple[Sequence[int], Sequence[int]]:
        """The special ids before and behind a text."""
        ...

    def token_ids(self, texts: Sequence[str]) -> list[Sequence[int]]:
        """Return the ids of each text, prompt and special ids left out."""
        ...

    def token_states(self, windows: Sequence[IdVector], on_tokens: Callable[[int], None] | None = None) -> Tensor:
        """Return (tokens, dim): the states of windows of ids, special ids included, one behind the other."""
        ...


class ChunkEmbedder(Protocol):
    """Turns the chunks of documents into unit vectors: what an ingest runs. Questions are embedded by an `Embedder`."""

    @property
    def embedder_id(self) -> str:
        """Identity of everything that changes the vectors: the embedder's own, and how chunks are embedded."""
        ...

    @property
    def dim(self) -> int:
        """Length of a vector."""
        ...

    def encode_chunks(
        self, documents: Sequence[DocumentSpans], on_tokens: Callable[[int], None] | None = None
    ) -> FloatMatrix:
        """Return (chunks, dim) fp32 rows of unit length: the chunks of all documents in order.

        Raises:
            RetrievalError: the model gave a vector that is not finite.
        """
        ...


class VectorIndex(Protocol):
    """Finds the stored vectors with the largest inner product. Row ids are the store's int64 ids."""

    def __len__(self) -> int: ...

    def search(self, queries: FloatMatrix, k: int, allowed: IdVector | None = None) -> tuple[FloatMatrix, IdVector]:
        """Return scores and row ids, (queries, min(k, hits)), best first; `allowed` (sorted) restricts the rows."""
        ...

    def similarities(self, query: FloatMatrix, row_ids: IdVector) -> NDArray[np.float32]:
        """Return the exact inner products of one query (1, dim) with the vectors of `row_ids`, in their order."""
        ...


class SearchableStore(Protocol):
    """The part of `ragkit.store.base.StoreReader` that retrieval reads."""

    @property
    def generation(self) -> int:
        """Number of the last commit."""
        ...

    def snapshot(self) -> AbstractContextManager[int]:
        """Pin one generation for all reads of this thread within the block, and return its number."""
        ...

    def match(self, fts_query: str, limit: int, allowed: IdVector | None = None) -> tuple[IdVector, FloatMatrix]:
        """Return row ids and BM25 scores (higher is better) of the best `limit` chunks, best first."""
        ...

    def document_frequency(self, terms: Sequence[str]) -> dict[str, int]:
        """Return for each term the number of chunks that hold it."""
        ...

    def rows_where(self, filters: Mapping[str, MetadataValue], /) -> IdVector:
        """Return the sorted row ids of chunks of documents that fulfil every filter."""
        ...

    def row_ids(self) -> IdVector:
        """Return the row ids of all chunks, ascending."""
        ...

    def vectors(self) -> VectorTable:
        """Return every live vector, memory-mapped."""
        ...

    def chunks(self, row_ids: Sequence[int] | IdVector) -> list[StoredChunk]:
        """Return the chunks of these rows in the given order."""
        ...

    def checked_index(self) -> IndexRecord | None:
        """Return the recorded derived index if its bytes are right, else None."""
        ...
