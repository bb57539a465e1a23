"""Ingest on a Ray cluster of two nodes with one core each, against the local executor with two cores.

    python benchmarks/ray_ingest.py [--chunks 27000] [--rounds 1]

27,000 chunks take the local executor over ten minutes on two cores. The collection is text files of 1 to 40 paragraphs,
drawn from the benchmark data (`RAGKIT_DATA`) or, without it, from made sentences, and the quarterly reports (PDF) of
the data. Both sides run the same configuration with the bundled models, each in a process of its own, in turns, into
new stores. Both have their models loaded before the clock starts; what Ray takes from the connection until the first
worker is ready stands apart (`start_workers`). The nodes run on this machine (`ray.cluster_utils.Cluster`), so both
sides have the same two cores; the driver, its commits and Ray's own processes take their share of them.

Afterwards both stores are compared: documents, chunks, spans, texts, token counts and row ids byte for byte, vectors by
their largest difference.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import secrets
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from report import data_folder, markdown_table, write_result

NODES = 2
OBJECT_STORE_BYTES = 200 << 20
CHUNK_CHARACTERS = 900  # about, of this text at the default cap
LIMITS = {"overhead_percent": 15.0, "vector_difference": 1e-5}


def paragraphs() -> list[str]:
    """Return prose: that of the benchmark data, or made sentences."""
    from ragkit.bench.prose import made_sentences, wiki_passages

    folder = data_folder("wiki2_corpus")
    if folder is not None:
        return list(wiki_passages(folder.parent))
    made = made_sentences(0)
    return [" ".join(islice(made, 4)) for _ in range(5_000)]


def write_collection(folder: Path, chunks: int) -> None:
    """Fill `folder` with files that give about so many chunks."""
    rng, texts = random.Random(0), paragraphs()
    reports = data_folder("sec_10q")
    written = 0
    if reports is not None and chunks >= 5_000:
        for report in sorted(reports.glob("*.pdf")):
            shutil.copy(report, folder / report.name)
        written = 2_000 * CHUNK_CHARACTERS
    number = 0
    while written < chunks * CHUNK_CHARACTERS:
        text = "\n\n".join(rng.choices(texts, k=rng.randint(1, 40)))
        (folder / f"{number:06}.txt").write_text(f"Document {number}\n\n{text}\n", encoding="utf-8")
        written, number = written + len(text), number + 1


def ingest(docs: str, store: str, address: str) -> dict[str, Any]:
    """Ingest in this process, on Ray where there is an address; return the report and what it took."""
    import torch

    from ragkit import Pipeline
    from ragkit.config import Device, PipelineConfig
    from ragkit.jobs_config import ExecutorName, JobsConfig

    torch.set_num_threads(NODES)
    jobs = JobsConfig(ExecutorName.RAY, address) if address else JobsConfig()
    with Pipeline.open(store, PipelineConfig(device=Device.CPU, jobs=jobs)) as rag:
        rag.embedder.encode(["The quick brown fox jumps over the lazy dog. " * 40])
        rag.tokenizer.encode("warm")
        started, cpu = time.perf_counter(), time.process_time()
        report = rag.ingest([docs])
        seconds = time.perf_counter() - started
    return {
        "executor": f"Ray, {NODES} nodes x 1 core" if address else f"local, {NODES} cores",
        "seconds": seconds,
        "start_s": report.timings_s.get("start_workers", 0.0),
        "driver_cpu_s": time.process_time() - cpu,
        "sources": report.added,
        "failed": [failure.uri for failure in report.failed],
        "chunks": report.chunks,
        "tokens": report.tokens,
        "stages_s": dict(report.timings_s),
    }


def ingest_on_ray(docs: str, store: str) -> dict[str, Any]:
    """Start the nodes, ingest on them, and end them."""
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    from ragkit.jobs.ray_cluster import import_ray

    ray = import_ray()
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "object_store_memory": OBJECT_STORE_BYTES}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    try:
        for _ in range(NODES - 1):
            cluster.add_node(**node)
        return ingest(docs, store, cluster.address)
    finally:
        ray.shutdown()
        cluster.shutdown()


def rows(store: str) -> Iterator[bytes]:
    """Yield everything of a store that must be equal, in order."""
    from ragkit.store import Store

    with Store.open(store) as opened, opened.snapshot():
        for source in opened.sources():
            yield repr((source.uri, source.content_sha256, source.media_type, source.recipe, source.status)).encode()
            for link in opened.source_documents(source.uri):
                yield repr((link, opened.document(link.doc_id))).encode()
        row_ids = opened.row_ids()
        for start in range(0, len(row_ids), 1_000):
            yield from (repr(stored).encode() for stored in opened.chunks(row_ids[start : start + 1_000]))


def vectors(store: str) -> np.ndarray:
    """Return all vectors of a store in order of row id."""
    from ragkit.store import Store

    with Store.open(store) as opened:
        return np.concatenate([np.array(part.vectors) for part in opened.vectors().parts])


def compare(one: str, other: str) -> dict[str, Any]:
    """Return whether two stores hold the same, and how far their vectors lie apart."""
    digests = []
    for store in (one, other):
        digest = hashlib.sha256()
        for row in rows(store):
            digest.update(len(row).to_bytes(8) + row)
        digests.append(digest.hexdigest())
    return {
        "same_bytes": digests[0] == digests[1],
        "vector_difference": float(np.abs(vectors(one) - vectors(other)).max()),
    }


def in_new_process(function: Any, *arguments: Any) -> Any:
    """Return `function(*arguments)` from a fresh interpreter."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunks", type=int, default=27_000, help="about how many chunks to ingest")
    parser.add_argument("--rounds", type=int, default=1, help="how often both sides run, in turns")
    options = parser.parse_args()
    os.environ.pop("OMP_NUM_THREADS", None)  # each side says itself how many threads it takes
    runs: list[dict[str, Any]] = []
    checks: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="ragkit-ray-") as scratch:
        docs = Path(scratch) / "docs"
        docs.mkdir()
        write_collection(docs, options.chunks)
        for number in range(options.rounds):
            stores = [str(Path(scratch) / f"{name}{number}") for name in ("local", "ray")]
            local = in_new_process(ingest, str(docs), stores[0], "")
            print(json.dumps(local), file=sys.stderr)
            on_ray = in_new_process(ingest_on_ray, str(docs), stores[1])
            print(json.dumps(on_ray), file=sys.stderr)
            runs += [local, on_ray]
            checks.append(compare(*stores))
    table = [{**run, "net_s": run["seconds"] - run["start_s"], "rate": run["tokens"] / run["seconds"]} for run in runs]
    ratios = [ray["net_s"] / local["net_s"] for local, ray in zip(table[::2], table[1::2], strict=True)]
    overhead = 100 * (statistics.median(ratios) - 1)
    columns = {
        "executor": "Executor",
        "sources": "Sources",
        "chunks": "Chunks",
        "tokens": "Tokens",
        "seconds": "Seconds",
        "start_s": "of these until the first worker",
        "net_s": "Seconds without",
    }
    print(markdown_table(table, columns))
    print(f"\noverhead without start-up: {overhead:.1f}% (at most {LIMITS['overhead_percent']:.0f}%)")
    for check in checks:
        difference, limit = check["vector_difference"], LIMITS["vector_difference"]
        print(f"same documents, chunks, spans, texts and token counts: {check['same_bytes']}")
        print(f"largest difference of a vector's number: {difference:.1e} (at most {limit:.0e})")
    result = {"runs": runs, "overhead_percent": overhead, "comparison": checks, "limits": LIMITS}
    print(f"\nraw numbers: {write_result('ray_ingest', result)}", file=sys.stderr)


if __name__ == "__main__":
    main()
