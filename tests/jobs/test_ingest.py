"""Ingest keeps a store in step with files: by content, one bad source at a time, nothing half-done."""

from __future__ import annotations

import random
import threading
from pathlib import Path

import numpy as np
import pytest
from doubles import HashEmbedder, WordTokenizer

from ragkit import Pipeline
from ragkit.config import ChunkingConfig, EmbeddingConfig, IngestConfig, PipelineConfig
from ragkit.errors import EmbedderMismatchError, RetrievalError, UsageError
from ragkit.store.base import SourceStatus

CONFIG = PipelineConfig(chunking=ChunkingConfig(max_tokens=40), ingest=IngestConfig(lock_timeout_s=1.0))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "docs"
    folder.mkdir()
    (folder / "frogs.md").write_text("# Frogs\n\nFrogs live in ponds. They eat flies.\n")
    (folder / "stars.txt").write_text("Stars shine at night. The Sun is a star.\n" * 20)
    return folder


def open_pipeline(tmp_path: Path, embedder: HashEmbedder | None = None) -> Pipeline:
    return Pipeline.open(tmp_path / "store", CONFIG, embedder=embedder or HashEmbedder(), tokenizer=WordTokenizer())


def texts(pipeline: Pipeline) -> dict[str, str]:
    store = pipeline.store
    found = {}
    for record in store.sources():
        for link in store.source_documents(record.uri):
            found[Path(link.uri).name] = store.document(link.doc_id).text
    return found


def test_a_folder_is_ingested_and_its_text_comes_back_unchanged(tmp_path: Path, folder: Path) -> None:
    with open_pipeline(tmp_path) as pipeline:
        report = pipeline.ingest([folder])
        assert (report.added, report.failed) == (2, ())
        assert texts(pipeline) == {path.name: path.read_text() for path in folder.iterdir()}
        assert report.chunks == pipeline.store.counts().chunks > 10


@pytest.mark.parametrize("kind", [str, Path])
def test_one_source_need_not_stand_in_a_list(tmp_path: Path, folder: Path, kind: type[str] | type[Path]) -> None:
    with open_pipeline(tmp_path) as pipeline:
        assert pipeline.ingest(kind(folder)).added == 2


def test_unchanged_files_are_skipped_by_content(tmp_path: Path, folder: Path) -> None:
    embedder = HashEmbedder()
    with open_pipeline(tmp_path, embedder) as pipeline:
        pipeline.ingest([folder])
        embedded, generation = embedder.texts_embedded, pipeline.store.generation
        report = pipeline.ingest([folder])
        assert (report.added, report.updated, report.unchanged) == (0, 0, 2)
        assert embedder.texts_embedded == embedded
        assert pipeline.store.generation == generation


def test_a_touched_file_is_unchanged(tmp_path: Path, folder: Path) -> None:
    with open_pipeline(tmp_path) as pipeline:
        pipeline.ingest([folder])
        frogs = folder / "frogs.md"
        frogs.write_text(frogs.read_text())
        assert pipeline.ingest([folder]).unchanged == 2


def test_a_renamed_file_is_linked_again_without_embedding(tmp_path: Path, folder: Path) -> None:
    embedder = HashEmbedder()
    with open_pipeline(tmp_path, embedder) as pipeline:
        pipeline.ingest([folder])
        embedded = embedder.texts_embedded
        (folder / "frogs.md").rename(folder / "toads.md")
        report = pipeline.ingest([folder])
        assert (report.added, report.relinked, report.removed) == (0, 1, 0)
        assert embedder.texts_embedded == embedded
        assert set(texts(pipeline)) == {"toads.md", "stars.txt"}


def test_a_copy_of_a_file_is_linked_without_embedding(tmp_path: Path, folder: Path) -> None:
    embedder = HashEmbedder()
    with open_pipeline(tmp_path, embedder) as pipeline:
        pipeline.ingest([folder])
        embedded = embedder.texts_embedded
        (folder / "copy.txt").write_bytes((folder / "stars.txt").read_bytes())
        report = pipeline.ingest([folder])
        assert (report.added, report.chunks) == (1, 0)
        assert embedder.texts_embedded == embedded
        assert texts(pipeline)["copy.txt"] == texts(pipeline)["stars.txt"]


def test_two_equal_new_files_are_embedded_once(tmp_path: Path, folder: Path) -> None:
    embedder = HashEmbedder()
    (folder / "copy.txt").write_bytes((folder / "stars.txt").read_bytes())
    with open_pipeline(tmp_path, embedder) as pipeline:
        report = pipeline.ingest([folder])
        assert (report.added, report.failed) == (3, ())
        assert embedder.texts_embedded == pipeline.store.counts().chunks
        assert texts(pipeline)["copy.txt"] == texts(pipeline)["stars.txt"]


