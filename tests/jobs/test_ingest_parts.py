"""Large tables are committed in parts: nothing lost, nothing twice, and never all of their rows in memory."""

from __future__ import annotations

import json
import sqlite3
import threading
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from doubles import HashEmbedder, WordTokenizer

from ragkit import Pipeline
from ragkit.config import ChunkingConfig, PipelineConfig
from ragkit.jobs import local_executor
from ragkit.progress import Silent
from ragkit.readers import sql_source
from ragkit.readers.result import SpilledDocuments
from ragkit.store.base import IndexedDocument, KnownDocument, SourceFailure, SourceUpdate
from ragkit.store.store import Store
from ragkit.types import Chunk, Document, chunk_id_of

CONFIG = PipelineConfig(chunking=ChunkingConfig(max_tokens=30))


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_executor, "PART_DOCUMENTS", 10)


@pytest.fixture
def embedder() -> HashEmbedder:
    return HashEmbedder()


@pytest.fixture
def pipeline(tmp_path: Path, embedder: HashEmbedder) -> Iterator[Pipeline]:
    with Pipeline.open(tmp_path / "store", CONFIG, embedder=embedder, tokenizer=WordTokenizer()) as pipeline:
        yield pipeline


def write(path: Path, rows: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows), encoding="utf-8")
    return path


def rows_of(count: int, changed: tuple[int, ...] = ()) -> list[str]:
    return [f"Row {n} is about newt{n}{' now' * (n in changed)}." for n in range(count)]


def stored(pipeline: Pipeline, path: Path) -> list[tuple[str, str]]:
    store = pipeline.store
    links = store.source_documents(str(path))
    return [(link.uri.rpartition("#")[2], store.document(link.doc_id).text) for link in links]


def expected(rows: list[str]) -> list[tuple[str, str]]:
    return [(f"row={n}", row) for n, row in enumerate(rows, 1)]


def test_a_table_of_many_parts_is_one_source(pipeline: Pipeline, tmp_path: Path):
    table = write(tmp_path / "table.jsonl", rows_of(35))
    report = pipeline.ingest([table])
    assert (report.added, report.updated, report.failed, report.chunks) == (1, 0, (), 35)
    assert stored(pipeline, table) == expected(rows_of(35))
    assert pipeline.store.generation >= 4
    record = pipeline.documents()[0]
    assert (record.documents, record.size) == (35, table.stat().st_size)
    assert pipeline.ingest([table]).unchanged == 1
    assert pipeline.verify().problems == ()


def test_an_edited_table_embeds_its_new_rows_alone_and_loses_its_old_ones(pipeline, embedder, tmp_path):
    table = write(tmp_path / "table.jsonl", rows_of(35))
    pipeline.ingest([table])
    embedded = embedder.texts_embedded
    edited = [*rows_of(33, changed=(4, 21)), "One more."]
    report = pipeline.ingest([write(table, edited)])
    assert (report.added, report.updated, report.chunks) == (0, 1, 3)
    assert embedder.texts_embedded == embedded + 3
    assert stored(pipeline, table) == expected(edited)
    assert pipeline.store.counts().chunks == len(edited)
    assert pipeline.verify().problems == ()


def test_rows_that_stand_in_several_parts_are_stored_once(pipeline, tmp_path):
    rows = ["The same everywhere.", *rows_of(12), "The same everywhere.", *rows_of(12), "The same everywhere."]
    table = write(tmp_path / "table.jsonl", rows)
    report = pipeline.ingest([table])
    assert report.chunks == pipeline.store.counts().chunks == 13
    assert stored(pipeline, table) == expected(rows)


@pytest.mark.parametrize("known_before", [False, True])
def test_a_job_that_is_cut_off_goes_on_without_losing_or_doubling(pipeline, embedder, tmp_path, known_before):
    table = tmp_path / "table.jsonl"
    if known_before:
        pipeline.ingest([write(table, rows_of(15))])
    write(table, rows_of(45, changed=(2,)))
    stop = threading.Event()
    commit, commits = pipeline.store.generation if known_before else 0, []

    class Stopping:
        def start(self, *_, **__): ...
        def close(self): ...
        def message(self, text): ...
        def advance(self, *, tokens=0, **_):
            commits.append(tokens)
            if len(commits) > 25:
                stop.set()

    report = pipeline.ingest([table], stop=stop, progress=Stopping())
    assert report.interrupted
    assert (report.added, report.updated) == (0, 0)
    assert pipeline.store.generation > commit
    half = len(stored(pipeline, table))
    assert 10 <= half < 60
    old = rows_of(15) if known_before else []
    assert [text for _, text in stored(pipeline, table)][: len(old)] == old  # what was there is still found
    embedded = embedder.texts_embedded
    report = pipeline.ingest([table])
    assert (report.added, report.updated) == (0, 1)  # some of it was there
    assert stored(pipeline, table) == expected(rows_of(45, changed=(2,)))
    assert embedder.texts_embedded - embedded < 45  # the rows that were committed are known
    assert pipeline.verify().problems == ()


