"""Hybrid search against BM25 and dense alone at equal retrieved characters, and the sweep that the defaults rest on.

    RAGKIT_DATA=... python benchmarks/retrieval_quality.py [--sets xquad ...] [--sweep]

Scores: share of the reference characters among the first five chunks (chunking_evaluation, after Chroma's evaluation),
share of gold chunks among the first five (code_search), answer within the first chunk (xquad). The columns at equal
characters cut every ranking at the same number of characters: k times the mean chunk length of the collection.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from report import markdown_table, paired_bootstrap, write_result
from retrieval_data import QuestionSet, Span, load_question_sets, within_budget

from ragkit.config import EmbeddingConfig, RetrievalConfig, SearchMode
from ragkit.retrieval.base import FloatMatrix
from ragkit.retrieval.bm25 import TermSelection, search_bm25
from ragkit.retrieval.embedders import load_embedder
from ragkit.retrieval.flat import FlatIndex
from ragkit.retrieval.fusion import Ranked, reciprocal_rank_fusion, score_fusion
from ragkit.retrieval.retriever import Retriever
from ragkit.retrieval.selection import select_distinct
from ragkit.store.base import IndexedDocument, SourceUpdate, StoredChunk
from ragkit.store.store import Store

DEPTH = 200
SETS = ("chunking_evaluation", "code_search", "xquad")
SHARES = (1.0, 0.3, 0.2, 0.1, 0.05, 0.02)


@dataclass
class Bench:
    """One question set in a store, with what each leg finds for each question."""

    data: QuestionSet
    store: Store
    stored: dict[int, StoredChunk]
    index: FlatIndex
    queries: FloatMatrix
    dense: list[Ranked]
    places: dict[int, Span] = field(init=False)

    def __post_init__(self) -> None:
        self.places = {
            row: (stored.uri, stored.chunk.char_start, stored.chunk.char_stop) for row, stored in self.stored.items()
        }

    def scores(self, rankings: Sequence[Sequence[int]]) -> tuple[list[float], list[float]]:
        """Return each question's score at k chunks and at equal characters."""
        lengths = [stop - start for _, start, stop in self.places.values()]
        budget = round(self.data.k * float(np.mean(lengths)))
        at_k, at_budget = [], []
        for question, rows in zip(self.data.questions, rankings, strict=True):
            spans = [self.places[row] for row in rows]
            at_k.append(self.data.score(spans[: self.data.k], question.gold))
            at_budget.append(self.data.score(within_budget(spans, budget), question.gold))
        return at_k, at_budget

    def bm25(self, share: float) -> list[Ranked]:
        """Return the BM25 leg's list for each question, words in more than `share` of the chunks left out."""
        lists = []
        for question in self.data.questions:
            selection = TermSelection(common_share=share)
            scores, rows = search_bm25(self.store, question.text, DEPTH, len(self.places), None, selection)
            lists.append(Ranked(rows, scores))
        return lists


def build(data: QuestionSet, embedder: Any, folder: Path, tokenizer: str, vectors: dict[str, Any]) -> Bench:
    """Return the question set in a new store; `vectors` keeps embeddings from one tokenizer to the next."""
    store = Store.create(folder, fts_tokenizer=tokenizer)
    updates = []
    for uri, document in data.documents.items():
        chunks = data.chunks[uri]
        if uri not in vectors:
            vectors[uri] = embedder.encode([chunk.text for chunk in chunks])
        updates.append(
            SourceUpdate(uri, document.doc_id, len(document.text), 0,
                         documents=(IndexedDocument(document, chunks, vectors[uri]),))
        )  # fmt: skip
    with store.writer() as writer:
        writer.configure(
            embedder_id=embedder.embedder_id, dim=embedder.dim, chunker="benchmark", chunker_fingerprint="",
            tokenizer_id="",
        )  # fmt: skip
        writer.commit(updates)
    stored = {one.row_id: one for one in store.chunks(store.row_ids())}
    table = store.vectors()
    index = FlatIndex(table.row_ids, [part.vectors for part in table.parts])
    queries = embedder.encode_queries([question.text for question in data.questions])
    scores, rows = index.search(queries, DEPTH)
    dense = [Ranked(r, s) for r, s in zip(rows, scores, strict=True)]
    return Bench(data, store, stored, index, queries, dense)


def fuse(
    bench: Bench, bm25: Sequence[Ranked], weight: float = 0.5, k: int = 60, depth: int = 100, method: str = "scores"
) -> list[list[int]]:
    """Return the fused ranking of each question; `weight` is the dense leg's, `k` the constant of `rrf`."""
    rankings = []
    for number, (dense, sparse) in enumerate(zip(bench.dense, bm25, strict=True)):
        left = Ranked(dense.row_ids[:depth], dense.scores[:depth], weight)
        right = Ranked(sparse.row_ids[:depth], sparse.scores[:depth], 1 - weight)
        if method == "rrf":
            fused = reciprocal_rank_fusion([left, right], k)
        else:
            missing = np.setdiff1d(right.row_ids, left.row_ids)
            more = bench.index.similarities(bench.queries[number : number + 1], missing)
            left = Ranked(np.append(left.row_ids, missing), np.append(left.scores, more), weight)
            fused = score_fusion([_from_least(left), _from_least(right)] if method == "min-max" else [left, right])
        rankings.append([row for row, _ in fused])
    return rankings


