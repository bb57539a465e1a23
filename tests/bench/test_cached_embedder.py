"""Every text is embedded once, also from one run to the next."""

from __future__ import annotations

import numpy as np
import pytest
from doubles import HashEmbedder

from ragkit.bench.cached_embedder import CachedEmbedder
from ragkit.errors import UsageError


def test_a_text_is_embedded_once_and_its_vector_is_the_embedders():
    inner = HashEmbedder()
    embedder = CachedEmbedder(inner)
    first = embedder.encode(["a frog", "a star", "a frog"])
    assert inner.texts_embedded == 2
    np.testing.assert_array_equal(first, HashEmbedder().encode(["a frog", "a star", "a frog"]))
    embedder.encode(["a star"])
    assert inner.texts_embedded == 2
    assert embedder.encode([]).shape == (0, 16)


def test_a_folder_keeps_the_vectors_for_the_next_run(tmp_path):
    first = CachedEmbedder(HashEmbedder(), tmp_path / "cache")
    vectors = first.encode(["a frog", "\ud800"])
    first.save()
    inner = HashEmbedder()
    np.testing.assert_array_equal(CachedEmbedder(inner, tmp_path / "cache").encode(["a frog", "\ud800"]), vectors)
    assert inner.texts_embedded == 0


def test_a_cache_of_another_embedder_is_not_used(tmp_path, caplog):
    first = CachedEmbedder(HashEmbedder(name="one"), tmp_path)
    first.encode(["a frog"])
    first.save()
    inner = HashEmbedder(name="two")
    CachedEmbedder(inner, tmp_path).encode(["a frog"])
    assert inner.texts_embedded == 1
    assert "belongs to another embedder" in caplog.text


def test_a_damaged_cache_is_a_clear_error(tmp_path):
    first = CachedEmbedder(HashEmbedder(), tmp_path)
    first.encode(["a frog"])
    first.save()
    (tmp_path / "vectors.npy").write_bytes(b"no array")
    with pytest.raises(UsageError, match=r"the cache .* cannot be read: .*; delete it"):
        CachedEmbedder(HashEmbedder(), tmp_path)
