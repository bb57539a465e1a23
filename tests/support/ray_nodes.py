"""A Ray cluster of two nodes with one core each on this machine, and pipelines over tiny models for its workers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tiny_bert import make_bert_folder
from tiny_generator import write_generator

from ragkit import Pipeline
from ragkit.config import (
    AnswerConfig,
    ChunkingConfig,
    CodecName,
    Device,
    EmbeddingConfig,
    GenerationConfig,
    KVConfig,
    LoadingMode,
    PipelineConfig,
)
from ragkit.jobs.ray_cluster import import_ray
from ragkit.jobs_config import ExecutorName, JobsConfig

OBJECT_STORE_BYTES = 80 << 20  # the least that Ray takes is 75 MB


@contextmanager
def two_nodes() -> Iterator[Any]:
    """Give a `ray.cluster_utils.Cluster` with token authentication; this process is not connected to it."""
    os.environ["RAY_AUTH_TOKEN"] = "0123456789abcdef" * 4
    ray = import_ray()
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "object_store_memory": OBJECT_STORE_BYTES}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    try:
        cluster.add_node(**node)
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()
        del os.environ["RAY_AUTH_TOKEN"]


def write_models(folder: Path) -> Path:
    """Write the embedder and the generator that `config_of` names."""
    (folder / "bert").mkdir(parents=True)
    make_bert_folder(folder / "bert")
    write_generator(folder / "generator")
    return folder


def config_of(models: Path, address: str = "", **kv: Any) -> PipelineConfig:
    """Return a configuration for the local executor, or for Ray at `address`."""
    jobs = JobsConfig(engine=ExecutorName.RAY, ray_address=address) if address else JobsConfig()
    return PipelineConfig(
        device=Device.CPU,
        chunking=ChunkingConfig(max_tokens=48),
        embedding=EmbeddingConfig(model=str(models / "bert")),
        generation=GenerationConfig(model=str(models / "generator"), dtype="float32", max_new_tokens=8),
        kv=KVConfig(codec=CodecName.FP32, loading=LoadingMode.ALWAYS, **kv),
        answers=AnswerConfig(found_threshold=0.0),
        jobs=jobs,
    )


def contents(pipeline: Pipeline) -> dict[str, Any]:
    """Return everything of a store that must not depend on the executor, but for the vectors."""
    store = pipeline.store
    with store.snapshot():
        return {
            "sources": [
                (one.uri, one.content_sha256, one.size, one.media_type, one.recipe, one.status, one.failure)
                for one in store.sources()
            ],
            "links": [store.source_documents(one.uri) for one in store.sources()],
            "documents": [
                store.document(link.doc_id) for one in store.sources() for link in store.source_documents(one.uri)
            ],
            "chunks": store.chunks(store.row_ids()),
        }
