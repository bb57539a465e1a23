"""Chunk KV behind neighbours in a store: at first use, ahead, after edits, and as exact as any other when all is
recomputed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from blended_pipeline import QUESTIONS, ask_all, open_blended, reused, write_documents

from ragkit import Pipeline
from ragkit.config import ChunkContextName
from ragkit.generation.engine import Engine

NEIGHBOURS = ChunkContextName.NEIGHBOURS
EVERYTHING = 100  # more chunks than there are


pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    return write_documents(tmp_path / "docs", [0, 1])


@pytest.fixture
def pipeline(tmp_path: Path, docs: Path, engine: Engine) -> Iterator[Pipeline]:
    """Two documents of twelve chunks, without KV."""
    with open_blended(tmp_path / "store", engine, context=NEIGHBOURS, neighbour_tokens=1) as pipeline:
        pipeline.ingest([docs])
        yield pipeline


def ask(pipeline: Pipeline) -> tuple[int, int]:
    """Ask a question whose prompt holds every chunk, and return hits and misses."""
    return reused(pipeline.query(QUESTIONS[0], k=EVERYTHING))


def edit(path: Path, paragraph: int = 5) -> None:
    paragraphs = path.read_text(encoding="utf-8").split("\n\n")
    paragraphs[paragraph] = f"Nobody expected line {paragraph} to say this now."
    path.write_text("\n\n".join(paragraphs), encoding="utf-8")


def test_the_second_question_and_another_process_find_what_the_first_computed(
    tmp_path: Path, pipeline: Pipeline, engine: Engine
) -> None:
    cold = ask_all(pipeline)
    assert reused(pipeline.query(QUESTIONS[0])) == (5, 0)
    pipeline.close()
    with open_blended(tmp_path / "store", engine, context=NEIGHBOURS, neighbour_tokens=1, memory_mb=0) as again:
        assert [reused(again.query(question)) for question in QUESTIONS] == [(5, 0)] * 3
        assert ask_all(again) == cold


def test_other_neighbours_are_other_kv_but_for_the_first_chunk_of_each_document(
    tmp_path: Path, pipeline: Pipeline, engine: Engine
) -> None:
    chunks = sum(ask(pipeline))
    pipeline.close()
    with open_blended(tmp_path / "store", engine) as behind_prefix:
        assert ask(behind_prefix) == (2, chunks - 2)
    with open_blended(tmp_path / "store", engine, context=NEIGHBOURS, neighbour_tokens=1000) as far:
        assert ask(far) == (4, chunks - 4)  # of the second chunks the neighbours are the same, too
    with open_blended(tmp_path / "store", engine, context=NEIGHBOURS, neighbour_tokens=1) as again:
        assert ask(again) == (chunks, 0)


def test_contexts_give_answers_of_their_own_and_with_everything_recomputed_that_of_full_prefill(
    tmp_path: Path, pipeline: Pipeline, engine: Engine
) -> None:
    def answers(pipeline: Pipeline, ratio: float) -> list[str]:
        return [pipeline.query(question, ratio=ratio).text for question in QUESTIONS]

    full = [pipeline.query(question, strategy="full").text for question in QUESTIONS]
    assert answers(pipeline, 1.0) == full
    behind_neighbours = answers(pipeline, 0.0)
    pipeline.close()
    with open_blended(tmp_path / "store", engine) as behind_prefix:
        assert answers(behind_prefix, 0.0) != behind_neighbours


def test_computed_ahead_the_first_question_finds_all_of_it_and_status_counts_it(
    tmp_path: Path, docs: Path, pipeline: Pipeline, engine: Engine
) -> None:
    report = pipeline.ingest([docs], kv=True)
    chunks = pipeline.store.counts().chunks
    assert report.kv is not None
    assert (report.kv.computed, report.kv.present) == (chunks, 0)
    assert pipeline.kv_status().chunks == chunks
    ahead = ask_all(pipeline)
    assert ask(pipeline) == (chunks, 0)
    pipeline.close()
    with open_blended(
        tmp_path / "store", engine, context=NEIGHBOURS, neighbour_tokens=1, memory_mb=0, disk_mb=0
    ) as cold:
        assert ask_all(cold) == ahead


@pytest.mark.parametrize("disk_mb", [100, 0])
def test_an_edit_costs_the_kv_of_the_edited_chunk_and_of_the_one_behind_it(
    tmp_path: Path, docs: Path, engine: Engine, disk_mb: int
) -> None:
    with open_blended(tmp_path / "store", engine, context=NEIGHBOURS, neighbour_tokens=1, disk_mb=disk_mb) as pipeline:
        pipeline.ingest([docs])
        _, chunks = ask(pipeline)
        edit(docs / "0.txt")
        pipeline.ingest([docs])
        assert ask(pipeline) == (chunks - 2, 2)
        edit(docs / "0.txt", 11)  # nothing stands behind it
        pipeline.ingest([docs])
        assert ask(pipeline) == (chunks - 1, 1)


def test_after_an_edit_nothing_is_computed_until_it_is_asked_for(docs: Path, pipeline: Pipeline) -> None:
    pipeline.ingest([docs], kv=True)
    chunks = pipeline.store.counts().chunks
    edit(docs / "0.txt")
    assert pipeline.ingest([docs]).kv is None
    refreshed = pipeline.ingest([docs], kv=True).kv
    assert refreshed is not None
    assert (refreshed.computed, refreshed.present) == (2, chunks - 2)
    assert ask(pipeline) == (chunks, 0)


def test_edits_give_the_answers_of_a_store_that_never_had_kv(
    tmp_path: Path, docs: Path, pipeline: Pipeline, engine: Engine
) -> None:
    ask(pipeline)
    edit(docs / "0.txt")
    pipeline.ingest([docs])
    with open_blended(
        tmp_path / "store", engine, context=NEIGHBOURS, neighbour_tokens=1, memory_mb=0, disk_mb=0
    ) as cold:
        assert ask_all(pipeline) == ask_all(cold)


def test_equal_chunks_behind_equal_neighbours_share_their_kv(tmp_path: Path, docs: Path, pipeline: Pipeline) -> None:
    (docs / "copy.txt").write_text((docs / "0.txt").read_text() + "\n\nWith an ending of its own, this one.\n")
    report = pipeline.ingest([docs], kv=True)
    assert report.kv is not None
    assert report.kv.computed == pipeline.store.counts().chunks - 12 + 1  # the last chunk has another end of line
