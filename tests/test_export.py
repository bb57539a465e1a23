"""Exports hold the store's chunks or documents, appear whole or not at all, and can be ingested again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest
from doubles import HashEmbedder, WordTokenizer

from ragkit import Document, PageSpan, Pipeline
from ragkit import export as exporting
from ragkit.config import ChunkingConfig, PipelineConfig
from ragkit.errors import JobError, StoreMissingError, StoreSpaceError, UsageError

CONFIG = PipelineConfig(chunking=ChunkingConfig(max_tokens=20))
DOCUMENTS = [
    Document.from_text("Frogs live in ponds. " * 9, "wiki:frogs", (PageSpan(1, 0, 90), PageSpan(2, 90, 189)), {"n": 1}),
    Document.from_text("# Stars\n\nStars shine at night. They are far away.", "wiki:stars", metadata={"lang": "de"}),
]


@pytest.fixture
def pipeline(tmp_path: Path) -> Iterator[Pipeline]:
    with Pipeline.open(tmp_path / "store", CONFIG, embedder=HashEmbedder(), tokenizer=WordTokenizer()) as pipeline:
        pipeline.ingest([DOCUMENTS])
        yield pipeline


def test_chunks_come_with_their_text_places_metadata_and_vectors(pipeline: Pipeline, tmp_path: Path):
    report = pipeline.export(tmp_path / "chunks.parquet", vectors=True)
    table = pq.read_table(tmp_path / "chunks.parquet")
    rows = table.to_pylist()
    assert report.rows == table.num_rows == pipeline.store.counts().chunks > 5
    assert report.bytes == (tmp_path / "chunks.parquet").stat().st_size
    texts = {document.uri: document.text for document in DOCUMENTS}
    assert all(row["text"] == texts[row["uri"]][row["char_start"] : row["char_stop"]] for row in rows)
    assert {row["page"] for row in rows if row["uri"] == "wiki:frogs"} == {1, 2}
    assert {row["metadata"] for row in rows} == {'{"n": 1}', '{"lang": "de"}'}
    embedded = HashEmbedder().encode([row["text"] for row in rows])
    assert np.abs(np.array([row["vector"] for row in rows]) - embedded).max() < 1e-6
    facts = json.loads(table.schema.metadata[b"ragkit"])
    assert (facts["embedder"], facts["generation"]) == ("hash@16", pipeline.store.generation)


def test_chunks_come_without_vectors_where_none_are_asked_for(pipeline: Pipeline, tmp_path: Path):
    pipeline.export(tmp_path / "chunks.parquet")
    assert "vector" not in pq.read_schema(tmp_path / "chunks.parquet").names


def test_documents_come_whole_with_their_pages(pipeline: Pipeline, tmp_path: Path):
    report = pipeline.export(tmp_path / "documents.parquet", kind="documents")
    rows = pq.read_table(tmp_path / "documents.parquet").to_pylist()
    assert report.rows == 2
    assert {(row["uri"], row["text"], row["doc_id"]) for row in rows} == {
        (document.uri, document.text, document.doc_id) for document in DOCUMENTS
    }
    assert rows[0]["pages"][1] == {"number": 2, "char_start": 90, "char_stop": 189}
    assert json.loads(rows[1]["metadata"]) == {"lang": "de"}


def test_an_export_can_be_ingested_into_another_store(pipeline: Pipeline, tmp_path: Path):
    pipeline.export(tmp_path / "documents.parquet", kind="documents")
    with Pipeline.open(tmp_path / "other", CONFIG, embedder=HashEmbedder(), tokenizer=WordTokenizer()) as other:
        assert other.ingest([tmp_path / "documents.parquet"]).added == 1
        links = other.store.source_documents(str(tmp_path / "documents.parquet"))
        assert [other.store.document(link.doc_id).text for link in links] == [one.text for one in DOCUMENTS]


def test_rows_are_written_in_groups(pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(exporting, "_BATCH_ROWS", 4)
    report = pipeline.export(tmp_path / "chunks.parquet", vectors=True)
    file = pq.ParquetFile(tmp_path / "chunks.parquet")
    assert file.num_row_groups == -(-report.rows // 4)
    assert [row["index"] for row in file.read().to_pylist() if row["uri"] == "wiki:frogs"] == list(range(5))


def test_an_export_goes_to_any_file_system(pipeline: Pipeline):
    report = pipeline.export("memory://out/deep/chunks.parquet?token=sesame")
    files = fsspec.filesystem("memory")
    assert report.target == "memory://out/deep/chunks.parquet"
    found = files.find("/out")
    assert len(found) == 1
    assert files.info(found[0])["size"] == report.bytes
    files.rm("/out", recursive=True)


@pytest.mark.parametrize("name", ["[2024] chunks.parquet", "all*?.parquet"])
def test_an_export_takes_a_name_at_a_url_as_it_is(pipeline: Pipeline, name: str):
    files = fsspec.filesystem("memory")
    files.pipe_file("/out/2 chunks.parquet", b"another")
    pipeline.export(f"memory://out/{name}")
    assert sorted(files.find("/out")) == sorted([f"/out/{name}", "/out/2 chunks.parquet"])
    assert files.cat_file("/out/2 chunks.parquet") == b"another"
    files.rm("/out", recursive=True)


def test_an_export_that_fails_leaves_the_old_file_and_nothing_else(pipeline, tmp_path, monkeypatch):
    target = tmp_path / "out" / "chunks.parquet"
    target.parent.mkdir()
    pipeline.export(target)
    before = target.read_bytes()

    def failing(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq.ParquetWriter, "write_batch", failing)
    with pytest.raises(StoreSpaceError, match=r"the export does not fit in .*out: No space left"):
        pipeline.export(target)
    assert [path.name for path in target.parent.iterdir()] == ["chunks.parquet"]
    assert target.read_bytes() == before


def test_a_failed_upload_is_one_line_and_leaves_nothing(pipeline, monkeypatch):
    files = fsspec.filesystem("memory")

    def failing(self, source, target):
        raise PermissionError("key sesame refused")

    monkeypatch.setattr(type(files), "cp_file", failing)
    with pytest.raises(JobError, match=r"^memory://up/c\.parquet could not be written: key \*\*\* refused$"):
        pipeline.export("memory://up/c.parquet?api_key=sesame")
    assert files.find("/up") == []


@pytest.mark.parametrize(
    ("target", "options", "said"),
    [
        (".", {}, "is a folder"),
        ("none/x.parquet", {}, "does not exist"),
        ("x.parquet", {"kind": "words"}, "take one of chunks, documents"),
        ("x.parquet", {"kind": "documents", "vectors": True}, "documents have no vectors"),
        ("nosuch://x", {}, "URL that fsspec knows"),
    ],
)
def test_impossible_exports_are_refused(pipeline, tmp_path, monkeypatch, target, options, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=said):
        pipeline.export(target, **options)


def test_without_a_store_there_is_nothing_to_export(tmp_path: Path):
    with Pipeline.open(tmp_path / "none", CONFIG) as pipeline, pytest.raises(StoreMissingError):
        pipeline.export(tmp_path / "x.parquet")