def test_an_edited_file_is_replaced(tmp_path: Path, folder: Path) -> None:
    with open_pipeline(tmp_path) as pipeline:
        pipeline.ingest([folder])
        (folder / "frogs.md").write_text("Frogs sing.")
        report = pipeline.ingest([folder])
        assert (report.added, report.updated, report.unchanged) == (0, 1, 1)
        assert texts(pipeline)["frogs.md"] == "Frogs sing."
        assert not pipeline.store.match('"flies"', 10)[0].size


def test_a_deleted_file_is_kept_unless_pruned(tmp_path: Path, folder: Path) -> None:
    outside = tmp_path / "outside.txt"
    outside.write_text("Not below the folder.")
    with open_pipeline(tmp_path) as pipeline:
        pipeline.ingest([folder, outside])
        (folder / "frogs.md").unlink()
        assert pipeline.ingest([folder]).removed == 0
        assert "frogs.md" in texts(pipeline)
        assert pipeline.ingest([folder], prune=True).removed == 1
        assert set(texts(pipeline)) == {"stars.txt", "outside.txt"}


def test_other_chunking_makes_every_source_an_update(tmp_path: Path, folder: Path) -> None:
    with open_pipeline(tmp_path) as pipeline:
        pipeline.ingest([folder])
    config = PipelineConfig(chunking=ChunkingConfig(max_tokens=20))
    with Pipeline.open(tmp_path / "store", config, embedder=HashEmbedder(), tokenizer=WordTokenizer()) as pipeline:
        assert pipeline.ingest([folder]).updated == 2
        chunks = pipeline.store.chunks(pipeline.store.row_ids())
        assert max(stored.chunk.token_count for stored in chunks) <= 20


def test_one_bad_source_never_stops_the_others(tmp_path: Path, folder: Path) -> None:
    (folder / "broken.pdf").write_bytes(b"%PDF-1.7\nthis is no PDF")
    (folder / "empty.txt").write_bytes(b"")
    with open_pipeline(tmp_path) as pipeline:
        report = pipeline.ingest([folder])
        assert report.added == 2
        assert {Path(failure.uri).name: failure.code for failure in report.failed} == {
            "broken.pdf": "corrupt",
            "empty.txt": "empty",
        }
        assert len(pipeline.store.sources(SourceStatus.FAILED)) == 2


def test_a_picture_in_a_folder_is_skipped_and_one_that_is_named_fails(tmp_path: Path, folder: Path) -> None:
    picture = folder / "frog.png"
    picture.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(64))
    with open_pipeline(tmp_path) as pipeline:
        report = pipeline.ingest([folder])
        assert (report.added, report.skipped, report.failed) == (2, 1, ())
        assert pipeline.store.source(str(picture)) is None
        report = pipeline.ingest([picture])
        assert [failure.code for failure in report.failed] == ["unsupported"]


