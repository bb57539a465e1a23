"""Chunk KV follows the text: it stays where the text stays, and goes where the text goes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from blended_pipeline import ask_all, open_blended, reused, write_documents

from ragkit import Pipeline
from ragkit.generation.engine import Engine

QUESTION = "Where do the otters live?"
EVERYTHING = 100  # more chunks than there are


pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    return write_documents(tmp_path / "docs", [0, 1])


@pytest.fixture
def pipeline(tmp_path: Path, docs: Path, engine: Engine) -> Iterator[Pipeline]:
    """Two documents whose chunks all have KV, in memory and on disk."""
    with open_blended(tmp_path / "store", engine) as pipeline:
        pipeline.ingest([docs])
        assert ask(pipeline)[0] == 0
        pipeline.parts.blending.kv_store.flush()
        yield pipeline


def ask(pipeline: Pipeline) -> tuple[int, int]:
    """Ask a question whose prompt holds every chunk, and return hits and misses."""
    return reused(pipeline.query(QUESTION, k=EVERYTHING))


def edit(path: Path, paragraph: int = 5) -> None:
    """Replace a paragraph by a longer one."""
    paragraphs = path.read_text(encoding="utf-8").split("\n\n")
    paragraphs[paragraph] = f"Nobody expected line {paragraph} to say this now."
    path.write_text("\n\n".join(paragraphs), encoding="utf-8")


def texts_with_kv(pipeline: Pipeline) -> set[str]:
    entries = [entry for _, entry in pipeline.store.kv_listing()]
    return {one.chunk.text for one in pipeline.store.chunks_by_id([entry.chunk_id for entry in entries])}


def texts(pipeline: Pipeline) -> set[str]:
    return {one.chunk.text for one in pipeline.store.chunks(pipeline.store.row_ids())}


@pytest.mark.parametrize("disk_mb", [100, 0])
def test_an_edit_costs_the_kv_of_the_edited_chunk_alone(
    tmp_path: Path, docs: Path, engine: Engine, disk_mb: int
) -> None:
    with open_blended(tmp_path / "store", engine, disk_mb=disk_mb) as pipeline:
        pipeline.ingest([docs])
        _, chunks = ask(pipeline)
        before = texts(pipeline)
        edit(docs / "0.txt")
        assert pipeline.ingest([docs]).updated == 1
        assert len(texts(pipeline) - before) == 1
        assert ask(pipeline) == (chunks - 1, 1)
        edit(docs / "0.txt", 7)  # what was handed on once is handed on again
        pipeline.ingest([docs])
        assert ask(pipeline) == (chunks - 1, 1)


def test_after_an_edit_the_kv_on_disk_is_that_of_the_present_text(
    tmp_path: Path, docs: Path, pipeline: Pipeline, engine: Engine
) -> None:
    before = texts(pipeline)
    edit(docs / "0.txt")
    pipeline.ingest([docs])
    assert texts_with_kv(pipeline) == texts(pipeline) & before
    pipeline.close()
    with open_blended(tmp_path / "store", engine) as again:
        hits, misses = ask(again)
        assert (hits, misses) == (len(before) - 1, 1)


def test_an_edit_by_another_process_leaves_no_old_text_in_memory(
    tmp_path: Path, docs: Path, pipeline: Pipeline, engine: Engine
) -> None:
    memory = pipeline.parts.blending.kv_store.memory
    with open_blended(tmp_path / "store", engine) as other:
        edit(docs / "0.txt")
        other.ingest([docs])
    assert len(memory.refs()) == len(texts(pipeline))
    hits, misses = ask(pipeline)
    assert (hits, misses) == (len(texts(pipeline)) - 1, 1)
    known = pipeline.store.known_chunks([ref.chunk_id for ref in memory.refs()])
    assert {ref.chunk_id for ref in memory.refs()} == known


@pytest.mark.parametrize("erase", [False, True])
def test_a_removed_document_leaves_no_kv_in_memory_or_on_disk(pipeline: Pipeline, docs: Path, erase: bool) -> None:
    held = len(pipeline.parts.blending.kv_store.memory)
    pipeline.remove([str(docs / "0.txt")], erase=erase)
    memory = pipeline.parts.blending.kv_store.memory
    assert len(memory) == held / 2
    assert len(pipeline.store.known_chunks([ref.chunk_id for ref in memory.refs()])) == held / 2
    with_kv = texts_with_kv(pipeline)
    assert with_kv <= texts(pipeline) if erase else with_kv == texts(pipeline)  # erasure takes whole files
    assert ask(pipeline) == (held / 2, 0)


def test_a_pruned_document_leaves_no_kv(pipeline: Pipeline, docs: Path) -> None:
    (docs / "0.txt").unlink()
    assert pipeline.ingest([docs], prune=True).removed == 1
    assert len(pipeline.parts.blending.kv_store.memory) == len(texts(pipeline))
    assert texts_with_kv(pipeline) == texts(pipeline)


def test_of_two_documents_with_the_same_text_one_can_go(tmp_path: Path, docs: Path, pipeline: Pipeline) -> None:
    (docs / "copy.txt").write_text((docs / "0.txt").read_text() + "\n\nWith an ending of its own, this one.\n")
    pipeline.ingest([docs])
    shared = texts_with_kv(pipeline)
    pipeline.remove([str(docs / "0.txt")])
    assert texts_with_kv(pipeline) >= shared & texts(pipeline)
    assert len(shared & texts(pipeline)) > 15


def test_a_renamed_document_keeps_all_of_its_kv(pipeline: Pipeline, docs: Path) -> None:
    hits, _ = ask(pipeline)
    (docs / "0.txt").rename(docs / "other.txt")
    assert pipeline.ingest([docs]).relinked == 1
    assert ask(pipeline) == (hits, 0)


def test_edits_change_no_answer(tmp_path: Path, docs: Path, pipeline: Pipeline, engine: Engine) -> None:
    edit(docs / "0.txt")
    pipeline.ingest([docs])
    assert ask(pipeline)[0] > 0
    with open_blended(tmp_path / "store", engine, memory_mb=0, disk_mb=0) as cold:
        assert ask_all(pipeline) == ask_all(cold)
