"""Ingest of real collections: CPU time outside embedding, embedding speed against sentence-transformers, memory.

    python benchmarks/ingest_speed.py [--postgres FOLDER] [--only postgres|sec_10q] [--rounds N] [--sample N]

`postgres` is the HTML documentation of PostgreSQL 15 (Debian package postgresql-doc-15, 1,169 pages); `sec_10q` are
the ten quarterly reports of the benchmark data (`RAGKIT_DATA`). Each is ingested through `Pipeline` into a new store in
a process of its own, so that the peak of one does not hide in the other's. CPU time counts this process and the parser
children. "Above the models" is the peak of this process and its parser children over what it was with the models
loaded.

The embedding comparison encodes the same stored chunk texts with ragkit's embedder and with sentence-transformers'
`encode` in turns and compares medians; both count the embedder's own tokens, and their vectors must agree within 1e-4.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from peak_memory import PeakMemory
from report import data_folder, interleaved_samples, markdown_table, write_result

POSTGRES_PACKAGE = "postgresql-doc-15"
WARM_TEXT = "The quick brown fox jumps over the lazy dog. " * 40


def postgres_folder() -> Path | None:
    """Return where Debian put the HTML pages of the PostgreSQL manual, or None where the package is not installed."""
    try:
        done = subprocess.run(["dpkg", "-L", POSTGRES_PACKAGE], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    pages = (Path(line) for line in done.stdout.splitlines() if line.endswith("/html/index.html"))
    return next((page.parent for page in pages), None)


def ingest_once(folder: str, store: str) -> dict[str, Any]:
    """Ingest `folder` into a new store and return counts, seconds and megabytes."""
    import torch  # noqa: F401  (loaded first, so that the embedder takes the path for documents at once)

    from ragkit import Pipeline

    with Pipeline.open(store) as rag:
        rag.embedder.encode([WARM_TEXT])
        rag.tokenizer.encode(WARM_TEXT)
        with PeakMemory() as memory:
            cpu, wall = cpu_seconds(), time.perf_counter()
            report = rag.ingest([folder])
            wall = time.perf_counter() - wall
            cpu = cpu_seconds() - cpu
    embedding = report.timings_s["embed_cpu"]
    return {
        "sources": report.added,
        "failed": [failure.uri for failure in report.failed],
        "chunks": report.chunks,
        "tokens": report.tokens,
        "source_mb": sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file()) / 1e6,
        "wall_s": wall,
        "cpu_embedding_s": embedding,
        "cpu_outside_s": cpu - embedding,
        "outside_percent": 100 * (cpu - embedding) / embedding,
        "stages_s": dict(report.timings_s),
        "tokens_per_s": report.tokens / wall,
        "models_mb": memory.start_mb,
        "peak_above_models_mb": memory.peak_mb - memory.start_mb,
    }


def cpu_seconds() -> float:
    """Return the user and system time of this process and of its children that have ended."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def stored_texts(store: str, count: int) -> list[str]:
    """Return `count` chunk texts of a store, evenly spaced over it."""
    from ragkit import Pipeline

    with Pipeline.open(store) as rag:
        rows = rag.store.row_ids()
        picked = rows[np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int)]
        return [stored.chunk.text for stored in rag.store.chunks(picked)]


def compare_embedders(store: str, sample: int, rounds: int) -> dict[str, Any]:
    """Encode the same texts with ragkit and with sentence-transformers, in turns; return tokens a second of both."""
    import torch
    from sentence_transformers import SentenceTransformer

    from ragkit import Pipeline
    from ragkit.models import resolve

    texts = stored_texts(store, sample)
    with Pipeline.open(store) as rag:
        ours = rag.embedder
        baseline = SentenceTransformer(str(resolve(rag.config.embedding.model)), device="cpu")
        # Beyond its window the baseline drops text, which would be speed for nothing: only what fits is compared.
        lengths = [len(ids) for ids in baseline.tokenizer(texts)["input_ids"]]
        fitting = [text for text, length in zip(texts, lengths, strict=True) if length <= baseline.max_seq_length]
        tokens = sum(length for length in lengths if length <= baseline.max_seq_length)
        reference = baseline.encode(fitting, normalize_embeddings=True)
        gap = float(np.abs(ours.encode(fitting) - reference).max())
        if gap > 1e-4:
            raise SystemExit(f"the two embedders differ by {gap:.2e}, so their speeds are not comparable")
        samples = interleaved_samples(
            {
                "ragkit": lambda: ours.encode(fitting),
                "sentence-transformers": lambda: baseline.encode(fitting, normalize_embeddings=True),
            },
            rounds,
        )
    speeds = {name: tokens / float(np.median(seconds)) for name, seconds in samples.items()}
    return {
        "texts": len(fitting),
        "longer_than_window": len(texts) - len(fitting),
        "tokens": tokens,
        "largest_difference": gap,
        "threads": torch.get_num_threads(),
        "seconds": samples,
        "tokens_per_s": speeds,
        "times_baseline": speeds["ragkit"] / speeds["sentence-transformers"],
    }


def in_new_process(function: Any, *arguments: Any) -> Any:
    """Return `function(*arguments)` from a fresh interpreter."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--postgres", type=Path, default=postgres_folder(), help="folder of the HTML pages")
    parser.add_argument("--only", choices=["postgres", "sec_10q"], help="ingest one collection")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of the embedding comparison")
    parser.add_argument("--sample", type=int, default=1000, help="chunks in the embedding comparison")
    options = parser.parse_args()
    collections = {"postgres": options.postgres, "sec_10q": data_folder("sec_10q")}
    rows: list[dict[str, Any]] = []
    comparison: dict[str, Any] | None = None
    with tempfile.TemporaryDirectory(prefix="ragkit-ingest-") as scratch:
        for name, folder in collections.items():
            if options.only not in (None, name):
                continue
            if folder is None:
                print(f"{name}: skipped, its folder is not here", file=sys.stderr)
                continue
            store = str(Path(scratch) / name)
            rows.append({"collection": name, **in_new_process(ingest_once, str(folder), store)})
            print(json.dumps(rows[-1]), file=sys.stderr)
            if comparison is None:
                comparison = in_new_process(compare_embedders, store, options.sample, options.rounds)
    if not rows or comparison is None:
        raise SystemExit("nothing to measure: install postgresql-doc-15 or set RAGKIT_DATA")
    columns = {
        "collection": "Collection",
        "sources": "Sources",
        "source_mb": "MB",
        "chunks": "Chunks",
        "tokens": "Tokens",
        "wall_s": "Wall s",
        "cpu_embedding_s": "CPU s embedding",
        "cpu_outside_s": "CPU s outside",
        "outside_percent": "Outside, % of embedding",
        "peak_above_models_mb": "Peak above the models, MB",
    }
    print(markdown_table(rows, columns))
    print()
    speeds = comparison["tokens_per_s"]
    ratio = {"ragkit": comparison["times_baseline"], "sentence-transformers": 1.0}
    table = [{"embedder": name, "tokens_per_s": speed, "times": ratio[name]} for name, speed in speeds.items()]
    print(markdown_table(table, {"embedder": "Embedder", "tokens_per_s": "Tokens/s", "times": "Times baseline"}))
    path = write_result("ingest_speed", {"collections": rows, "embedding": comparison})
    print(f"\nraw numbers: {path}", file=sys.stderr)


if __name__ == "__main__":
    main()
