"""The tokens of a paged document and where they stand in its text, stored beside its pages.

Cutting a text of a million tokens takes seconds, and every process that answers from its pages needs them: their keys
go over the tokens, and an answer says which characters it looked at. A record is named by the text's hash and the
tokenizer, and carries the CRCs of all records; what is missing or damaged is made from the text again.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ragkit.errors import KVCacheError
from ragkit.kvcache.backing_tier import BackingTier
from ragkit.kvcache.chunk_kv import ChunkRef, EncodedKV
from ragkit.kvcache.kv_key import KVKey
from ragkit.kvcache.kv_segment import KVMissError

_CODEC = "page-tokens-1"
_PARTS = 3  # ids, starts, stops

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class TextTokens:
    """The tokens of a text.

    Attributes:
        ids: (tokens,) int32.
        starts, stops: (tokens,) int64, the half-open characters of each.
    """

    ids: NDArray[np.int32]
    starts: NDArray[np.int64]
    stops: NDArray[np.int64]

    @classmethod
    def of(cls, ids: Sequence[int], offsets: Sequence[tuple[int, int]]) -> TextTokens:
        """Return what a tokenizer gives."""
        spans = np.array(offsets, dtype=np.int64).reshape(-1, 2)
        return cls(np.array(ids, dtype=np.int32), np.ascontiguousarray(spans[:, 0]), np.ascontiguousarray(spans[:, 1]))


class TokenRecords:
    """Tokens of texts in one tier.

    Args:
        tier: where they are; None keeps nothing.
        tokenizer_id: names the tokenizer.
    """

    def __init__(self, tier: BackingTier | None, tokenizer_id: str) -> None:
        self._tier = tier
        self._tokenizer_id = tokenizer_id

    def load(self, text: str, owner: str) -> TextTokens | None:
        """Return the tokens of `text`, or None where they are not stored, or damaged."""
        if self._tier is None:
            return None
        try:
            with self._tier.open(self._ref(text, owner), _CODEC, _PARTS) as reader:
                encoded = reader.load()
            parts = [encoded.layer(index).numpy() for index in range(_PARTS)]
            found = TextTokens(parts[0].view(np.int32), parts[1].view(np.int64), parts[2].view(np.int64))
        except (KVMissError, ValueError) as error:
            _log.debug("the tokens of a document are not stored: %s", error)
            return None
        is_whole = len(found.ids) == len(found.starts) == len(found.stops)
        return found if is_whole and (not len(found.ids) or found.stops[-1] <= len(text)) else None

    def save(self, text: str, owner: str, tokens: TextTokens, took_ms: float) -> None:
        """Keep the tokens of `text`; where there is no room they are made again the next time."""
        if self._tier is None or not len(tokens.ids):
            return
        layers = [_bytes(part) for part in (tokens.ids, tokens.starts, tokens.stops)]
        try:
            self._tier.save([EncodedKV.pack(self._ref(text, owner), _CODEC, layers, took_ms)])
        except KVCacheError as error:
            _log.warning("the tokens of a document were not stored: %s", error)

    def _ref(self, text: str, owner: str) -> ChunkRef:
        digest = hashlib.sha256(f"page-tokens:{self._tokenizer_id}:".encode())
        digest.update(text.encode("utf-8", "surrogatepass"))
        return ChunkRef(KVKey(digest.hexdigest()), (), owner)


def _bytes(part: NDArray[np.int32] | NDArray[np.int64]) -> Tensor:
    return torch.from_numpy(np.frombuffer(part.tobytes(), dtype=np.uint8).copy())
