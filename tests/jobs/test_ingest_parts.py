"""Large tables come in parts and become visible at once: nothing half-done is seen, lost or embedded twice.

Nor are all of their rows ever in memory.
"""

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
from ragkit.errors import StoreCorruptError, UsageError
from ragkit.jobs import local_executor
from ragkit.progress import Silent
from ragkit.readers import sql_source
from ragkit.readers.result import SpilledDocuments
from ragkit.store import publishing
from ragkit.store.base import IndexedDocument, KnownDocument, SourceFailure, SourceUpdate
from ragkit.store.staging import STAGED
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
    assert not (pipeline.folder / STAGED).exists()
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
    stop, commits = threading.Event(), []
    before = pipeline.store.generation if known_before else None

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
    if before is not None:
        assert pipeline.store.generation == before
    assert stored(pipeline, table) == (expected(rows_of(15)) if known_before else [])  # what was there, and no more
    assert len(pipeline.documents()) == known_before
    embedded = embedder.texts_embedded
    report = pipeline.ingest([table])
    assert (report.added, report.updated) == (not known_before, known_before)
    assert stored(pipeline, table) == expected(rows_of(45, changed=(2,)))
    assert embedder.texts_embedded - embedded <= 25  # the rows of two parts are known
    assert not (pipeline.folder / STAGED).exists()
    assert pipeline.verify().problems == ()


def cut_off(pipeline: Pipeline, table: Path) -> None:
    """Ingest a table and stop behind its first parts."""
    stop, seen = threading.Event(), []

    class Stopping(Silent):
        def advance(self, *, tokens=0, **_):
            seen.append(tokens)
            if len(seen) > 25:
                stop.set()

    assert pipeline.ingest([table], stop=stop, progress=Stopping()).interrupted
    assert (pipeline.folder / STAGED).exists()


def test_a_table_that_is_put_back_after_a_cut_off_job_is_as_it_was(pipeline, tmp_path):
    table = write(tmp_path / "table.jsonl", rows_of(15))
    pipeline.ingest([table])
    generation = pipeline.store.generation
    cut_off(pipeline, write(table, rows_of(45, changed=(2,))))
    write(table, rows_of(15))
    assert pipeline.ingest([table]).unchanged == 1
    assert stored(pipeline, table) == expected(rows_of(15))
    assert pipeline.store.generation == generation


def test_a_table_that_shrinks_after_a_cut_off_job_takes_what_waits_and_leaves_nothing(pipeline, embedder, tmp_path):
    table = write(tmp_path / "table.jsonl", rows_of(45))
    cut_off(pipeline, table)
    embedded = embedder.texts_embedded
    assert pipeline.ingest([write(table, rows_of(8))]).added == 1
    assert embedder.texts_embedded == embedded
    assert stored(pipeline, table) == expected(rows_of(8))
    assert not (pipeline.folder / STAGED).exists()


def test_what_waits_goes_with_gc_with_an_erasure_and_with_another_embedder(tmp_path, embedder):
    for forget in ("gc", "erase", "reembed"):
        folder, table = tmp_path / forget, write(tmp_path / "table.jsonl", rows_of(15))
        other = write(tmp_path / "other.txt", ["Another."])
        with Pipeline.open(folder, CONFIG, embedder=embedder, tokenizer=WordTokenizer()) as pipeline:
            pipeline.ingest([table, other])
            cut_off(pipeline, write(table, rows_of(45, changed=tuple(range(45)))))
            if forget == "gc":
                assert pipeline.gc().bytes_freed > 0
            elif forget == "erase":
                pipeline.remove([str(other)], erase=True)
        if forget == "reembed":
            wider = HashEmbedder(dim=2 * embedder.dim)
            with Pipeline.open(folder, CONFIG, embedder=wider, tokenizer=WordTokenizer()) as pipeline:
                pipeline.ingest([other], reembed=True)
        assert not (folder / STAGED).exists(), forget


