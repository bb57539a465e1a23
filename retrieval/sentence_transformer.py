"""Embeddings through sentence-transformers: any model that it loads, at the price of its import (4 to 7 s)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ragkit.errors import ModelError, RetrievalError
from ragkit.retrieval.base import FloatMatrix, IdVector
from ragkit.retrieval.model_folder import ModelFolder
from ragkit.retrieval.token_states import states_in_order
from ragkit.retrieval.windows import pool_windows, split_windows, unit_rows

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

_UNBOUNDED = 1 << 30  # the window of models without positions
_BATCH_PADDED_TOKENS = 256  # what a row of a batch is taken to hold when batch_tokens is turned into rows


class SentenceTransformerEmbedder:
    """Embeds texts through sentence-transformers. Implements `TokenEmbedder`.

    Texts over the model's window are cut at words and pooled as in `BertEncoder`, where sentence-transformers itself
    would truncate them.

    Args:
        folder: what `read_model_folder` returned.
        device: cpu, cuda or cuda:N.
        batch_tokens: tokens of one forward, roughly.

    Raises:
        ModelError: sentence-transformers cannot load the folder.
    """

    backend = "sentence-transformers"

    def __init__(self, folder: ModelFolder, device: str = "cpu", batch_tokens: int = 8192) -> None:
        from sentence_transformers import SentenceTransformer

        self._folder = folder
        self._batch_tokens = batch_tokens
        self._batch_rows = max(1, batch_tokens // _BATCH_PADDED_TOKENS)
        try:
            self._model: Any = SentenceTransformer(
                str(folder.path),
                device=device,
                trust_remote_code=False,
                local_files_only=True,
                model_kwargs={"use_safetensors": True},
            )
            self._tokenizer: Any = self._model.tokenizer
            self._dim = int(self._model.get_embedding_dimension() or 0)
            self._window = int(self._model.max_seq_length or _UNBOUNDED)
            self._prefix, self._suffix = self._surrounding_ids()
        except Exception as error:  # whatever the model's own modules raise
            raise ModelError(f"sentence-transformers cannot load {folder.path}: {error}") from error
        if not self._dim:
            raise ModelError(f"{folder.path} does not say how long its vectors are; it is no text embedder")

    @property
    def embedder_id(self) -> str:
        """Identity of weights, pooling, normalisation, window and prompts; the same as `BertEncoder` gives."""
        return self._folder.embedder_id

    @property
    def dim(self) -> int:
        """Length of a vector."""
        return self._dim

    @property
    def max_tokens(self) -> int:
        """The window in the model's own tokens, special tokens included."""
        return self._window

    def encode(self, texts: Sequence[str], on_tokens: Callable[[int], None] | None = None) -> FloatMatrix:
        """Return (texts, dim) unit rows for documents. See `Embedder.encode`."""
        result = np.empty((len(texts), self._dim), dtype=np.float32)
        step = 32 * self._batch_rows  # encode sorts by length within a call
        for start in range(0, len(texts), step):
            part = [self._folder.document_prompt + text for text in texts[start : start + step]]
            result[start : start + len(part)] = self._embed(part, on_tokens)
        return result

    def encode_queries(self, texts: Sequence[str]) -> FloatMatrix:
        """Return (texts, dim) unit rows for questions. See `Embedder.encode_queries`."""
        return self._embed([self._folder.query_prompt + text for text in texts], None)

    @property
    def averages_tokens(self) -> bool:
        """Whether a text's vector is the mean of its token states. See `TokenEmbedder`."""
        return self._folder.averages_tokens

    @property
    def document_prompt(self) -> str:
        """The text put before a document."""
        return self._folder.document_prompt

    @property
    def special_ids(self) -> tuple[Sequence[int], Sequence[int]]:
        """The special ids before and behind a text."""
        return self._prefix, self._suffix

    def token_ids(self, texts: Sequence[str]) -> list[Sequence[int]]:
        """Return the ids of each text without special ones. See `TokenEmbedder.token_ids`."""
        return [self._ids(text) for text in texts]

    def token_states(self, windows: Sequence[IdVector], on_tokens: Callable[[int], None] | None = None) -> Tensor:
        """Return (tokens, dim) of all windows on the model's device. See `TokenEmbedder.token_states`."""
        return states_in_order(windows, self._padded_states, self._batch_tokens, on_tokens)

    def _padded_states(self, token_ids: NDArray[np.int64], lengths: NDArray[np.int64]) -> Tensor:
        """Return (tokens, dim) of packed sequences, run as one padded batch."""
        import torch

        inside = torch.arange(int(lengths.max())) < torch.from_numpy(lengths)[:, None]
        ids = torch.full(inside.shape, self._tokenizer.pad_token_id or 0)
        ids[inside] = torch.from_numpy(token_ids)
        features = {"input_ids": ids.to(self._model.device), "attention_mask": inside.long().to(self._model.device)}
        try:
            with torch.inference_mode():
                states: Tensor = self._model[0](features)["token_embeddings"]
        except RuntimeError as error:
            raise RetrievalError(f"sentence-transformers could not embed {len(token_ids)} tokens: {error}") from error
        return states[inside.to(states.device)]

    def _embed(self, texts: list[str], on_tokens: Callable[[int], None] | None) -> FloatMatrix:
        if not texts:
            return np.empty((0, self._dim), dtype=np.float32)
        pieces: list[str] = []
        owners: list[int] = []
        weights: list[int] = []
        for owner, text in enumerate(texts):
            for piece, tokens in self._pieces(text):
                pieces.append(piece)
                owners.append(owner)
                weights.append(tokens)
        try:
            # prompts stand in the texts already; an empty one keeps the model's default prompt away
            vectors = self._model.encode(
                pieces, prompt="", batch_size=self._batch_rows, show_progress_bar=False, convert_to_numpy=True
            )
        except RuntimeError as error:
            raise RetrievalError(f"sentence-transformers could not embed {len(pieces)} texts: {error}") from error
        if on_tokens is not None:
            on_tokens(sum(weights) + self._special * len(weights))
        vectors = unit_rows(np.asarray(vectors, dtype=np.float32))
        return pool_windows(vectors, np.asarray(weights), np.asarray(owners), len(texts))

    def _pieces(self, text: str) -> list[tuple[str, int]]:
        """Return stretches of `text` that fit the window, each with its number of tokens."""
        limit = self._window - self._special
        count = len(self._ids(text))
        if count <= limit:
            return [(text, count)]
        encoding = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        words, offsets = encoding.word_ids(0), encoding["offset_mapping"]
        pieces: list[tuple[str, int]] = []
        start = 0
        for _, last in split_windows(words, limit):
            stop = offsets[last][0] if last < len(offsets) else len(text)
            if stop > start:
                pieces += self._fitting(text[start:stop], limit)
                start = stop
        return pieces

    def _fitting(self, text: str, limit: int) -> list[tuple[str, int]]:
        """Return `text` in as many parts as it takes to fit: cutting inside a word can give more tokens than before."""
        count = len(self._ids(text))
        if count <= limit or len(text) < 2:
            if count > limit:
                raise RetrievalError(f"one character takes {count} tokens, the embedder's window holds {limit}")
            return [(text, count)]
        middle = len(text) // 2
        return self._fitting(text[:middle], limit) + self._fitting(text[middle:], limit)

    @property
    def _special(self) -> int:
        return len(self._prefix) + len(self._suffix)

    def _surrounding_ids(self) -> tuple[list[int], list[int]]:
        """Return the special ids that the tokenizer puts before and behind a text."""
        plain, special = self._ids("a"), list(self._tokenizer("a")["input_ids"])
        for start in range(len(special) - len(plain) + 1):
            if special[start : start + len(plain)] == plain:
                return special[:start], special[start + len(plain) :]
        raise ModelError("its special tokens do not surround a text")

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids
