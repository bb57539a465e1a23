"""Which index a store gets, and that it stays in step."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from doubles import HashEmbedder
from filled_store import fill, unit_vectors

from ragkit.config import RetrievalConfig
from ragkit.retrieval.flat import FlatIndex
from ragkit.retrieval.indexes import KIND, open_index, refresh_index
from ragkit.retrieval.ivf_index import IvfIndex
from ragkit.store.store import Store

pytest.importorskip("faiss")

CONFIG = RetrievalConfig(flat_limit=100)
DIM = 16


class GivenEmbedder(HashEmbedder):
    """Clustered vectors by the order of asking."""

    def encode(self, texts: list[str], on_tokens: object = None) -> np.ndarray:
        self.texts_embedded += len(texts)
        return unit_vectors(len(texts), DIM, seed=self.texts_embedded)


def grow(store: Store, uri: str, chunks: int) -> None:
    fill(store, GivenEmbedder(DIM), {uri: [f"{uri} {number} " for number in range(chunks)]})


def refresh(store: Store) -> object:
    with store.writer() as writer:
        return refresh_index(store, writer, CONFIG)


def test_a_small_store_is_searched_exactly_and_keeps_no_index(store: Store) -> None:
    grow(store, "a", 100)
    assert refresh(store) is None
    assert isinstance(open_index(store, CONFIG), FlatIndex)


def test_a_large_store_gets_inverted_lists_that_find_every_row(store: Store) -> None:
    grow(store, "a", 1200)
    record = refresh(store)
    assert record.kind == KIND
    assert record.params["recall"] >= 0.95
    index = open_index(store, CONFIG)
    assert isinstance(index, IvfIndex)
    table = store.vectors()
    assert index.search(table.parts[0].vectors[:50], 1)[1][:, 0].tolist() == table.row_ids[:50].tolist()


def test_a_large_store_without_an_index_is_searched_exactly_and_says_so(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    grow(store, "a", 300)
    with caplog.at_level(logging.WARNING):
        assert isinstance(open_index(store, CONFIG), FlatIndex)
    assert "300 chunks are searched exactly" in caplog.text


def test_an_older_index_is_brought_up_to_date_when_it_is_opened(store: Store) -> None:
    grow(store, "a", 1200)
    grow(store, "gone", 50)
    record = refresh(store)
    with store.writer() as writer:
        writer.remove(["gone"])
    grow(store, "new", 40)
    assert store.checked_index().generation == record.generation
    index, rows = open_index(store, CONFIG), store.row_ids()
    assert len(index) == 1240
    found = index.search(unit_vectors(30, DIM, seed=5), 1240)[1]
    assert all(np.array_equal(np.sort(row), rows) for row in found)


def test_few_changes_keep_the_file_and_many_write_it_again(store: Store) -> None:
    grow(store, "a", 1200)
    first = refresh(store)
    grow(store, "b", 50)
    assert refresh(store) is None
    grow(store, "c", 200)
    second = refresh(store)
    assert second.rows == 1450
    assert second.params["trained_rows"] == first.params["trained_rows"] == 1200


def test_a_store_that_doubled_is_trained_again(store: Store) -> None:
    grow(store, "a", 1200)
    refresh(store)
    grow(store, "b", 1300)
    assert refresh(store).params["trained_rows"] == 2500


def test_a_rotten_index_file_is_not_used(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    grow(store, "a", 1200)
    path = refresh(store).path
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert isinstance(open_index(store, CONFIG), FlatIndex)
    assert refresh(store).rows == 1200
