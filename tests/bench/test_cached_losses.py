"""Losses are computed once for all caps, kept from run to run, and never taken from another model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ragkit.bench.cached_losses import CachedLosses
from ragkit.errors import UsageError


class CountingLosses:
    """A `LossModel` whose loss of a token is its id."""

    settings = "window 8"

    def __init__(self) -> None:
        self.texts = 0

    def token_losses(self, texts):
        self.texts += len(texts)
        return [np.asarray(ids[1:], np.float32) for ids in texts]


def cached(model: CountingLosses, folder: Path | None = None, model_id: str = "a") -> CachedLosses:
    return CachedLosses(lambda: model, lambda: model_id, folder)


def test_a_text_is_taken_once():
    model = CountingLosses()
    losses = cached(model)
    first = losses.token_losses([[1, 2, 3], [4, 5]])
    second = losses.token_losses([[4, 5], [6, 7], [1, 2, 3]])
    assert model.texts == 3
    assert [row.tolist() for row in first] == [[2, 3], [5]]
    assert [row.tolist() for row in second] == [[5], [7], [2, 3]]


def test_what_was_saved_is_not_computed_again(tmp_path):
    losses = cached(CountingLosses(), tmp_path)
    losses.token_losses([[1, 2, 3], [4, 5], [9]])
    losses.save()
    model = CountingLosses()
    found = cached(model, tmp_path).token_losses([[4, 5], [9], [1, 2, 3]])
    assert model.texts == 0
    assert [row.tolist() for row in found] == [[5], [], [2, 3]]


def test_the_losses_of_another_model_are_not_taken(tmp_path):
    losses = cached(CountingLosses(), tmp_path)
    losses.token_losses([[1, 2, 3]])
    losses.save()
    model = CountingLosses()
    cached(model, tmp_path, "b").token_losses([[1, 2, 3]])
    assert model.texts == 1


def test_a_damaged_cache_is_named(tmp_path):
    (tmp_path / "losses.json").write_text("{", encoding="ascii")
    with pytest.raises(UsageError, match="cannot be read"):
        cached(CountingLosses(), tmp_path).token_losses([[1, 2]])
