"""What of the stored chunk KV the present settings use: told by `kv_status`, and the rest removed by `gc`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from blended_pipeline import CONFIG, ask_all, kv_files, open_blended, reused, write_documents
from doubles import HashEmbedder
from tiny_generator import write_generator

from ragkit import Pipeline, PipelineConfig
from ragkit.config import ChunkContextName, CodecName
from ragkit.errors import UsageError
from ragkit.generation.engine import Engine
from ragkit.reports import KVStatus

QUESTION = "Where do the otters live?"
NEIGHBOURS, ISOLATED = ChunkContextName.NEIGHBOURS, ChunkContextName.ISOLATED


pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    return write_documents(tmp_path / "docs")


@pytest.fixture
def filled(tmp_path: Path, docs: Path, engine: Engine) -> Iterator[Path]:
    """A store whose chunks have their KV behind the prefix, as fp32."""
    with open_blended(tmp_path / "store", engine) as pipeline:
        pipeline.ingest([docs], kv=True)
    return tmp_path / "store"


def named(store: Path, model: str, dtype: str = "float32") -> Pipeline:
    """Return a pipeline that has no generator loaded."""
    config = replace(CONFIG, generation=replace(CONFIG.generation, model=model, dtype=dtype))
    return Pipeline.open(store, config, embedder=HashEmbedder())


def shares(status: KVStatus) -> tuple[int, int, int]:
    """Return the chunks with KV in use, and the shares of the disk's bytes of other settings and of unknown use."""
    disk = status.bytes_by_tier["disk"]
    return status.chunks, round(100 * status.other_bytes / disk), round(100 * status.unknown_bytes / disk)


def count(store: Path) -> int:
    with Pipeline.open(store, PipelineConfig(), embedder=HashEmbedder()) as pipeline:
        return pipeline.store.counts().chunks


def test_kv_of_the_present_settings_is_used_whether_the_generator_is_loaded_or_only_named(
    filled: Path, engine: Engine
) -> None:
    with open_blended(filled, engine) as pipeline:
        assert shares(pipeline.kv_status()) == (count(filled), 0, 0)
    with named(filled, str(engine.folder)) as pipeline:
        assert shares(pipeline.kv_status()) == (count(filled), 0, 0)
        assert not pipeline.parts.is_loaded("engine")


def test_kv_of_another_context_is_of_other_settings(filled: Path, docs: Path, engine: Engine) -> None:
    before = sum(path.stat().st_size for path in kv_files(filled))
    with open_blended(filled, engine, context=ISOLATED) as pipeline:
        assert shares(pipeline.kv_status()) == (0, 100, 0)
        pipeline.ingest([], kv=True)
        status = pipeline.kv_status()
        assert (status.chunks, status.other_bytes) == (count(filled), before)


def test_behind_neighbours_only_chunks_with_the_same_ones_are_counted(filled: Path, engine: Engine) -> None:
    with open_blended(filled, engine, context=NEIGHBOURS, neighbour_tokens=1) as pipeline:
        assert pipeline.kv_status().chunks == 3  # the first of each document: nothing stands before it
        pipeline.ingest([], kv=True)
        assert pipeline.kv_status().chunks == count(filled)
    with open_blended(filled, engine, context=NEIGHBOURS, neighbour_tokens=1000) as pipeline:
        assert pipeline.kv_status().chunks == 6  # those, and the second ones


def test_kv_behind_a_neighbour_that_was_edited_is_not_used(filled: Path, docs: Path, engine: Engine) -> None:
    with open_blended(filled, engine, context=NEIGHBOURS, neighbour_tokens=1) as pipeline:
        pipeline.ingest([], kv=True)
        lines = (docs / "0.txt").read_text().split("\n\n")
        (docs / "0.txt").write_text("\n\n".join([*lines[:5], "Quiet " + lines[5].lower(), *lines[6:]]))
        pipeline.ingest([docs])
        assert pipeline.kv_status().chunks == count(filled) - 2


def test_kv_of_other_weights_or_of_another_type_is_of_other_settings(
    filled: Path, engine: Engine, tmp_path: Path
) -> None:
    with named(filled, str(write_generator(tmp_path / "other", seed=1))) as pipeline:
        assert shares(pipeline.kv_status()) == (0, 100, 0)
    with named(filled, str(engine.folder), dtype="bfloat16") as pipeline:
        assert shares(pipeline.kv_status()) == (0, 100, 0)


def test_kv_of_chunks_that_prompts_put_another_way_is_not_used(
    filled: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ragkit.generation.prompt.CHUNK_END", "\n--\n")
    with named(filled, str(engine.folder)) as pipeline:
        assert shares(pipeline.kv_status()) == (0, 100, 0)


def test_without_the_generator_nothing_is_said_of_it_nor_removed(filled: Path) -> None:
    with named(filled, "smollm2-135m-instruct") as pipeline:  # not pulled here
        assert shares(pipeline.kv_status()) == (0, 0, 100)
        with pytest.raises(UsageError, match="cannot be said without the generator smollm2-135m-instruct"):
            pipeline.gc(unused_kv=True)
        assert shares(pipeline.kv_status()) == (0, 0, 100)


def test_a_damaged_header_is_not_counted_as_used(filled: Path, engine: Engine) -> None:
    [path, *_] = kv_files(filled)
    content = bytearray(path.read_bytes())
    content[40] ^= 1
    path.chmod(0o600)
    path.write_bytes(content)
    with open_blended(filled, engine) as pipeline:
        status = pipeline.kv_status()
        assert status.chunks == count(filled) - 1
        assert status.other_bytes > 0


def test_gc_removes_the_kv_of_other_settings_when_asked_and_leaves_what_is_used(
    filled: Path, docs: Path, engine: Engine
) -> None:
    with open_blended(filled, engine, codec=CodecName.INT8) as pipeline:
        pipeline.ingest([], kv=True)
        before = pipeline.kv_status()
        answers = ask_all(pipeline)
        pipeline.gc()
        assert pipeline.kv_status() == before
        assert pipeline.gc(unused_kv=True).bytes_freed >= before.other_bytes > 0
        status = pipeline.kv_status()
        assert (status.chunks, status.other_bytes) == (before.chunks, 0)
        assert sum(status.bytes_by_tier.values()) == sum(before.bytes_by_tier.values()) - before.other_bytes
        assert pipeline.store.verify().problems == ()
    with open_blended(filled, engine, codec=CodecName.INT8) as pipeline:
        assert ask_all(pipeline) == answers
        assert reused(pipeline.query(QUESTION)) == (5, 0)


def test_gc_leaves_the_pages_of_documents(filled: Path, docs: Path, engine: Engine) -> None:
    with open_blended(filled, engine, codec=CodecName.INT8) as pipeline:
        pipeline.query(QUESTION, strategy="pages", document=str(docs / "0.txt"))
        pages = pipeline.kv_status().page_bytes
        pipeline.gc(unused_kv=True)
        status = pipeline.kv_status()
        assert (status.page_bytes, status.other_bytes) == (pages, 0)
        assert pages > 0