def test_rows_that_rotted_while_they_waited_are_dropped_and_read_again(pipeline, tmp_path):
    table = write(tmp_path / "table.jsonl", rows_of(45))
    cut_off(pipeline, table)
    with sqlite3.connect(pipeline.folder / STAGED) as connection:
        connection.execute("UPDATE documents SET text = 'rotten' WHERE doc_key = 7")
    connection.close()
    with pytest.raises(StoreCorruptError, match="run the same ingest again"):
        pipeline.ingest([table])
    assert pipeline.ingest([table]).added == 1
    assert stored(pipeline, table) == expected(rows_of(45))


def test_a_file_that_is_no_catalogue_of_what_waits_is_dropped(pipeline, tmp_path):
    table = write(tmp_path / "table.jsonl", rows_of(45))
    pipeline.parts.create_store()
    (pipeline.folder / STAGED).write_bytes(b"half of something" * 100)
    assert pipeline.ingest([table]).added == 1
    assert stored(pipeline, table) == expected(rows_of(45))


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


def test_a_row_that_cannot_be_embedded_fails_the_source_which_shows_nothing_until_it_is_whole(
    pipeline, embedder, tmp_path, monkeypatch
):
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
    assert stored(pipeline, table) == []
    monkeypatch.undo()
    embedded = embedder.texts_embedded
    monkeypatch.setattr(local_executor, "PART_DOCUMENTS", 10)
    assert pipeline.ingest([table], retry_failed=True).added == 1
    assert stored(pipeline, table) == expected(rows_of(35))
    assert embedder.texts_embedded == embedded + 15  # those of the parts that came are known


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
    monkeypatch.setattr(publishing, "SEGMENT_BYTES", 1 << 14)
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
        assert (first.added, first.updated, first.rows) == ((), (), 0)
        assert found(store) == ["old", "kept"]
        assert store.source("t").content_sha256 == "old"
    with store.writer() as writer:  # the first pass was cut off
        waiting = KnownDocument(indexed("a").document.doc_id, "t#a")
        assert writer.staged_recipe(waiting.doc_id) == "r"
        writer.commit([SourceUpdate("t", "new", 9, 1, recipe="r", documents=(waiting, indexed("b")), more=True)])
        known = KnownDocument(indexed("kept").document.doc_id, "t#kept")
        last = writer.commit([SourceUpdate("t", "new", 9, 1, recipe="r", documents=(known,))])
        assert writer.staged_recipe(waiting.doc_id) is None
    assert (last.added, last.updated, last.rows) == ((), ("t",), 2)
    assert found(store) == ["a", "b", "kept"]
    assert store.source("t").content_sha256 == "new"
    assert store.counts().documents == 3
    with store.writer() as writer:
        writer.commit([update("c", more=True)])
        writer.commit([SourceUpdate("t", "newer", 9, 1, failure=SourceFailure("oom", "embed", "too much"))])
        assert found(store) == ["a", "b", "kept"]
        writer.commit([update("d", more=True)])
        with pytest.raises(UsageError, match="each part by itself"):
            writer.commit([update("e"), SourceUpdate("u", "u", 1, 1, recipe="r")])
        writer.commit([update("e")])
    assert found(store) == ["d", "e"]  # c came before the failure, and is not of this content
    assert store.verify().problems == ()


def test_a_document_that_waits_is_at_hand_for_other_sources(tmp_path: Path):
    store = Store.create(tmp_path / "store")
    document = Document.from_text("the same", "t#1")
    chunk = Chunk(chunk_id_of(document.doc_id, 0, 8), document.doc_id, 0, "the same", 0, 8, 1)
    with store.writer() as writer:
        writer.configure(embedder_id="e", dim=2, chunker="c", chunker_fingerprint="", tokenizer_id="")
        item = IndexedDocument(document, [chunk], np.ones((1, 2), np.float32))
        writer.commit([SourceUpdate("t", "t", 9, 1, recipe="r", documents=(item,), more=True)])
        known = KnownDocument(document.doc_id, "u")
        report = writer.commit([SourceUpdate("u", "u", 8, 1, recipe="r", documents=(known,))])
    assert (report.added, report.rows) == (("u",), 1)
    assert [one.chunk.text for one in store.chunks(store.row_ids())] == ["the same"]
