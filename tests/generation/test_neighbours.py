"""Which chunks stand before a chunk, how many of them, and what follows from changes of the store."""

from __future__ import annotations

import contextlib
import logging

import pytest

from ragkit.errors import StoreCorruptError
from ragkit.generation.neighbours import ChunkNeighbours
from ragkit.store.records import StoredChunk
from ragkit.types import Chunk, Segment

PREFIX_TOKENS, CHUNK_TOKENS = 5, 11  # ten and the end of a chunk


class Builder:
    """Ten tokens a chunk, and one for its end."""

    prefix = Segment(tuple(range(PREFIX_TOKENS)))

    def chunk_segment(self, chunk: Chunk) -> Segment:
        return Segment((*map(ord, chunk.text), 0), chunk.chunk_id)


class Chunks:
    """Documents of chunks, and how often they were read."""

    def __init__(self, **documents: str) -> None:
        self.generation = 1
        self.documents = documents
        self.reads = 0
        self.damaged = ""

    def snapshot(self) -> contextlib.nullcontext[int]:
        return contextlib.nullcontext(self.generation)

    def known_chunks(self, chunk_ids: list[str]) -> set[str]:
        return {one for one in chunk_ids if one in self._ids()}

    def chunks_by_id(self, chunk_ids: list[str]) -> list[StoredChunk]:
        return [self._chunk(*self._ids()[one]) for one in chunk_ids]

    def chunk_at(self, doc_id: str, index: int) -> StoredChunk | None:
        self.reads += 1
        return self._chunk(doc_id, index)

    def _ids(self) -> dict[str, tuple[str, int]]:
        return {
            f"{name}{index}": (name, index) for name, letters in self.documents.items() for index in range(len(letters))
        }

    def _chunk(self, name: str, index: int) -> StoredChunk:
        if f"{name}{index}" == self.damaged:
            raise StoreCorruptError("its text is damaged")
        text = self.documents[name][index] * 10
        return StoredChunk(index, Chunk(f"{name}{index}", name, index, text, 10 * index, 10 * index + 10, 10), name, {})


def found(chunks: Chunks, chunk_id: str, tokens: int = CHUNK_TOKENS, window: int = 1000) -> list[str]:
    neighbours = ChunkNeighbours(chunks, Builder(), tokens, window)  # type: ignore[arg-type]
    return [str(one.chunk_id) for one in neighbours(chunk_id)]


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (1, ["a2"]),  # the nearest in any case
        (CHUNK_TOKENS, ["a2"]),
        (2 * CHUNK_TOKENS - 1, ["a2"]),
        (2 * CHUNK_TOKENS, ["a1", "a2"]),
        (100, ["a0", "a1", "a2"]),
    ],
)
def test_whole_chunks_are_taken_the_nearest_first_and_given_in_the_order_of_the_document(tokens, expected):
    assert found(Chunks(a="klmn", b="op"), "a3", tokens) == expected


def test_a_documents_first_chunk_has_none_whatever_document_comes_before():
    assert found(Chunks(a="klmn", b="op"), "b0", 100) == []


def test_prefix_neighbours_and_chunk_stay_within_the_window():
    exactly = PREFIX_TOKENS + 3 * CHUNK_TOKENS
    assert found(Chunks(a="klmn"), "a3", 100, exactly) == ["a1", "a2"]
    assert found(Chunks(a="klmn"), "a3", 100, exactly - 1) == ["a2"]
    assert found(Chunks(a="klmn"), "a3", 100, PREFIX_TOKENS + CHUNK_TOKENS) == []


def test_they_are_tokenised_as_prompts_do_it():
    neighbours = ChunkNeighbours(Chunks(a="kl"), Builder(), 100, 1000)  # type: ignore[arg-type]
    assert neighbours("a1") == (Segment((ord("k"),) * 10 + (0,), "a0"),)


def test_they_are_read_once_a_generation():
    chunks = Chunks(a="kl")
    neighbours = ChunkNeighbours(chunks, Builder(), 100, 1000)  # type: ignore[arg-type]
    first = neighbours("a1")
    assert neighbours("a1") == first
    assert chunks.reads == 1
    chunks.documents["a"], chunks.generation = "xl", 2
    assert neighbours("a1") != first


def test_a_chunk_that_has_left_has_none():
    assert found(Chunks(a="kl"), "gone") == []


def test_damaged_neighbours_are_left_out_with_a_warning(caplog):
    chunks = Chunks(a="kl")
    chunks.damaged = "a0"
    with caplog.at_level(logging.WARNING):
        assert found(chunks, "a1") == []
    assert "without its neighbours, which cannot be read" in caplog.text
