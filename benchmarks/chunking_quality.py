"""Chunkers compared at equal retrieved characters: Chroma's chunking evaluation, xquad and code_search.

    RAGKIT_DATA=... python benchmarks/chunking_quality.py [--sets xquad ...] [--chunkers recursive ...]
        [--caps 64 128 256] [--unit tokens|characters] [--late] [--questions N] [--cache FOLDER] [--plot FILE.svg]
        [--record NAME]

`ragkit eval chunking` measures the same; this script keeps the raw numbers. Every ranking is cut at the same number of
characters (its last chunk is cut to fit), so that longer chunks buy nothing. chunking_evaluation and code_search: share
of the answers' characters that are retrieved. xquad: the answer lies whole in a piece retrieved within 800 characters,
and, apart from that, in the first chunk, whatever its length (`--unit characters --caps 800` makes that the hit at 1 of
chunks of at most 800 characters).
For each row of Chroma's published table for all-MiniLM-L6-v2 the budget is five chunks of the row's mean size.
Intervals are 95% of a paired bootstrap over the questions against recursive chunks under the same cap. `--chunkers`
takes every name of `ragkit eval chunking`, also `perplexity` and `margin`, which run a language model over all text,
and `chonkie`, which is that package's recursive chunker.
`--late` embeds chunks within their documents (late chunking). `--cache` keeps vectors and losses of texts between runs;
it changes no result.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from chunking_peers import chonkie_recursive, plain_tokenizer
from report import markdown_table, write_result

from ragkit.bench.cached_embedder import CachedEmbedder
from ragkit.bench.caps import DEFAULT_CAPS, CapUnit
from ragkit.bench.chunking_plots import plot_frontier
from ragkit.bench.chunking_quality import ChunkingEvaluation, EvaluationTools
from ragkit.bench.chunking_rankings import Mode
from ragkit.bench.chunking_tables import ComparisonRow
from ragkit.bench.chunking_variants import DEFAULT_VARIANTS, VARIANTS, ComparedModels
from ragkit.bench.question_sets import PUBLIC_SETS, Metric, load_question_set
from ragkit.chunking.characters import CharacterTokenizer
from ragkit.cli.output import Output
from ragkit.cli.progress import progress_for
from ragkit.config import ChunkingConfig, EmbeddingConfig, PipelineConfig
from ragkit.pipeline import Pipeline
from ragkit.retrieval.chunk_vectors import chunk_embedder
from ragkit.types import Chunk, Document, TextTokenizer, chunk_id_of


class Chonkie:
    """chonkie's RecursiveChunker with its default rules, as a chunker of the comparison."""

    fingerprint = "chonkie"

    def __init__(self, config: ChunkingConfig, tokenizer: TextTokenizer, models: ComparedModels) -> None:
        by_characters = isinstance(tokenizer, CharacterTokenizer)
        counts = "character" if by_characters else plain_tokenizer(models.engine.folder)
        self._chunk, self._tokenizer = chonkie_recursive(counts, config.max_tokens), tokenizer

    def chunk(self, document: Document) -> list[Chunk]:
        """Return its chunks with their places, which follow from their lengths: it keeps every character."""
        chunks: list[Chunk] = []
        stop = 0
        texts = self._chunk(document.text)
        for index, (text, count) in enumerate(zip(texts, self._tokenizer.count_batch(texts), strict=True)):
            start, stop = stop, stop + len(text)
            chunk_id = chunk_id_of(document.doc_id, start, stop)
            chunks.append(Chunk(chunk_id, document.doc_id, index, text, start, stop, count))
        return chunks


COMPARED = {**VARIANTS, "chonkie": Chonkie}


def table_rows(rows: Sequence[ComparisonRow]) -> Iterator[dict[str, Any]]:
    for row in rows:
        against = {
            f"{mode} against recursive": f"{one.mean:+.1f} [{one.low:+.1f}, {one.high:+.1f}]"
            for mode, one in row.against_baseline.items()
        }
        first = {f"{mode}, first chunk": row.first_chunk[mode] for mode in Mode} if row.metric is Metric.HIT else {}
        facts = {"set": row.data, "chunker": row.chunker, "cap": row.cap, "chunks": row.chunks}
        yield facts | {
            "mean characters": row.mean_characters,
            "characters": row.characters,
            **row.scores,
            **against,
            **first,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", choices=list(PUBLIC_SETS), default=list(PUBLIC_SETS))
    parser.add_argument("--chunkers", nargs="+", choices=list(COMPARED), default=list(DEFAULT_VARIANTS))
    parser.add_argument("--caps", nargs="+", type=int)
    parser.add_argument("--unit", type=CapUnit, choices=list(CapUnit), default=CapUnit.TOKENS)
    parser.add_argument("--questions", type=int, help="only the first N questions and their documents: a quick look")
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--late", action="store_true")
    parser.add_argument("--record", help="name of the file of raw numbers")
    options = parser.parse_args()
    if not os.environ.get("RAGKIT_DATA"):
        sys.exit("skipped: RAGKIT_DATA is not set")
    sets = [load_question_set(name, Path(os.environ["RAGKIT_DATA"])) for name in options.sets]
    if options.questions:
        sets = [data.first(options.questions) for data in sets]
    pipeline = Pipeline(Path(), PipelineConfig())  # for its models alone
    embedder = CachedEmbedder(pipeline.embedder, options.cache)
    by_characters = options.unit is CapUnit.CHARACTERS
    tokenizer = CharacterTokenizer() if by_characters else pipeline.tokenizer
    late = chunk_embedder(pipeline.embedder, EmbeddingConfig(late_chunking=True)) if options.late else None
    tools = EvaluationTools(tokenizer, embedder, late, lambda: pipeline.engine, cache=options.cache)
    caps = options.caps or DEFAULT_CAPS[options.unit]
    evaluation = ChunkingEvaluation(sets, options.chunkers, caps, tools, COMPARED)
    progress = progress_for(Output())
    evaluation.run(progress)
    progress.close()
    report = evaluation.report()
    found = list(table_rows(report.rows))
    columns = ["set", "chunker", "cap", "chunks", "mean characters", "characters", *Mode]
    columns += [name for name in dict.fromkeys(key for row in found for key in row) if name not in columns]
    print(markdown_table(found, columns))
    if report.chroma:
        chroma = [asdict(row) for row in report.chroma]
        print("\n" + markdown_table(chroma, list(chroma[0])))
    if options.plot:
        plot_frontier(report, options.plot)
    name = "chunking_quality_characters" if by_characters else "chunking_quality"
    name = options.record or name + ("_quick" if options.questions else "")
    settings = {"sets": options.sets, "chunkers": options.chunkers, "caps": caps, "unit": options.unit}
    payload = {"settings": settings | {"late": options.late}, **asdict(report)}
    print(f"\nraw numbers: {write_result(name, payload)}")


if __name__ == "__main__":
    main()