def test_a_table_that_is_put_back_after_a_cut_off_job_is_as_it_was(pipeline, tmp_path):
    table = write(tmp_path / "table.jsonl", rows_of(15))
    pipeline.ingest([table])
    stop, before = threading.Event(), pipeline.store.generation

    class Stopping(Silent):
        def advance(self, *, tokens=0, **_):
            if pipeline.store.generation > before:
                stop.set()

    write(table, rows_of(45, changed=(2,)))
    assert pipeline.ingest([table], stop=stop, progress=Stopping()).interrupted
    assert len(stored(pipeline, table)) > 15
    write(table, rows_of(15))
    pipeline.ingest([table])
    assert stored(pipeline, table) == expected(rows_of(15))


def test_an_unchanged_query_of_many_rows_changes_nothing(pipeline, embedder, tmp_path):
    with sqlite3.connect(tmp_path / "notes.db") as connection:
        connection.execute("CREATE TABLE notes (id INTEGER PRIMARY KEY, text TEXT)")
        connection.executemany("INSERT INTO notes VALUES (?,?)", enumerate(rows_of(35)))
    connection.close()
    source = sql_source(f"sqlite:///{tmp_path}/notes.db", "SELECT id, text FROM notes")
    assert pipeline.ingest([source]).added == 1
    embedded, generation = embedder.texts_embedded, pipeline.store.generation
    report = pipeline.ingest([source])
    assert (report.unchanged, report.updated) == (1, 0)
    assert (embedder.texts_embedded, pipeline.store.generation) == (embedded, generation)


def test_a_row_that_cannot_be_embedded_fails_the_source_and_keeps_what_came(pipeline, embedder, tmp_path, monkeypatch):
    from ragkit.errors import RetrievalError

    encode = embedder.encode

    def failing(texts, on_tokens=None):
        if any("newt25" in text for text in texts):
            raise RetrievalError("not finite")
        return encode(texts, on_tokens)

    table = write(tmp_path / "table.jsonl", rows_of(35))
    monkeypatch.setattr(embedder, "encode", failing)
    report = pipeline.ingest([table])
    assert [(one.stage, one.message) for one in report.failed] == [("embed", "not finite")]
    assert stored(pipeline, table) == expected(rows_of(20))
    monkeypatch.undo()
    assert pipeline.ingest([table], retry_failed=True).added == 1
    assert stored(pipeline, table) == expected(rows_of(35))


def test_memory_follows_the_part_and_not_the_table(pipeline, tmp_path, monkeypatch):
    def peak(rows: int) -> int:
        table = write(tmp_path / f"{rows}.jsonl", [f"{n} " + "word " * 600 for n in range(rows)])
        tracemalloc.start()
        try:
            assert pipeline.ingest([table]).failed == ()
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    monkeypatch.setattr(SpilledDocuments.__init__, "__defaults__", (1 << 16,))
    _, small, large = peak(20), peak(40), peak(160)  # what is imported on the way counts in the first
    assert large < 1.5 * small


def test_parts_are_the_writers_business(tmp_path: Path):
    def indexed(text: str) -> IndexedDocument:
        document = Document.from_text(text, f"t#{text}")
        span = (0, len(text))
        chunk = Chunk(chunk_id_of(document.doc_id, *span), document.doc_id, 0, text, *span, 1)
        return IndexedDocument(document, [chunk], np.ones((1, 2), np.float32))

    def update(*texts: str, more: bool = False, digest: str = "new") -> SourceUpdate:
        return SourceUpdate("t", digest, 9, 1, recipe="r", documents=tuple(map(indexed, texts)), more=more)

    def found(store: Store) -> list[str]:
        return [store.document(link.doc_id).text for link in store.source_documents("t")]

    store = Store.create(tmp_path / "store")
    with store.writer() as writer:
        writer.configure(embedder_id="e", dim=2, chunker="c", chunker_fingerprint="", tokenizer_id="")
        writer.commit([update("old", "kept", digest="old")])
        first = writer.commit([update("a", more=True)])
        assert (first.added, first.updated) == ((), ())
        assert found(store) == ["old", "kept", "a"]
        assert store.source("t").content_sha256 == ""  # whatever it is next time, it is read
    with store.writer() as writer:  # the first pass was cut off
        writer.commit([update("a", "b", more=True)])
        known = KnownDocument(indexed("kept").document.doc_id, "t#kept")
        last = writer.commit([SourceUpdate("t", "new", 9, 1, recipe="r", documents=(known,))])
    assert (last.added, last.updated) == ((), ("t",))
    assert found(store) == ["a", "b", "kept"]
    assert store.source("t").content_sha256 == "new"
    assert store.counts().documents == 3
    with store.writer() as writer:
        writer.commit([update("c", more=True)])
        writer.commit([SourceUpdate("t", "newer", 9, 1, failure=SourceFailure("oom", "embed", "too much"))])
        assert found(store) == ["a", "b", "kept", "c"]
        writer.commit([update("d")])
    assert found(store) == ["d"]
    assert store.verify().problems == ()
