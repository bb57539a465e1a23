"""Ingest from URLs, databases and given documents: in step like files, fetched only when something is new."""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest
from doubles import HashEmbedder, WordTokenizer

from ragkit import Document, Pipeline
from ragkit.config import ChunkingConfig, IngestConfig, PipelineConfig
from ragkit.errors import OfflineError, UsageError
from ragkit.readers import read_llama_index, sql_source
from ragkit.readers.remote_file import RemoteFile

CONFIG = PipelineConfig(chunking=ChunkingConfig(max_tokens=40), ingest=IngestConfig(lock_timeout_s=1.0))


@pytest.fixture
def memory() -> Iterator[fsspec.AbstractFileSystem]:
    files = fsspec.filesystem("memory")
    for name in ("frogs.md", "sub/stars.txt"):
        files.pipe_file(f"/lib/{name}", f"What {name} says. {name} ".encode() * 20)
    yield files
    for path in list(files.store):
        del files.store[path]


@pytest.fixture
def embedder() -> HashEmbedder:
    return HashEmbedder()


@pytest.fixture
def pipeline(tmp_path: Path, embedder: HashEmbedder) -> Iterator[Pipeline]:
    with Pipeline.open(tmp_path / "store", CONFIG, embedder=embedder, tokenizer=WordTokenizer()) as pipeline:
        yield pipeline


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The objects that are fetched."""
    names: list[str] = []
    fetch = RemoteFile._fetch

    def counted(self, uri, spool):
        names.append(uri)
        return fetch(self, uri, spool)

    monkeypatch.setattr(RemoteFile, "_fetch", counted)
    return names


def uris(pipeline: Pipeline) -> list[str]:
    return [record.uri for record in pipeline.documents()]


def test_objects_are_fetched_once_and_then_only_when_they_change(pipeline, memory, fetched, embedder):
    first = pipeline.ingest(["memory://lib"])
    assert (first.added, first.failed) == (2, ())
    assert uris(pipeline) == ["memory://lib/frogs.md", "memory://lib/sub/stars.txt"]
    embedded, generation = embedder.texts_embedded, pipeline.store.generation
    del fetched[:]
    assert pipeline.ingest(["memory://lib"]).unchanged == 2
    assert (fetched, embedder.texts_embedded, pipeline.store.generation) == ([], embedded, generation)
    memory.pipe_file("/lib/frogs.md", b"Toads, rather.")
    report = pipeline.ingest(["memory://lib"])
    assert (report.updated, report.unchanged, fetched) == (1, 1, ["memory://lib/frogs.md"])
    assert pipeline.search("toads").hits[0].uri == "memory://lib/frogs.md"


def test_an_object_that_was_written_again_unchanged_is_fetched_and_left_alone(pipeline, memory, fetched, embedder):
    pipeline.ingest(["memory://lib"])
    embedded, generation = embedder.texts_embedded, pipeline.store.generation
    memory.pipe_file("/lib/frogs.md", memory.cat_file("/lib/frogs.md"))
    del fetched[:]
    report = pipeline.ingest(["memory://lib"])
    assert (report.updated, report.unchanged, fetched) == (0, 2, ["memory://lib/frogs.md"])
    assert (embedder.texts_embedded, pipeline.store.generation) == (embedded, generation)
    del fetched[:]
    assert pipeline.ingest(["memory://lib"]).unchanged == 2
    assert fetched == []  # its new time is known now


def test_what_is_gone_from_below_a_url_is_pruned(pipeline, memory):
    pipeline.ingest(["memory://lib"])
    pipeline.ingest([Document.from_text("Other.", "memory://library/other.txt")])
    memory.rm_file("/lib/frogs.md")
    assert pipeline.ingest(["memory://lib"]).removed == 0
    assert pipeline.ingest(["memory://lib/"], prune=True).removed == 1
    assert uris(pipeline) == ["memory://lib/sub/stars.txt", "memory://library/other.txt"]


def test_a_file_here_is_no_rename_of_an_object_elsewhere(pipeline, memory, tmp_path):
    pipeline.ingest(["memory://lib"])
    (tmp_path / "frogs.md").write_bytes(memory.cat_file("/lib/frogs.md"))
    report = pipeline.ingest([tmp_path / "frogs.md"])
    assert (report.added, report.relinked) == (1, 0)
    assert len(uris(pipeline)) == 3


def test_an_object_that_cannot_be_fetched_costs_only_itself(pipeline, memory, monkeypatch):
    fetch = RemoteFile._fetch

    def failing(self, uri, spool):
        if "frogs" in uri:
            raise self._unreadable(uri, TimeoutError("no answer within 10 s"))
        return fetch(self, uri, spool)

    monkeypatch.setattr(RemoteFile, "_fetch", failing)
    report = pipeline.ingest(["memory://lib"])
    assert [(one.uri, one.code, one.message) for one in report.failed] == [
        ("memory://lib/frogs.md", "unreadable", "memory://lib/frogs.md: no answer within 10 s")
    ]
    assert report.added == 1
    monkeypatch.undo()
    assert pipeline.ingest(["memory://lib"], retry_failed=True).added == 1


def test_credentials_are_neither_stored_nor_logged_nor_reported(pipeline, monkeypatch, caplog, tmp_path):
    class Bucket(fsspec.get_filesystem_class("memory")):
        protocol = "bucket"
        cachable = False

        def info(self, path, **named):
            return {"name": path, "size": 5, "type": "file", "ETag": "1"}

        def open(self, path, mode="rb", **named):
            raise PermissionError(f"key sesame of {path} refused for bucket://me:hunter2@b/x?token=sesame")

    fsspec.register_implementation("bucket", Bucket, clobber=True)
    caplog.set_level(logging.DEBUG)
    said: list[str] = []

    class Hearing:
        def start(self, *_, **__): ...
        def advance(self, *_, **__): ...
        def close(self): ...
        def message(self, text):
            said.append(text)

    report = pipeline.ingest(["bucket://me:hunter2@b/x.txt?token=sesame"], progress=Hearing())
    assert [one.uri for one in report.failed] == ["bucket://b/x.txt"]
    everything = [str(report), *said, caplog.text, *map(str, pipeline.documents())]
    everything += [path.read_bytes().decode("latin-1") for path in (tmp_path / "store").rglob("*") if path.is_file()]
    assert said
    for secret in ("hunter2", "sesame"):
        assert [text for text in everything if secret in text] == []


def test_offline_nothing_is_fetched(tmp_path):
    config = replace(CONFIG, offline=True)
    pipeline = Pipeline.open(tmp_path / "store", config, embedder=HashEmbedder(), tokenizer=WordTokenizer())
    with pipeline, pytest.raises(OfflineError, match="s3://bucket/x would have to be fetched"):
        pipeline.ingest(["s3://me:secret@bucket/x"])


def test_rows_of_a_database_stay_in_step(pipeline, tmp_path, embedder):
    path = tmp_path / "notes.db"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE notes (id INTEGER PRIMARY KEY, text TEXT, author TEXT)")
        rows = [(n, f"Note {n} is about newt{n}. " * 5, "Ann") for n in range(30)]
        connection.executemany("INSERT INTO notes VALUES (?,?,?)", rows)
    source = sql_source(f"sqlite:///{path}", "SELECT id, text, author FROM notes")
    report = pipeline.ingest([source])
    assert (report.added, report.failed) == (1, ())
    hit = pipeline.search("newt7", filter={"author": "Ann", "id": 7}).hits[0]
    assert hit.uri.endswith("#id=7")
    embedded, generation = embedder.texts_embedded, pipeline.store.generation
    assert pipeline.ingest([source]).unchanged == 1
    assert (embedder.texts_embedded, pipeline.store.generation) == (embedded, generation)
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE notes SET text = 'Only this one is new.' WHERE id = 3")
        connection.execute("DELETE FROM notes WHERE id = 4")
    connection.close()
    report = pipeline.ingest([source])
    assert (report.updated, report.chunks) == (1, 1)
    assert embedder.texts_embedded == embedded + 1
    assert len(pipeline.store.source_documents(uris(pipeline)[0])) == 29


def test_given_documents_stay_in_step(pipeline, embedder):
    def documents(second: str) -> Iterator[Document]:
        yield Document.from_text("Frogs live in ponds.", "wiki:frogs", metadata={"lang": "en"})
        yield Document.from_text(second, "wiki:stars")

    assert pipeline.ingest([documents("Stars shine.")]).added == 2
    embedded = embedder.texts_embedded
    assert pipeline.ingest([documents("Stars shine.")]).unchanged == 2
    assert embedder.texts_embedded == embedded
    report = pipeline.ingest([documents("Stars shine at night.")])
    assert (report.updated, report.unchanged) == (1, 1)
    assert pipeline.search("ponds", filter={"lang": "en"}).hits[0].uri == "wiki:frogs"
    assert pipeline.remove(["wiki:frogs"]) == ("wiki:frogs",)


def test_a_llama_index_reader_is_a_source(pipeline, tmp_path):
    core = pytest.importorskip("llama_index.core", reason="llama-index-core is not installed")
    (tmp_path / "docs").mkdir()
    for name in ("a", "b"):
        (tmp_path / "docs" / f"{name}.txt").write_text(f"This is {name}.")

    def read():
        return read_llama_index(core.SimpleDirectoryReader(str(tmp_path / "docs")))

    assert pipeline.ingest([read()]).added == 2
    assert pipeline.ingest([read()]).unchanged == 2
    (tmp_path / "docs" / "b.txt").write_text("This is another.")
    report = pipeline.ingest([read()])
    assert (report.updated, report.unchanged) == (1, 1)


def test_a_reader_that_breaks_off_is_reported_and_what_it_gave_stays(pipeline):
    class Broken:
        def load_data(self):
            raise AssertionError("is lazy")

        def lazy_load_data(self):
            yield type("Item", (), {"text": "First.", "metadata": {}, "id_": "one"})()
            raise ConnectionError("the service went away")

    report = pipeline.ingest([read_llama_index(Broken())])
    assert report.added == 1
    assert [(one.uri, one.code) for one in report.failed] == [("Broken", "crash")]
    assert "the service went away" in report.failed[0].message


def test_a_dry_run_fetches_nothing(pipeline, memory, fetched):
    assert pipeline.ingest(["memory://lib"], dry_run=True).added == 2
    assert fetched == []


def test_a_source_is_removed_by_the_url_that_it_was_ingested_by(pipeline, memory):
    pipeline.ingest(["memory://lib/frogs.md"])
    with pytest.raises(UsageError, match=r"memory://lib/other\.md"):
        pipeline.remove(["memory://lib/other.md"])
    assert pipeline.remove(["memory://lib/frogs.md?token=abc"]) == ("memory://lib/frogs.md",)


def test_a_question_may_name_a_document_by_a_signed_url(pipeline, memory):
    from ragkit.answers.options import document_uri

    pipeline.ingest(["memory://lib/frogs.md"])
    assert document_uri(pipeline.parts, "memory://lib/frogs.md?token=sesame") == "memory://lib/frogs.md"
    with pytest.raises(UsageError, match=r"holds no document 'memory://lib/none\.md'"):
        document_uri(pipeline.parts, "memory://lib/none.md?token=sesame")
