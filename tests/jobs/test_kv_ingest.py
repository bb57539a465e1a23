"""Chunk KV computed ahead: everything that is missing, nothing twice, stopped and resumed, within the budget."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from blended_pipeline import CONFIG, ask_all, kv_files, open_blended, reused, write_documents

from ragkit import Pipeline
from ragkit.config import CodecName
from ragkit.errors import StoreSpaceError, UsageError
from ragkit.generation.engine import Engine
from ragkit.jobs import kv_ingest
from ragkit.progress import Silent
from ragkit.reports import KVIngestReport
from ragkit.store import faults

QUESTION = "Where do the otters live?"


pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    return write_documents(tmp_path / "docs")


@pytest.fixture
def pipeline(tmp_path: Path, engine: Engine) -> Iterator[Pipeline]:
    with open_blended(tmp_path / "store", engine) as pipeline:
        yield pipeline


class Watching(Silent):
    """Hears the stages and counts; sets `stop` after some chunks."""

    def __init__(self, stop_after: int = 10**9) -> None:
        self.stages: list[tuple[int, int, str]] = []
        self.chunks = self.bytes = 0
        self.stop = threading.Event()
        self._stop_after = stop_after

    def start(self, total_documents: int, total_bytes: int, unit: str = "documents") -> None:
        self.stages.append((total_documents, total_bytes, unit))

    def advance(self, documents: int = 0, bytes: int = 0, tokens: int = 0) -> None:
        if self.stages[-1][2] == "chunks":
            self.chunks += documents
            self.bytes += bytes
            if self.chunks >= self._stop_after:
                self.stop.set()


def test_the_first_question_finds_all_of_it(pipeline: Pipeline, docs: Path) -> None:
    report = pipeline.ingest([docs], kv=True)
    chunks = pipeline.store.counts().chunks
    assert report.kv is not None
    assert (report.kv.computed, report.kv.present) == (chunks, 0)
    assert report.kv.bytes > 0
    assert reused(pipeline.query(QUESTION)) == (5, 0)
    assert pipeline.store.verify().problems == ()


def test_answers_are_those_of_kv_that_was_computed_lazily(tmp_path: Path, docs: Path, engine: Engine) -> None:
    with open_blended(tmp_path / "store", engine, codec=CodecName.INT8) as pipeline:
        pipeline.ingest([docs], kv=True)
        ahead = ask_all(pipeline)
    with open_blended(tmp_path / "store", engine, codec=CodecName.INT8, memory_mb=0, disk_mb=0) as pipeline:
        assert ask_all(pipeline) == ahead


def test_what_is_there_is_not_computed_again(pipeline: Pipeline, docs: Path) -> None:
    pipeline.ingest([docs])
    pipeline.query(QUESTION)
    pipeline.parts.blending.kv_store.flush()
    chunks = pipeline.store.counts().chunks
    first, second = (pipeline.ingest([docs], kv=True).kv for _ in range(2))
    assert (first.computed, first.present) == (chunks - 5, 5)
    assert second == KVIngestReport(0, chunks, 0)


def test_only_new_documents_cost_something(pipeline: Pipeline, docs: Path) -> None:
    pipeline.ingest([docs], kv=True)
    before = pipeline.store.counts().chunks
    write_documents(docs, [7])
    report = pipeline.ingest([docs], kv=True)
    assert (report.kv.computed, report.kv.present) == (pipeline.store.counts().chunks - before, before)


def test_chunks_of_equal_text_share_their_kv(pipeline: Pipeline, docs: Path) -> None:
    (docs / "copy.txt").write_text((docs / "0.txt").read_text() + "\n\nWith an ending of its own, this one.\n")
    report = pipeline.ingest([docs], kv=True)
    chunks = pipeline.store.counts().chunks
    assert (report.kv.present, report.kv.computed + report.kv.shared) == (0, chunks)
    assert report.kv.computed == pipeline.kv_status().chunks < chunks
    assert pipeline.ingest([], kv=True).kv == KVIngestReport(0, chunks, 0)


def test_no_source_is_needed_for_it(pipeline: Pipeline, docs: Path) -> None:
    pipeline.ingest([docs])
    assert pipeline.ingest([], kv=True).kv.computed == pipeline.store.counts().chunks


def test_the_configuration_can_ask_for_it_and_a_call_can_refuse(tmp_path: Path, docs: Path, engine: Engine) -> None:
    config = replace(CONFIG, ingest=replace(CONFIG.ingest, kv=True))
    with open_blended(tmp_path / "store", engine, config) as pipeline:
        assert pipeline.ingest([docs], kv=False).kv is None
        assert pipeline.ingest([docs]).kv.computed > 0


def test_a_dry_run_computes_nothing(pipeline: Pipeline, docs: Path) -> None:
    assert pipeline.ingest([docs], kv=True, dry_run=True).kv is None


def test_the_advance_is_told_in_chunks_tokens_and_bytes(pipeline: Pipeline, docs: Path) -> None:
    watching = Watching()
    report = pipeline.ingest([docs], kv=True, progress=watching)
    (documents, _, unit), (chunks, expected, chunk_unit) = watching.stages
    assert (documents, unit, chunks, chunk_unit) == (3, "documents", report.kv.computed, "chunks")
    assert (watching.chunks, watching.bytes) == (report.kv.computed, report.kv.bytes)
    assert report.kv.bytes <= expected


def test_a_stop_keeps_what_was_computed_and_the_next_run_goes_on(pipeline: Pipeline, docs: Path) -> None:
    watching = Watching(stop_after=7)
    stopped = pipeline.ingest([docs], kv=True, progress=watching, stop=watching.stop)
    chunks = pipeline.store.counts().chunks
    assert stopped.interrupted
    assert stopped.kv == KVIngestReport(7, 0, watching.bytes)
    assert pipeline.kv_status().chunks == 7
    resumed = pipeline.ingest([docs], kv=True)
    assert (resumed.kv.computed, resumed.kv.present, resumed.interrupted) == (chunks - 7, 7, False)


def test_a_stop_while_documents_are_read_leaves_the_kv_alone(pipeline: Pipeline, docs: Path) -> None:
    stop = threading.Event()
    stop.set()
    report = pipeline.ingest([docs], kv=True, stop=stop)
    assert (report.interrupted, report.kv) == (True, None)


def test_a_full_budget_ends_it_with_one_warning_and_evicts_nothing(
    tmp_path: Path, docs: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_ingest, "_WRITTEN_CHUNKS", 4)
    write_documents(docs, range(3, 9))
    with open_blended(tmp_path / "store", engine, disk_mb=1) as pipeline:
        report = pipeline.ingest([docs], kv=True)
        chunks = pipeline.store.counts().chunks
        [warning] = report.warnings
        assert 0 < report.kv.computed < chunks
        assert pipeline.kv_status().chunks == report.kv.computed
        assert f"the KV of {chunks - report.kv.computed} chunks was left out, because disk (1 MB) is full" in warning
        assert sum(path.stat().st_size for path in kv_files(tmp_path / "store")) <= 1 << 20


def test_room_for_less_than_one_write_is_used(tmp_path: Path, docs: Path, engine: Engine) -> None:
    write_documents(docs, range(3, 9))
    with open_blended(tmp_path / "store", engine, disk_mb=1) as pipeline:  # all of it would be written at once
        report = pipeline.ingest([docs], kv=True)
        assert report.kv.computed > 0
        assert report.kv.left_out == pipeline.store.counts().chunks - report.kv.computed > 0


def test_a_full_remote_tier_names_its_own_budget(tmp_path: Path, docs: Path, engine: Engine) -> None:
    write_documents(docs, range(3, 9))
    remote = (tmp_path / "remote").as_uri()
    with open_blended(tmp_path / "store", engine, disk_mb=0, remote=remote, remote_mb=1) as pipeline:
        [warning] = pipeline.ingest([docs], kv=True).warnings
        assert "file (1 MB) is full: raise kv.remote_mb, or" in warning
        assert "kv.disk_mb" not in warning


@pytest.mark.parametrize("codec", [CodecName.BF16, CodecName.ENTROPY1])
def test_a_chunk_too_long_for_any_prompt_is_not_computed_and_a_warning_says_so(
    tmp_path: Path, docs: Path, engine: Engine, codec: CodecName
) -> None:
    window = engine.max_context
    (docs / "long.txt").write_text("otter " * 9000, encoding="utf-8")
    config = replace(CONFIG, chunking=replace(CONFIG.chunking, max_tokens=100_000))
    with open_blended(tmp_path / "store", engine, config, codec=codec) as pipeline:
        report = pipeline.ingest([docs], kv=True)
        chunks = pipeline.store.counts().chunks
        lengths = [one.chunk.token_count for one in pipeline.store.chunks(pipeline.store.row_ids())]
    assert sum(length > window for length in lengths) == 1
    assert (report.kv.computed, report.kv.left_out) == (chunks - 1, 0)
    (warning,) = report.warnings
    assert warning.startswith("the KV of 1 chunks was left out, because they are too long for any prompt")


def test_without_a_place_to_keep_it_is_refused(tmp_path: Path, docs: Path, engine: Engine) -> None:
    with open_blended(tmp_path / "store", engine, disk_mb=0) as pipeline:
        with pytest.raises(UsageError, match=r"set kv\.disk_mb above 0, or kv\.remote"):
            pipeline.ingest([docs], kv=True)
        assert pipeline.store.counts().sources == 3  # the documents are in


def test_a_full_disk_is_the_stores_error_and_what_was_written_stays(
    pipeline: Pipeline, docs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_ingest, "_WRITTEN_CHUNKS", 8)
    pipeline.ingest([docs])
    pipeline.ingest([], kv=False)
    monkeypatch.setenv("RAGKIT_ENOSPC_AT", "12")
    faults.restart()
    with pytest.raises(StoreSpaceError):
        pipeline.ingest([], kv=True)
    monkeypatch.delenv("RAGKIT_ENOSPC_AT")
    faults.restart()
    written = pipeline.kv_status().chunks
    assert 0 < written < pipeline.store.counts().chunks
    assert pipeline.ingest([], kv=True).kv.present == written
    assert pipeline.store.verify().problems == ()


def test_the_status_estimates_what_all_of_it_would_take(
    tmp_path: Path, docs: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(CONFIG, generation=replace(CONFIG.generation, model=str(engine.folder)))
    with open_blended(tmp_path / "store", engine, config) as pipeline:
        pipeline.ingest([docs])
        assert pipeline.kv_status().bytes_by_tier == {"disk": 0}
        pipeline.ingest([docs], kv=True)
        status = pipeline.kv_status()
        assert (status.chunks, status.codec) == (pipeline.store.counts().chunks, "fp32")
        on_disk = sum(os.path.getsize(path) for path in kv_files(tmp_path / "store"))
        assert status.bytes_by_tier == {"disk": on_disk}
        assert status.estimated_bytes == pytest.approx(on_disk, rel=0.15)
    elsewhere = replace(config, generation=replace(CONFIG.generation, model="smollm2-135m-instruct"))
    with open_blended(tmp_path / "store", engine, elsewhere, remote=(tmp_path / "remote").as_uri()) as pipeline:
        assert pipeline.kv_status().estimated_bytes is None  # not pulled here
        pipeline.query(QUESTION, k=2)
        pipeline.parts.blending.kv_store.flush()
        pipeline.remove([str(docs / "0.txt")])
        assert pipeline.kv_status().bytes_by_tier.keys() == {"disk", "file"}


def test_the_status_counts_chunks_with_kv_of_the_present_codec_whose_file_is_there(
    tmp_path: Path, docs: Path, engine: Engine
) -> None:
    for codec in (CodecName.FP32, CodecName.INT8):
        with open_blended(tmp_path / "store", engine, codec=codec) as pipeline:
            pipeline.ingest([docs], kv=True)
            status, chunks = pipeline.kv_status(), pipeline.store.counts().chunks
            assert status.chunks == chunks
    assert 0 < status.other_bytes < status.bytes_by_tier["disk"]
    with open_blended(tmp_path / "store", engine, codec=CodecName.INT4_BF16) as pipeline:
        status = pipeline.kv_status()
        assert (status.chunks, status.other_bytes) == (0, status.bytes_by_tier["disk"])
        pipeline.query(QUESTION)
        pipeline.parts.blending.kv_store.flush()
        assert pipeline.kv_status().chunks == 5
    for path in kv_files(tmp_path / "store"):
        path.unlink()
    with open_blended(tmp_path / "store", engine) as pipeline:
        status = pipeline.kv_status()
        assert (status.chunks, status.bytes_by_tier, status.other_bytes) == (0, {"disk": 0}, 0)
