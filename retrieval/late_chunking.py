"""Late chunking: every chunk is embedded with its document around it (arXiv 2409.04701).

The encoder reads the whole document, and a chunk's vector is the mean of the states that its tokens have there. A
document beyond the encoder's window is read in overlapping windows, each token's state taken from the one in which it
stands further from an edge (`ragkit.retrieval.windows.overlapping_windows`). The first chunk also holds the special
tokens and the prompt before the document, the last one those behind it, so a document that is one chunk has the vector
that it has without late chunking. Questions are embedded as usual.

What it brings depends on the encoder and on the questions. The paper's gains (1 to 6 points of nDCG@10) are those of a
window of 8,192 tokens. With the bundled embedder, which reads 256, benchmarks/late_chunking.py found 4 to 5 points of
hit@1 fewer on xquad, whose answers are a few words of one paragraph, and on chunking_evaluation 4 points of recall more
in chunks of 64 tokens and no certain difference in chunks of 256; a larger overlap was better throughout. So it is off
unless asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ragkit.errors import ModelError
from ragkit.kernels.span_pool import span_pool
from ragkit.retrieval.base import FloatMatrix, IdVector, TokenEmbedder
from ragkit.retrieval.windows import overlapping_windows, unit_rows

if TYPE_CHECKING:
    from ragkit.store.base import DocumentSpans

_TEXTS = 4096  # stretches of text tokenised at a time
_HELD_TOKENS = 1 << 15  # states held at once, besides those of chunks that are not complete


class LateChunks:
    """Embeds chunks with their documents around them. Implements `ChunkEmbedder`.

    Args:
        embedder: one whose vectors are means of token states.
        window: tokens that the encoder reads at once, special tokens included.
        overlap: share of a window that the next one reads again.
        manner: what separates the embedder's identity from how chunks are embedded.

    Raises:
        ModelError: the window holds no text.
    """

    def __init__(self, embedder: TokenEmbedder, window: int, overlap: float, manner: str) -> None:
        self._embedder = embedder
        self._prefix, self._suffix = (np.asarray(ids, dtype=np.int64) for ids in embedder.special_ids)
        self._capacity = window - len(self._prefix) - len(self._suffix)
        if self._capacity < 1:
            raise ModelError(f"a window of {window} tokens of {embedder.embedder_id} holds no text")
        self._overlap = int(overlap * self._capacity)
        self.embedder_id = f"{embedder.embedder_id}{manner}late-{self._capacity}-{self._overlap}"

    @property
    def dim(self) -> int:
        """Length of a vector."""
        return self._embedder.dim

    def encode_chunks(
        self, documents: Sequence[DocumentSpans], on_tokens: Callable[[int], None] | None = None
    ) -> FloatMatrix:
        """Return the vectors of all chunks. See `ChunkEmbedder.encode_chunks`.

        Memory holds the states of some windows and of the chunks that they cut, whatever the length of a document. A
        chunk without tokens (white space alone) is embedded by itself.
        """
        ids, rows = self._tokenised(documents)
        vectors = np.zeros((len(rows), self.dim), dtype=np.float32)
        complete = np.maximum.accumulate(rows[:, 1])
        needed = np.minimum.accumulate(rows[::-1, 0])[::-1]
        first = done = 0  # row of the stream that `held` starts with, and the next chunk to pool
        held: Tensor | None = None
        for states in self._stream(ids, on_tokens):
            held = states if held is None else torch.cat([held, states])
            ready = int(np.searchsorted(complete, first + len(held), side="right"))
            starts, stops = (torch.from_numpy(edge - first).to(held.device) for edge in rows[done:ready].T)
            vectors[done:ready] = span_pool(held, starts, stops).cpu().numpy()
            keep = len(held) if ready == len(rows) else min(len(held), int(needed[ready]) - first)
            held = held[keep:]
            first, done = first + keep, ready
        self._embed_empty(documents, np.flatnonzero(rows[:, 0] == rows[:, 1]), vectors)
        return unit_rows(vectors)

    def _tokenised(self, documents: Sequence[DocumentSpans]) -> tuple[list[IdVector], NDArray[np.int64]]:
        """Return the ids of each document with tokens, and (chunks, 2) where chunks start and stop in all their rows.

        A document's rows are its tokens between its special ones.
        """
        ids: list[IdVector] = []
        rows = [np.zeros((0, 2), np.int64)]
        total = 0
        for document in documents:
            own, chunks = self._tokens_of(document)
            if (chunks[:, 1] > chunks[:, 0]).any():
                ids.append(own)
                rows.append(chunks + total)
                total += len(self._prefix) + len(own) + len(self._suffix)
            else:
                rows.append(np.zeros_like(chunks) + total)
        return ids, np.concatenate(rows)

    def _tokens_of(self, document: DocumentSpans) -> tuple[IdVector, NDArray[np.int64]]:
        """Return the ids of a document and the rows of each chunk among its own, special rows included.

        The text is tokenised in stretches that no chunk boundary cuts, so that every token belongs to whole chunks.
        """
        spans = np.asarray(document.spans, dtype=np.int64).reshape(-1, 2)
        edges = np.unique(np.append(spans, [0, len(document.text)]))
        stretches = [document.text[start:stop] for start, stop in pairwise(edges.tolist())]
        if stretches:
            stretches[0] = self._embedder.document_prompt + stretches[0]
        parts = [np.zeros(0, np.int64)]
        for start in range(0, len(stretches), _TEXTS):
            some = self._embedder.token_ids(stretches[start : start + _TEXTS])
            parts += [np.asarray(ids, dtype=np.int64) for ids in some]
        before = np.cumsum([len(part) for part in parts]) + len(self._prefix)
        rows = before[np.searchsorted(edges, spans)]
        full = np.flatnonzero(rows[:, 1] > rows[:, 0])
        if len(full):
            rows[full[0], 0] = 0
            rows[full[-1], 1] = before[-1] + len(self._suffix)
        return np.concatenate(parts), rows

    def _stream(self, ids: Sequence[IdVector], on_tokens: Callable[[int], None] | None) -> Iterator[Tensor]:
        """Yield the states of all documents' rows in order, some windows at a time."""
        windows: list[IdVector] = []
        kept: list[slice] = []
        tokens = 0
        for document in ids:
            for window, rows in self._windows(document):
                if windows and tokens + len(window) > _HELD_TOKENS:
                    yield _kept_states(self._embedder.token_states(windows, on_tokens), windows, kept)
                    windows, kept, tokens = [], [], 0
                windows.append(window)
                kept.append(rows)
                tokens += len(window)
        if windows:
            yield _kept_states(self._embedder.token_states(windows, on_tokens), windows, kept)

    def _windows(self, ids: IdVector) -> Iterator[tuple[IdVector, slice]]:
        """Yield each window of a document between special ids, and which of its rows are kept: each once in all."""
        before = len(self._prefix)
        for start, stop, own_start, own_stop in overlapping_windows(len(ids), self._capacity, self._overlap):
            window = np.concatenate([self._prefix, ids[start:stop], self._suffix])
            first = 0 if start == 0 else before + own_start - start
            yield window, slice(first, len(window) if stop == len(ids) else before + own_stop - start)

    def _embed_empty(self, documents: Sequence[DocumentSpans], empty: NDArray[np.int64], vectors: FloatMatrix) -> None:
        if not len(empty):
            return
        texts = [document.text[start:stop] for document in documents for start, stop in document.spans]
        vectors[empty] = self._embedder.encode([texts[row] for row in empty])


def _kept_states(states: Tensor, windows: Sequence[IdVector], kept: Sequence[slice]) -> Tensor:
    """Return the kept rows of all windows, one behind the other."""
    parts = states.split([len(window) for window in windows])
    return torch.cat([part[rows] for part, rows in zip(parts, kept, strict=True)])
