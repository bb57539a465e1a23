from __future__ import annotations

from ragkit.retrieval.selection import select_distinct
from ragkit.store.base import StoredChunk
from ragkit.types import Chunk


def stored(row: int, text: str, start: int = 0, stop: int = 0, doc: str = "d") -> StoredChunk:
    return StoredChunk(row, Chunk(str(row), doc, row, text, start, stop or start + 10, 1), "uri", {})


def rows(chunks: list[StoredChunk]) -> list[int]:
    return [chunk.row_id for chunk in chunks]


def test_the_same_text_elsewhere_is_left_out() -> None:
    ranked = [stored(1, "Same text", doc="a"), stored(2, " same\n TEXT ", doc="b"), stored(3, "other", doc="c")]
    assert rows(select_distinct([], ranked, 5)) == [1, 3]


def test_a_chunk_mostly_covered_by_a_better_one_is_left_out() -> None:
    ranked = [stored(1, "a", 0, 100), stored(2, "b", 40, 140), stored(3, "c", 50, 150), stored(4, "d", 60, 80, "other")]
    assert rows(select_distinct([], ranked, 5)) == [1, 3, 4]


def test_what_is_kept_already_counts_and_the_limit_holds() -> None:
    kept = [stored(1, "one", 0, 10)]
    ranked = [stored(2, "one", 50, 60), stored(3, "three", 20, 30), stored(4, "four", 30, 40)]
    assert rows(select_distinct(kept, ranked, 2)) == [1, 3]
