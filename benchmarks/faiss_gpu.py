"""FAISS on a GPU against the CPU: the same ids, the recall of inverted lists, and milliseconds a question.

    python benchmarks/faiss_gpu.py [--rows 1000000] [--dim 384] [--device cuda]

Vectors are unit rows of low intrinsic dimension in clusters of uneven size, as text embeddings are; questions are rows
with noise. Every index is the product's own class; the CPU exact search is the truth.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from report import interleaved, markdown_table, write_result

from ragkit.retrieval.base import FloatMatrix, VectorIndex
from ragkit.retrieval.faiss_flat import FaissFlatIndex
from ragkit.retrieval.faiss_runtime import import_faiss
from ragkit.retrieval.flat import FlatIndex
from ragkit.retrieval.ivf_index import IvfIndex, bring_up_to_date
from ragkit.retrieval.ivf_training import train_ivf

K = 10
CENTRES = 4096
LATENT = 32


def unit(rows: FloatMatrix) -> FloatMatrix:
    """Return the rows at unit length."""
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def make_vectors(rows: int, dim: int, seed: int = 0) -> FloatMatrix:
    """Return (rows, dim) unit vectors: clusters in a space of `LATENT` dimensions, turned into `dim`, and noise."""
    generator = np.random.default_rng(seed)
    centres = generator.standard_normal((CENTRES, LATENT), dtype=np.float32)
    turn = generator.standard_normal((LATENT, dim), dtype=np.float32)
    shares = 1.0 / np.arange(1, CENTRES + 1) ** 0.5
    owners = generator.choice(CENTRES, size=rows, p=shares / shares.sum())
    vectors = np.empty((rows, dim), dtype=np.float32)
    for start in range(0, rows, 1 << 17):
        part = owners[start : start + (1 << 17)]
        latent = centres[part] + 0.7 * generator.standard_normal((len(part), LATENT), dtype=np.float32)
        noise = generator.standard_normal((len(part), dim), dtype=np.float32)
        vectors[start : start + len(part)] = unit(latent @ turn + 0.5 * noise)
    return vectors


def make_queries(vectors: FloatMatrix, count: int, seed: int = 1) -> FloatMatrix:
    """Return (count, dim) unit vectors near stored ones."""
    generator = np.random.default_rng(seed)
    picked = vectors[generator.choice(len(vectors), count, replace=False)]
    noise = generator.standard_normal(picked.shape, dtype=np.float32)
    return unit(picked + 0.3 * vectors.shape[1] ** -0.5 * noise)


def agreement(found: NDArray[np.int64], truth: NDArray[np.int64]) -> tuple[float, float]:
    """Return the share of equal ids at equal ranks, and the mean share of the true ids that were found."""
    same = float((found == truth).mean())
    recall = float(np.mean([len(np.intersect1d(a, b)) / len(b) for a, b in zip(found, truth, strict=True)]))
    return same, recall


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """Return what `work` returns and the seconds it took."""
    started = time.perf_counter()
    return work(), time.perf_counter() - started


def measure(
    name: str, index: VectorIndex, queries: FloatMatrix, truth: tuple[FloatMatrix, Any], built: float
) -> dict[str, Any]:
    """Return one row of the table: build seconds, agreement with `truth`, ms a question one by one and in batches."""
    scores, ids = index.search(queries, K)
    same, recall = agreement(ids, truth[1])
    row: dict[str, Any] = {"index": name, "build s": built, "same ids %": 100 * same, "recall@10 %": 100 * recall}
    row["largest score difference"] = float(np.abs(scores - truth[0]).max()) if same > 0.99 else None
    singles = queries[:50]

    def one_by_one() -> None:
        for query in singles:
            index.search(query[None], K)

    seconds = interleaved({"one": one_by_one, "batch": lambda: index.search(queries, K)}, rounds=3)
    row["ms, one question"] = 1000 * seconds["one"] / len(singles)
    row[f"ms a question, {len(queries)} at once"] = 1000 * seconds["batch"] / len(queries)
    return row


def main() -> None:
    """Build every index over the same vectors and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--queries", type=int, default=500)
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    faiss = import_faiss(arguments.device)
    vectors = make_vectors(arguments.rows, arguments.dim)
    queries = make_queries(vectors, arguments.queries)
    row_ids = np.arange(arguments.rows, dtype=np.int64) * 3 + 7  # ids are not positions
    exact = FlatIndex(row_ids, [vectors])
    cpu_flat, cpu_build = timed(lambda: FaissFlatIndex(row_ids, [vectors], arguments.dim))
    truth = cpu_flat.search(queries, K)
    rows = [
        measure("FAISS Flat, CPU", cpu_flat, queries, truth, cpu_build),
        measure("numpy flat, CPU", exact, queries, truth, 0.0),
    ]
    if arguments.device != "cpu":
        gpu_flat, built = timed(lambda: FaissFlatIndex(row_ids, [vectors], arguments.dim, arguments.device))
        rows.append(measure("FAISS Flat, GPU", gpu_flat, queries, truth, built))
        del gpu_flat
    (trained, facts), train_seconds = timed(lambda: train_ivf(row_ids, exact, arguments.dim))
    cpu_ivf = IvfIndex(trained, exact, facts.nprobe)
    rows.append(measure(f"IVF {facts.nlist}/{facts.nprobe}, CPU", cpu_ivf, queries, truth, train_seconds))
    notes: dict[str, Any] = {
        "facts": facts.as_params(),
        "faiss": faiss.__version__,
        "threads": faiss.omp_get_max_threads(),
    }
    if arguments.device != "cpu":
        gpu_ivf, built = timed(lambda: IvfIndex(trained, exact, facts.nprobe, arguments.device))
        rows.append(measure(f"IVF {facts.nlist}/{facts.nprobe}, GPU", gpu_ivf, queries, truth, built))
        same, _ = agreement(gpu_ivf.search(queries, K)[1], cpu_ivf.search(queries, K)[1])
        notes["IVF: same ids on GPU and CPU, %"] = 100 * same
        del gpu_ivf
        notes |= after_deletes(trained, row_ids, vectors, queries, facts.nprobe, arguments.device)
    print(markdown_table(rows, list(rows[0])))
    print(notes)
    write_result("faiss_gpu", {"rows": arguments.rows, "dim": arguments.dim, "table": rows, "notes": notes})


def after_deletes(
    trained: Any, row_ids: NDArray[np.int64], vectors: FloatMatrix, queries: FloatMatrix, nprobe: int, device: str
) -> dict[str, Any]:
    """Return what a GPU copy made after two rounds of deletes finds: never a deleted row."""
    kept = row_ids
    for share in (0.1, 0.1):
        kept = np.sort(np.random.default_rng(len(kept)).permutation(kept)[: int(len(kept) * (1 - share))])
        remaining = FlatIndex(kept, [vectors[(kept - 7) // 3]])
        bring_up_to_date(trained, kept, remaining)
    index, built = timed(lambda: IvfIndex(trained, remaining, nprobe, device))
    found = index.search(queries, K)[1]
    _, recall = agreement(found, remaining.search(queries, K)[1])
    return {
        "rows after deletes": len(index),
        "deleted rows found": int((~np.isin(found, kept)).sum()),
        "recall@10 after deletes, %": 100 * recall,
        "new GPU copy, s": built,
    }


if __name__ == "__main__":
    main()