def _from_least(ranked: Ranked) -> Ranked:
    """Return the list with its least score at zero: min-max scaling, for comparison."""
    return Ranked(ranked.row_ids, ranked.scores - ranked.scores.min(initial=np.inf), ranked.weight)


def product_rankings(bench: Bench, embedder: Any, mode: SearchMode) -> list[list[int]]:
    """Return what the retriever itself returns with its defaults."""
    retriever = Retriever(bench.store, embedder, RetrievalConfig())
    return [
        [hit.stored.row_id for hit in retriever.retrieve(question.text, 2 * bench.data.k, mode=mode).chunks]
        for question in bench.data.questions
    ]


def compare_modes(bench: Bench, embedder: Any) -> list[dict[str, Any]]:
    """Return one row a mode, with paired intervals of hybrid minus the mode at equal characters."""
    results = {mode: bench.scores(product_rankings(bench, embedder, mode)) for mode in SearchMode}
    hybrid = results[SearchMode.HYBRID]
    rows = []
    for mode, (at_k, at_budget) in results.items():
        row = {
            "set": bench.data.name, "metric": bench.data.metric, "mode": str(mode), "questions": len(at_k),
            "at k": 100 * float(np.mean(at_k)), "equal characters": 100 * float(np.mean(at_budget)),
        }  # fmt: skip
        if mode is not SearchMode.HYBRID:
            for column, ours, theirs in (("k", hybrid[0], at_k), ("characters", hybrid[1], at_budget)):
                mean, low, high = paired_bootstrap(ours, theirs)
                row[f"hybrid minus this, {column}"] = f"{100 * mean:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"
        rows.append(row)
    return rows


def sweep(bench: Bench, tokenizer: str) -> list[dict[str, Any]]:
    """Return one row a setting: score at k chunks, and at equal characters."""
    rows = []

    def add(setting: str, rankings: Sequence[Sequence[int]], distinct: bool = True) -> None:
        if distinct:
            shortlists = [[bench.stored[row] for row in ranking[: 4 * bench.data.k + 10]] for ranking in rankings]
            rankings = [[one.row_id for one in select_distinct([], list_, 3 * bench.data.k)] for list_ in shortlists]
        at_k, at_budget = bench.scores(rankings)
        rows.append(
            {"set": bench.data.name, "tokenizer": tokenizer, "setting": setting, "at k": 100 * float(np.mean(at_k)),
             "equal characters": 100 * float(np.mean(at_budget)), "scores": at_budget}
        )  # fmt: skip

    by_share = {share: bench.bm25(share) for share in SHARES}
    default = by_share[0.1]
    add("default: scores, dense weight 0.5, 100 candidates, words up to 10%", fuse(bench, default))
    add("default, near-duplicates kept", fuse(bench, default), distinct=False)
    add("dense alone", [ranked.row_ids.tolist() for ranked in bench.dense])
    for share, lists in by_share.items():
        add(f"bm25 alone, words up to {share:.0%} of chunks", [ranked.row_ids.tolist() for ranked in lists])
        add(f"scores, words up to {share:.0%} of chunks", fuse(bench, lists))
    for weight in (0.3, 0.4, 0.45, 0.5, 0.55, 0.6, 0.7):
        add(f"scores, dense weight {weight}", fuse(bench, default, weight=weight))
        add(f"min-max scores, dense weight {weight}", fuse(bench, default, weight=weight, method="min-max"))
        add(f"rrf k 60, dense weight {weight}", fuse(bench, default, weight=weight, method="rrf"))
    for depth in (10, 20, 50, 100, 200):
        add(f"scores, {depth} candidates", fuse(bench, default, depth=depth))
        add(f"rrf k 60, {depth} candidates", fuse(bench, default, depth=depth, method="rrf"))
    for k in (0, 5, 10, 20, 40, 60, 100):
        add(f"rrf, k {k}", fuse(bench, default, k=k, method="rrf"))
    against_default(rows)
    return rows


def against_default(rows: list[dict[str, Any]]) -> None:
    """Give each row the paired interval of the default minus it, at equal characters; drop the single scores."""
    ours = rows[0]["scores"]
    for row in rows:
        mean, low, high = paired_bootstrap(ours, row["scores"])
        row["default minus this"] = f"{100 * mean:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"
    for row in rows:
        del row["scores"]


def main() -> None:
    """Run the comparison, and the sweep where asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--sweep", action="store_true")
    arguments = parser.parse_args()
    embedder = load_embedder(EmbeddingConfig())
    modes, swept = [], []
    for data in load_question_sets(arguments.sets, max_tokens=arguments.max_tokens):
        vectors: dict[str, Any] = {}
        tokenizers = ("porter unicode61", "unicode61") if arguments.sweep else ("porter unicode61",)
        for tokenizer in tokenizers:
            with tempfile.TemporaryDirectory() as folder:
                bench = build(data, embedder, Path(folder) / "store", tokenizer, vectors)
                if tokenizer == tokenizers[0]:
                    modes += compare_modes(bench, embedder)
                if arguments.sweep:
                    swept += sweep(bench, tokenizer)
                bench.store.close()
    print(markdown_table(modes, list(modes[-1])))
    result: dict[str, Any] = {"modes": modes, "max_tokens": arguments.max_tokens}
    if arguments.sweep:
        print(markdown_table(swept, list(swept[0])))
        result["sweep"] = swept
    write_result("retrieval_quality", result)


if __name__ == "__main__":
    main()
