"""Late chunking against chunks embedded one by one: dense search over the same chunks with the same embedder.

    RAGKIT_DATA=... python benchmarks/late_chunking.py [--sets xquad ...] [--max-tokens 64 256] [--overlaps 0.25 ...]
        [--model NAME]

Scores and sets are those of benchmarks/retrieval_quality.py. Intervals are 95% of a paired bootstrap over the questions
against separate chunks under the same cap. What is measured holds for the model it was measured with: the bundled
embedder reads 256 tokens at once, the published gains are those of a window of 8,192.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
from report import markdown_table, paired_bootstrap, write_result
from retrieval_data import QuestionSet, Span, load_question_sets

from ragkit.config import EmbeddingConfig
from ragkit.retrieval.base import Embedder
from ragkit.retrieval.chunk_vectors import chunk_embedder
from ragkit.retrieval.embedders import load_embedder
from ragkit.store.base import DocumentSpans

SETS = ("chunking_evaluation", "xquad", "code_search")
DEPTH = 200


def scores_of(data: QuestionSet, config: EmbeddingConfig, embedder: Embedder) -> list[float]:
    """Return each question's score with chunks embedded as `config` says."""
    documents, places = [], []
    for uri, chunks in data.chunks.items():
        spans = [(chunk.char_start, chunk.char_stop) for chunk in chunks]
        documents.append(DocumentSpans(data.documents[uri].text, spans))
        places += [(uri, *span) for span in spans]
    vectors = chunk_embedder(embedder, config).encode_chunks(documents)
    similarity = embedder.encode_queries([question.text for question in data.questions]) @ vectors.T
    best = np.argsort(-similarity, axis=1, kind="stable")[:, : data.k]
    ranked: list[list[Span]] = [[places[row] for row in rows] for rows in best]
    return [data.score(spans, question.gold) for spans, question in zip(ranked, data.questions, strict=True)]


def compare(data: QuestionSet, cap: int, overlaps: list[float], model: str, embedder: Embedder) -> list[dict[str, Any]]:
    """Return a row for separate chunks and one for each overlap."""
    separate = scores_of(data, EmbeddingConfig(model), embedder)
    facts = {"set": data.name, "metric": data.metric, "cap": cap}
    rows: list[dict[str, Any]] = [{**facts, "chunks": "separate", "score": 100 * float(np.mean(separate))}]
    for overlap in overlaps:
        late = scores_of(data, EmbeddingConfig(model, late_chunking=True, window_overlap=overlap), embedder)
        mean, low, high = (100 * value for value in paired_bootstrap(late, separate))
        row = {**facts, "chunks": f"late, overlap {overlap:g}", "score": 100 * float(np.mean(late))}
        rows.append(row | {"difference": [mean, low, high], "against": f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", choices=SETS, default=SETS)
    parser.add_argument("--max-tokens", nargs="+", type=int, default=[64, 256])
    parser.add_argument("--overlaps", nargs="+", type=float, default=[0.0, 0.25, 0.5])
    parser.add_argument("--model", default=EmbeddingConfig().model)
    options = parser.parse_args()
    embedder = load_embedder(EmbeddingConfig(options.model))
    rows: list[dict[str, Any]] = []
    for cap in options.max_tokens:
        # code_search comes in chunks, so the cap does not matter there
        names = [name for name in options.sets if name != "code_search" or cap == options.max_tokens[0]]
        for data in load_question_sets(names, max_tokens=cap):
            rows += compare(data, cap, options.overlaps, options.model, embedder)
            print(markdown_table(rows[-len(options.overlaps) - 1 :], list(rows[-1])), flush=True)
    columns = ["set", "metric", "cap", "chunks", "score", "against"]
    print("\n" + markdown_table(rows, columns))
    print(f"\nraw numbers: {write_result('late_chunking', {'model': options.model, 'rows': rows})}")


if __name__ == "__main__":
    main()