def test_a_link_out_of_the_folder_is_not_followed_and_said(tmp_path: Path, folder: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("Not for everybody.")
    (folder / "link.txt").symlink_to(secret)
    with open_pipeline(tmp_path) as pipeline:
        report = pipeline.ingest([folder])
        assert report.added == 2
        assert any("link.txt" in warning for warning in report.warnings)


def test_a_known_failure_is_named_again_and_read_again_on_demand(tmp_path: Path, folder: Path) -> None:
    (folder / "empty.txt").write_bytes(b"")
    with open_pipeline(tmp_path) as pipeline:
        pipeline.ingest([folder])
        again = pipeline.ingest([folder])
        assert [failure.code for failure in again.failed] == ["empty"]
        assert "--retry-failed" in again.failed[0].message
        assert pipeline.store.source(str(folder / "empty.txt")).attempts == 1
        pipeline.ingest([folder], retry_failed=True)
        assert pipeline.store.source(str(folder / "empty.txt")).attempts == 2
        (folder / "empty.txt").write_text("No longer empty.")
        assert pipeline.ingest([folder]).failed == ()


def test_a_failed_change_leaves_the_old_text_visible(tmp_path: Path, folder: Path) -> None:
    with open_pipeline(tmp_path) as pipeline:
        pipeline.ingest([folder])
        before = texts(pipeline)
        (folder / "frogs.md").write_bytes(b"")
        report = pipeline.ingest([folder])
        assert [failure.code for failure in report.failed] == ["empty"]
        assert texts(pipeline) == before


def test_a_source_that_cannot_be_embedded_fails_alone(tmp_path: Path, folder: Path) -> None:
    class Picky(HashEmbedder):
        def encode(self, texts, on_tokens=None):
            if any("flies" in text for text in texts):
                raise RetrievalError("the model gave NaN")
            return super().encode(texts, on_tokens)

    with open_pipeline(tmp_path, Picky()) as pipeline:
        report = pipeline.ingest([folder])
        assert report.added == 1
        assert [(Path(failure.uri).name, failure.stage) for failure in report.failed] == [("frogs.md", "embed")]


def test_another_embedder_is_refused_and_reembed_replaces_the_vectors(tmp_path: Path, folder: Path) -> None:
    with open_pipeline(tmp_path) as pipeline:
        pipeline.ingest([folder])
    other = HashEmbedder(dim=24, name="other")
    with open_pipeline(tmp_path, other) as pipeline:
        with pytest.raises(EmbedderMismatchError, match=r"hash@16.*other@24.*--reembed"):
            pipeline.ingest([folder])
        with pytest.raises(EmbedderMismatchError):
            pipeline.search("frogs")
        pipeline.ingest([folder], reembed=True)
        table = pipeline.store.vectors()
        assert (table.dim, pipeline.store.meta.embedder_id) == (24, "other@24")
        stored = pipeline.store.chunks(table.row_ids)
        expected = HashEmbedder(dim=24).encode([one.chunk.text for one in stored])
        np.testing.assert_allclose(np.concatenate([part.vectors for part in table.parts]), expected, atol=1e-6)


def test_a_dry_run_writes_nothing(tmp_path: Path, folder: Path) -> None:
    with open_pipeline(tmp_path) as pipeline:
        report = pipeline.ingest([folder], dry_run=True)
        assert (report.added, report.dry_run) == (2, True)
        assert not (tmp_path / "store").exists()
        pipeline.ingest([folder])
        (folder / "frogs.md").write_text("Frogs sing.")
        generation = pipeline.store.generation
        assert pipeline.ingest([folder], dry_run=True).updated == 1
        assert pipeline.store.generation == generation


def test_a_stop_ends_the_embedding_at_hand_and_the_next_run_does_the_rest(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ragkit.jobs.local_executor.COMMIT_CHUNKS", 1)
    stop = threading.Event()

    class StopsInTheSecondGroup(HashEmbedder):
        def encode(self, texts, on_tokens=None):
            if self.texts_embedded:
                stop.set()
            return super().encode(texts, on_tokens)

    with open_pipeline(tmp_path, StopsInTheSecondGroup()) as pipeline:
        report = pipeline.ingest([folder], stop=stop)
        assert (report.added, report.interrupted) == (1, True)
        assert set(texts(pipeline)) == {"frogs.md"}
    with open_pipeline(tmp_path) as pipeline:
        assert pipeline.ingest([folder]).added == 1


def test_a_missing_source_is_a_usage_error(tmp_path: Path) -> None:
    with open_pipeline(tmp_path) as pipeline, pytest.raises(UsageError, match="nowhere"):
        pipeline.ingest([tmp_path / "nowhere"])


def test_rows_of_a_table_are_documents_with_metadata(tmp_path: Path) -> None:
    table = tmp_path / "rows.jsonl"
    table.write_text('{"text": "Frogs live in ponds.", "year": 2020}\n{"text": "Stars shine.", "year": 2021}\n')
    with open_pipeline(tmp_path) as pipeline:
        pipeline.ingest([table])
        rows = pipeline.store.rows_where({"year": 2021})
        assert [stored.chunk.text for stored in pipeline.store.chunks(rows)] == ["Stars shine."]
        assert [stored.uri for stored in pipeline.store.chunks(rows)] == [f"{table}#row=2"]


def test_random_edits_end_in_the_state_of_the_folder(tmp_path: Path) -> None:
    """Fault 13 as a property: whatever happens to the files, one ingest with --prune makes the store equal to them."""
    rng = random.Random(7)
    folder = tmp_path / "docs"
    folder.mkdir()
    words = ["frog", "star", "pond", "night", "sun", "fly", "river", "stone", "tree", "wind"]
    with open_pipeline(tmp_path) as pipeline:
        for _ in range(12):
            for _ in range(rng.randint(1, 4)):
                _random_edit(rng, folder, words)
            pipeline.ingest([folder], prune=True)
            expected = {path.name: path.read_text() for path in folder.iterdir() if path.stat().st_size}
            assert texts(pipeline) == expected
            assert pipeline.verify().problems == ()


def _random_edit(rng: random.Random, folder: Path, words: list[str]) -> None:
    files = sorted(folder.iterdir())
    kind = rng.choice(["write", "write", "delete", "rename", "copy"])
    target = folder / f"{rng.randint(0, 7)}.txt"
    if kind == "write" or not files:
        target.write_text(" ".join(rng.choices(words, k=rng.randint(1, 120))))
        return
    chosen = rng.choice(files)
    if kind == "delete":
        chosen.unlink()
    elif kind == "rename":
        chosen.rename(target)
    else:
        target.write_bytes(chosen.read_bytes())


def test_the_embedder_of_the_configuration_is_not_loaded_when_one_is_given(tmp_path: Path, folder: Path) -> None:
    config = PipelineConfig(embedding=EmbeddingConfig(model="no/such-model"), chunking=ChunkingConfig(max_tokens=40))
    with Pipeline.open(tmp_path / "store", config, embedder=HashEmbedder(), tokenizer=WordTokenizer()) as pipeline:
        assert pipeline.ingest([folder]).added == 2
