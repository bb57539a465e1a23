"""A thin encoder for sentence-transformers folders of BERT type: tokenizers, mapped weights and a forward of its own.

It gives the vectors that sentence-transformers gives (within 1e-5, by a test) without its import time: questions
run in numpy, documents in torch once there are enough of them to pay for its import.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from ragkit.errors import ModelError
from ragkit.retrieval.base import FloatMatrix, IdVector
from ragkit.retrieval.bert_numpy import NumpyBert
from ragkit.retrieval.bert_weights import load_bert_weights
from ragkit.retrieval.model_folder import ModelFolder
from ragkit.retrieval.token_states import batches, states_in_order
from ragkit.retrieval.windows import pool_windows, split_windows, unit_rows

if TYPE_CHECKING:
    from torch import Tensor

    from ragkit.retrieval.bert_torch import TorchBert

logger = logging.getLogger(__name__)

# Importing torch costs what numpy needs for about this many tokens; where it is imported already, a call does.
TORCH_PAYS_TOKENS = 6000
TORCH_CALL_PAYS_TOKENS = 256
# Texts tokenised at a time: bounds the memory that encodings take.
TOKENISE_TEXTS = 4096


class Forward(Protocol):
    """Pooled states of packed sequences: `NumpyBert` and `TorchBert`."""

    @property
    def name(self) -> str:
        """What computes: numpy, torch-onednn, torch-cpu or torch-cuda."""
        ...

    def pooled(self, token_ids: NDArray[np.int64], lengths: NDArray[np.int64]) -> FloatMatrix:
        """Return (sequences, hidden), not normalised."""
        ...


@dataclass(frozen=True)
class _Windows:
    """Tokenised windows: ids with special tokens, the text each belongs to, and its tokens without them."""

    token_ids: list[list[int]]
    owners: NDArray[np.int64]
    weights: NDArray[np.int64]


class BertEncoder:
    """Embeds texts with a BERT-type sentence-transformers folder. Implements `TokenEmbedder`; safe to use from threads.

    Args:
        folder: what `read_model_folder` returned.
        device: cpu, cuda or cuda:N.
        batch_tokens: tokens of one forward.

    Raises:
        ModelError: the folder is not of BERT type or is damaged.
    """

    def __init__(self, folder: ModelFolder, device: str = "cpu", batch_tokens: int = 8192) -> None:
        self._weights = load_bert_weights(folder)
        self._folder = folder
        self._device = device
        self._batch_tokens = batch_tokens
        self._tokenizer, self._prefix, self._suffix = _load_tokenizer(folder.path / "tokenizer.json")
        if self.max_tokens > len(self._weights.positions):
            raise ModelError(
                f"{folder.path}: its window of {self.max_tokens} tokens exceeds its "
                f"{len(self._weights.positions)} positions"
            )
        if self._capacity < 1:
            raise ModelError(f"{folder.path}: a window of {self.max_tokens} tokens holds no text")
        self._numpy = NumpyBert(self._weights)
        self._torch: TorchBert | None = None

    @property
    def embedder_id(self) -> str:
        """Identity of weights, pooling, normalisation, window and prompts."""
        return self._folder.embedder_id

    @property
    def dim(self) -> int:
        """Length of a vector."""
        return int(self._weights.words.shape[1])

    @property
    def max_tokens(self) -> int:
        """The window in the model's own tokens, special tokens included."""
        return int(self._folder.max_tokens or 0)

    @property
    def backend(self) -> str:
        """What runs the forward now: encoder-numpy, encoder-torch-onednn, encoder-torch-cpu or encoder-torch-cuda."""
        return f"encoder-{(self._torch or self._numpy).name}"

    def encode(self, texts: Sequence[str], on_tokens: Callable[[int], None] | None = None) -> FloatMatrix:
        """Return (texts, dim) unit rows for documents. See `Embedder.encode`."""
        result = np.empty((len(texts), self.dim), dtype=np.float32)
        for start in range(0, len(texts), TOKENISE_TEXTS):
            part = texts[start : start + TOKENISE_TEXTS]
            windows = self._tokenise(part, self._folder.document_prompt)
            forward = self._forward_for(int(windows.weights.sum()))
            result[start : start + len(part)] = self._embed(windows, len(part), forward, on_tokens)
        if self._torch is not None:
            self._torch.return_memory()
        return result

    def encode_queries(self, texts: Sequence[str]) -> FloatMatrix:
        """Return (texts, dim) unit rows for questions. See `Embedder.encode_queries`."""
        windows = self._tokenise(texts, self._folder.query_prompt)
        return self._embed(windows, len(texts), self._forward_for(int(windows.weights.sum())), None)

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
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def token_states(self, windows: Sequence[IdVector], on_tokens: Callable[[int], None] | None = None) -> Tensor:
        """Return (tokens, dim) of all windows, from torch on the encoder's device. See `TokenEmbedder.token_states`."""
        forward = self._torch_forward()
        return states_in_order(windows, forward.token_states, self._batch_tokens, on_tokens)

    @property
    def _capacity(self) -> int:
        return self.max_tokens - len(self._prefix) - len(self._suffix)

    def _tokenise(self, texts: Sequence[str], prompt: str) -> _Windows:
        prompted = [prompt + text for text in texts] if prompt else list(texts)
        encodings = self._tokenizer.encode_batch_fast(prompted, add_special_tokens=False)
        token_ids: list[list[int]] = []
        owners: list[int] = []
        weights: list[int] = []
        for owner, encoding in enumerate(encodings):
            ids = encoding.ids
            spans = [(0, len(ids))]
            if len(ids) > self._capacity:  # the fast encoding knows no words
                words = self._tokenizer.encode(prompted[owner], add_special_tokens=False).word_ids
                spans = split_windows(words, self._capacity)
            for first, last in spans:
                token_ids.append([*self._prefix, *ids[first:last], *self._suffix])
                owners.append(owner)
                weights.append(last - first)
        return _Windows(token_ids, np.asarray(owners, dtype=np.int64), np.asarray(weights, dtype=np.int64))

    def _embed(
        self, windows: _Windows, texts: int, forward: Forward, on_tokens: Callable[[int], None] | None
    ) -> FloatMatrix:
        vectors = np.empty((len(windows.token_ids), self.dim), dtype=np.float32)
        lengths = np.fromiter((len(ids) for ids in windows.token_ids), dtype=np.int64, count=len(windows.token_ids))
        for rows in batches(lengths, self._batch_tokens):
            packed = np.concatenate([np.asarray(windows.token_ids[row], dtype=np.int64) for row in rows])
            vectors[rows] = unit_rows(forward.pooled(packed, lengths[rows]))
            if on_tokens is not None:
                on_tokens(int(lengths[rows].sum()))
        return pool_windows(vectors, windows.weights, windows.owners, texts)

    def _forward_for(self, tokens: int) -> Forward:
        """Return the forward for a call of `tokens` tokens: numpy on the CPU unless torch is there or pays."""
        least = TORCH_CALL_PAYS_TOKENS if "torch" in sys.modules else TORCH_PAYS_TOKENS
        if self._device == "cpu" and tokens < least:
            return self._numpy
        return self._torch_forward()

    def _torch_forward(self) -> TorchBert:
        if self._torch is None:
            from ragkit.retrieval.bert_torch import TorchBert

            self._torch = TorchBert(self._weights, self._device)
            logger.info("documents are embedded by %s", self.backend)
        return self._torch


def _load_tokenizer(path: Path) -> tuple[Any, list[int], list[int]]:
    """Return the tokenizer and the special ids that it puts before and behind a text."""
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception for everything
        raise ModelError(f"cannot read the tokenizer {path}: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    plain = tokenizer.encode("a", add_special_tokens=False).ids
    special = tokenizer.encode("a").ids
    for start in range(len(special) - len(plain) + 1):
        if special[start : start + len(plain)] == plain:
            return tokenizer, special[:start], special[start + len(plain) :]
    raise ModelError(f"{path}: its special tokens do not surround a text, which the thin encoder needs")
