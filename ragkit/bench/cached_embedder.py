"""An embedder that embeds every text once: chunkers that are compared share most of their sentences and many chunks."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from ragkit.errors import UsageError
from ragkit.retrieval.base import Embedder, FloatMatrix

logger = logging.getLogger(__name__)

_KEYS, _VECTORS = "keys.json", "vectors.npy"


class CachedEmbedder:
    """Remembers the vectors of texts, in memory and, where asked, in a folder from run to run. An `Embedder`."""

    def __init__(self, embedder: Embedder, folder: Path | None = None) -> None:
        self._embedder = embedder
        self._folder = folder
        self._rows: dict[str, int] = {}
        self._vectors: list[FloatMatrix] = []
        if folder is not None and (folder / _KEYS).exists():
            self._load(folder)
        self._saved = len(self._vectors)

    @property
    def embedder_id(self) -> str:
        """The embedder's own identity."""
        return self._embedder.embedder_id

    @property
    def dim(self) -> int:
        """Length of a vector."""
        return self._embedder.dim

    @property
    def max_tokens(self) -> int:
        """The model's window in its own tokens."""
        return self._embedder.max_tokens

    def encode(self, texts: Sequence[str], on_tokens: Callable[[int], None] | None = None) -> FloatMatrix:
        """Return the vectors of `texts`, embedding only those not seen before."""
        keys = [hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:24] for text in texts]
        unseen = {key: text for key, text in zip(keys, texts, strict=True) if key not in self._rows}
        if unseen:
            fresh = self._embedder.encode(list(unseen.values()), on_tokens=on_tokens)
            for key, vector in zip(unseen, fresh, strict=True):
                self._rows[key] = len(self._vectors)
                self._vectors.append(vector)
        if not keys:
            return np.zeros((0, self.dim), np.float32)
        return np.stack([self._vectors[self._rows[key]] for key in keys])

    def encode_queries(self, texts: Sequence[str]) -> FloatMatrix:
        """Return the vectors of questions; they are not remembered."""
        return self._embedder.encode_queries(texts)

    def save(self) -> None:
        """Write what is remembered, where there is a folder and something new."""
        if self._folder is None or len(self._vectors) == self._saved:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        np.save(self._folder / _VECTORS, np.stack(self._vectors), allow_pickle=False)
        stored = {"embedder": self.embedder_id, "keys": list(self._rows)}
        (self._folder / _KEYS).write_text(json.dumps(stored), encoding="ascii")
        self._saved = len(self._vectors)

    def _load(self, folder: Path) -> None:
        try:
            stored = json.loads((folder / _KEYS).read_text(encoding="ascii"))
            vectors = np.load(folder / _VECTORS, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise UsageError(
                f"the cache {folder} cannot be read: {error}; delete it, or name another folder"
            ) from error
        if stored["embedder"] != self.embedder_id or len(stored["keys"]) != len(vectors):
            logger.warning("the cache %s belongs to another embedder and is made anew", folder)
            return
        self._rows = {key: row for row, key in enumerate(stored["keys"])}
        self._vectors = list(vectors)
