"""A loss model that takes every text once: the losses of a text are the same under every cap that is compared."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ragkit.chunking.perplexity import LossModel
from ragkit.errors import UsageError

logger = logging.getLogger(__name__)

_KEYS, _LOSSES = "losses.json", "losses.npy"

Losses = NDArray[np.float32]


class CachedLosses:
    """Remembers the losses of texts, in memory and, where asked, in a folder from run to run. A `LossModel`.

    Args:
        load: gives the model, when it is first needed.
        model_id: changes with the model's weights.
        folder: where the losses are kept.
    """

    def __init__(self, load: Callable[[], LossModel], model_id: Callable[[], str], folder: Path | None = None) -> None:
        self._load, self._model_id, self._folder = load, model_id, folder
        self._model: LossModel | None = None
        self._known: dict[str, Losses] | None = None
        self._saved = 0

    @property
    def settings(self) -> str:
        """The model's own settings."""
        return self._loaded.settings

    def token_losses(self, texts: Sequence[Sequence[int]]) -> list[Losses]:
        """Return the losses of each text, computing only those not seen before."""
        known = self._read() if self._known is None else self._known
        keys = [hashlib.sha256(np.asarray(ids, np.int64).tobytes()).hexdigest()[:24] for ids in texts]
        unseen = {key: ids for key, ids in zip(keys, texts, strict=True) if key not in known}
        if unseen:
            known |= dict(zip(unseen, self._loaded.token_losses(list(unseen.values())), strict=True))
        return [known[key] for key in keys]

    def save(self) -> None:
        """Write what is remembered, where there is a folder and something new."""
        if self._folder is None or not self._known or len(self._known) == self._saved:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        np.save(self._folder / _LOSSES, np.concatenate(list(self._known.values())), allow_pickle=False)
        stored = {"model": self._identity, "sizes": {key: len(losses) for key, losses in self._known.items()}}
        (self._folder / _KEYS).write_text(json.dumps(stored), encoding="ascii")
        self._saved = len(self._known)

    @property
    def _loaded(self) -> LossModel:
        if self._model is None:
            self._model = self._load()
        return self._model

    @property
    def _identity(self) -> list[str]:
        return [self._model_id(), self.settings]

    def _read(self) -> dict[str, Losses]:
        """Return what the folder holds of this model."""
        self._known = {}
        if self._folder is None or not (self._folder / _KEYS).exists():
            return self._known
        try:
            stored = json.loads((self._folder / _KEYS).read_text(encoding="ascii"))
            losses = np.load(self._folder / _LOSSES, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise UsageError(
                f"the cache {self._folder} cannot be read: {error}; delete it, or name another folder"
            ) from error
        sizes: dict[str, int] = stored["sizes"]
        if stored["model"] != self._identity or sum(sizes.values()) != len(losses):
            logger.warning("the losses in %s belong to another model and are computed anew", self._folder)
            return self._known
        ends = np.cumsum(list(sizes.values())).tolist()
        self._known |= {key: losses[end - size : end] for (key, size), end in zip(sizes.items(), ends, strict=True)}
        self._saved = len(self._known)
        return self._known
