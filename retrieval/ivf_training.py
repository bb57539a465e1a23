"""Training an inverted file index: centroids from a sample, and how many lists a search must read.

About four lists a square root of the rows (FAISS, Guidelines to choose an index); the centroids come from a sample,
and `nprobe` is the smallest number that finds the wanted share of the exact neighbours of held-out queries. A query is
the mean of two vectors that were not in the sample: questions lie farther from the chunks that answer them (cosines of
0.5 to 0.7) than chunks lie from one another, so chunks as queries would promise too much.
"""

from __future__ import annotations

import logging
import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ragkit.errors import RetrievalError
from ragkit.retrieval.base import FloatMatrix, IdVector
from ragkit.retrieval.faiss_runtime import import_faiss
from ragkit.retrieval.flat import FlatIndex
from ragkit.retrieval.ivf_index import IvfIndex, add_rows
from ragkit.retrieval.windows import unit_rows

logger = logging.getLogger(__name__)

SAMPLE_PER_LIST = 64
HELD_OUT = 256
NEIGHBOURS = 10
RECALL_GOAL = 0.95


@dataclass(frozen=True, slots=True)
class IvfFacts:
    """What training found.

    Attributes:
        nlist: number of lists.
        nprobe: lists that a search reads.
        recall: share of the ten exact neighbours that the search finds, over the held-out queries.
        trained_rows: rows there were at training.
    """

    nlist: int
    nprobe: int
    recall: float
    trained_rows: int

    def as_params(self) -> dict[str, int | float]:
        """Return plain values for the store's record."""
        return asdict(self)


def train_ivf(row_ids: IdVector, exact: FlatIndex, dim: int, seed: int = 0) -> tuple[Any, IvfFacts]:
    """Return a CPU index that holds every row of `exact`, and what its training found.

    Args:
        row_ids: (rows,) ascending ids of the rows of `exact`.
        exact: the vectors; also the truth that recall is measured against.
        dim: length of a vector.
        seed: chooses sample and held-out rows; equal inputs give equal indexes.

    Raises:
        RetrievalError: there are too few rows to train on.
    """
    faiss = import_faiss()
    rows = len(row_ids)
    held_out = min(HELD_OUT, rows // 10)
    nlist = max(1, min(round(4 * math.sqrt(rows)), (rows - held_out) // 39))  # FAISS wants 39 points a centroid
    if held_out < 1:
        raise RetrievalError(f"{rows} rows are too few to train an index on; exact search serves them")
    chosen = np.random.default_rng(seed).permutation(rows)[: held_out + nlist * SAMPLE_PER_LIST]
    quantizer = faiss.IndexFlatIP(dim)
    index = faiss.IndexIVFFlat(quantizer, dim, nlist, faiss.METRIC_INNER_PRODUCT)
    index.own_fields = True
    quantizer.this.disown()
    index.cp.seed = seed + 1
    index.cp.spherical = True
    index.train(exact.take(np.sort(chosen[held_out:])))
    add_rows(index, row_ids, np.arange(rows), exact)
    held = exact.take(np.sort(chosen[:held_out]))
    nprobe, recall = choose_nprobe(index, exact, unit_rows(held + np.roll(held, held_out // 2, axis=0)))
    facts = IvfFacts(nlist, nprobe, recall, rows)
    logger.info("trained a vector index of %d rows: %d lists, %d read, recall %.3f", rows, nlist, nprobe, recall)
    return index, facts


def choose_nprobe(index: Any, exact: FlatIndex, queries: FloatMatrix, goal: float = RECALL_GOAL) -> tuple[int, float]:
    """Return the smallest tried `nprobe` with a recall@10 of at least `goal`, and that recall."""
    _, truth = exact.search(queries, NEIGHBOURS)
    nprobe = 1
    while True:
        _, found = IvfIndex(index, exact, nprobe).search(queries, NEIGHBOURS)
        recall = mean_recall(found, truth)
        if recall >= goal or nprobe >= index.nlist:
            return nprobe, recall
        nprobe = min(index.nlist, max(nprobe + 1, round(nprobe * 1.4)))


def mean_recall(found: IdVector, truth: IdVector) -> float:
    """Return the mean share of each query's true neighbours that were found."""
    shares = [len(np.intersect1d(got, true)) / max(1, len(true)) for got, true in zip(found, truth, strict=True)]
    return float(np.mean(shares))
