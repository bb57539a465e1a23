"""Chunkers compared at equal retrieved characters: Chroma's chunking evaluation, xquad and code_search.

    RAGKIT_DATA=... python benchmarks/chunking_quality.py [--sets xquad ...] [--chunkers recursive ...]
        [--max-tokens 64 128 256] [--perplexity] [--cache FOLDER]

Every ranking is cut at the same number of characters (its last chunk is cut to fit), so that longer chunks buy
nothing. Scores are characters: recall is the share of the reference that is retrieved, IoU that share of
everything retrieved plus what was missed (chunking_evaluation, base_evaluation.py). For each row of Chroma's published
table for all-MiniLM-L6-v2 the budget is five chunks of the row's mean size. xquad: the answer lies whole in a piece
retrieved within 800 characters. code_search: share of the gold chunks' characters within five mean gold chunks.
Intervals are 95% of a paired bootstrap over the questions against recursive chunks under the same cap.
`--cache` keeps the vectors of texts between runs; it changes no result.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from report import markdown_table, paired_bootstrap, write_result
from retrieval_data import Question, QuestionSet, Span, load_question_sets, whole_share, within_budget

from ragkit.chunking.base import Chunker, check_chunks
from ragkit.chunking.boundary_head import BoundaryHeadOptions, boundary_head_chunker
from ragkit.chunking.breakpoints import BreakpointRule
from ragkit.chunking.cluster import ClusterChunker
from ragkit.chunking.length_constrained import LogNormalPrior
from ragkit.chunking.perplexity import PerplexityOptions, PerplexityScorer, perplexity_chunker
from ragkit.chunking.registry import create_chunker
from ragkit.chunking.semantic import SemanticOptions, semantic_chunker
from ragkit.config import ChunkingConfig, EmbeddingConfig, LengthPriorName
from ragkit.models.resolve import resolve
from ragkit.models.tokenizer import ModelTokenizer
from ragkit.retrieval.embedders import load_embedder

SETS = ("chunking_evaluation", "xquad", "code_search")
GENERATOR = "smollm2-135m-instruct"
MODES = ("dense", "bm25", "hybrid")
DEPTH = 200
XQUAD_CHARACTERS = 800
CHROMA_TOKENS = 328_208  # of its five corpora, in its own tokens
# Chroma's table for all-MiniLM-L6-v2: (chunker, mean tokens of a chunk, recall, IoU), five chunks retrieved.
CHROMA_ROWS = (
    ("Recursive 250/125", 180, 78.7, 4.9),
    ("TokenText 250/125", 250, 82.4, 3.5),
    ("Recursive 250", 162, 78.5, 5.4),
    ("TokenText 250", 250, 77.1, 3.3),
    ("Recursive 200", 128, 75.7, 6.5),
    ("TokenText 200", 200, 76.6, 4.1),
    ("Cluster 250", 168, 77.3, 6.0),
    ("Cluster 200", 102, 75.2, 7.2),
)

Build = Callable[[ChunkingConfig, ModelTokenizer, Any], Chunker]


def by_rule(rule: BreakpointRule, **options: Any) -> Build:
    return lambda config, tokenizer, embedder: semantic_chunker(
        config, tokenizer, embedder, SemanticOptions(rule, **options)
    )


def semantic_to_length(config: ChunkingConfig, tokenizer: ModelTokenizer, embedder: Any) -> Chunker:
    """Return the semantic chunker with the layout and length of `balanced`: what similarity adds to them."""
    options = SemanticOptions(BreakpointRule.LOCAL_MINIMUM, paragraph_log_odds=2.0)
    return semantic_chunker(config, tokenizer, embedder, options, LogNormalPrior(config.max_tokens * 2 / 3, 0.5))


def head_to_length(config: ChunkingConfig, tokenizer: ModelTokenizer, embedder: Any) -> Chunker:
    """Return the boundary head with the layout and length of `balanced`: what the head adds to them."""
    options = BoundaryHeadOptions(paragraph_log_odds=2.0)
    return boundary_head_chunker(
        config, tokenizer, embedder, options=options, prior=LogNormalPrior(config.max_tokens * 2 / 3, 0.5)
    )


def with_prior(name: str, prior: LengthPriorName) -> Build:
    """Return the chunker `name` with its boundaries and chunk lengths solved together."""
    return lambda config, tokenizer, _: create_chunker(
        ChunkingConfig(name, config.max_tokens, length_prior=prior), tokenizer
    )


CHUNKERS: Mapping[str, Build] = {
    **{
        name: lambda config, tokenizer, _, name=name: create_chunker(ChunkingConfig(name, config.max_tokens), tokenizer)
        for name in ("recursive", "sentence", "token", "balanced", "structural", "code")
    },
    **{
        f"{name}, {prior}": with_prior(name, prior)
        for name in ("recursive", "sentence", "token")
        for prior in LengthPriorName
        if prior is not LengthPriorName.AUTO
    },
    **{f"semantic {rule.value}": by_rule(rule) for rule in BreakpointRule},
    "semantic + length": semantic_to_length,
    "cluster": lambda config, tokenizer, embedder: ClusterChunker(config, tokenizer, embedder),
    "boundary head": lambda config, tokenizer, embedder: boundary_head_chunker(config, tokenizer, embedder),
    "boundary head + length": head_to_length,
}


class CachedEmbedder:
    """An embedder that remembers the vectors of texts, in memory and where asked in a folder."""

    def __init__(self, embedder: Any, folder: Path | None) -> None:
        self._embedder = embedder
        self.embedder_id: str = embedder.embedder_id
        self._folder = folder
        self._rows: dict[str, int] = {}
        self._vectors: list[NDArray[np.float32]] = []
        if folder is not None and (folder / "keys.json").exists():
            stored = json.loads((folder / "keys.json").read_text(encoding="ascii"))
            if stored["embedder"] == self.embedder_id:
                self._rows = {key: row for row, key in enumerate(stored["keys"])}
                self._vectors = list(np.load(folder / "vectors.npy", allow_pickle=False))

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return the vectors of `texts`, embedding only those not seen before."""
        keys = [hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:24] for text in texts]
        unseen = {key: text for key, text in zip(keys, texts, strict=True) if key not in self._rows}
        if unseen:
            for key, vector in zip(unseen, self._embedder.encode(list(unseen.values())), strict=True):
                self._rows[key] = len(self._vectors)
                self._vectors.append(vector)
        return np.stack([self._vectors[self._rows[key]] for key in keys])

    def save(self) -> None:
        """Write what is remembered."""
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            np.save(self._folder / "vectors.npy", np.stack(self._vectors))
            stored = {"embedder": self.embedder_id, "keys": list(self._rows)}
            (self._folder / "keys.json").write_text(json.dumps(stored), encoding="ascii")


@dataclass
class Chunked:
    """One collection in chunks, with the ranking of each question by mode."""

    spans: list[Span]
    rankings: dict[str, list[list[int]]]

    def retrieved(self, mode: str, question: int, characters: int) -> list[Span]:
        """Return what a question gets within a budget."""
        return within_budget([self.spans[row] for row in self.rankings[mode][question]], characters)


def rank(data: QuestionSet, chunker: Chunker, max_tokens: int, embedder: CachedEmbedder) -> Chunked:
    """Return the collection chunked and every question's rankings: dense, BM25, and both by reciprocal rank."""
    spans: list[Span] = []
    texts: list[str] = []
    for uri, document in data.documents.items():
        chunks = chunker.chunk(document)
        check_chunks(document, chunks, max_tokens)
        spans += [(uri, chunk.char_start, chunk.char_stop) for chunk in chunks]
        texts += [chunk.text for chunk in chunks]
    questions = [question.text for question in data.questions]
    vectors = embedder.encode(texts)
    similarity = embedder.encode(questions) @ vectors.T
    lexical = bm25(texts, questions)
    dense_lists, bm25_lists = _best(similarity), _best(lexical)
    hybrid = [_fused(one, two) for one, two in zip(dense_lists, bm25_lists, strict=True)]
    return Chunked(spans, {"dense": dense_lists, "bm25": bm25_lists, "hybrid": hybrid})


def bm25(texts: Sequence[str], questions: Sequence[str], k1: float = 1.5, b: float = 0.75) -> NDArray[np.float64]:
    """Return (questions, texts) Okapi BM25 scores over words of letters and digits."""
    words = [Counter(re.findall(r"[a-z0-9]+", text.lower())) for text in texts]
    lengths = np.array([sum(counts.values()) for counts in words], dtype=np.float64)
    penalty = k1 * (1 - b + b * lengths / lengths.mean())
    postings: dict[str, list[tuple[int, int]]] = {}
    for row, counts in enumerate(words):
        for word, count in counts.items():
            postings.setdefault(word, []).append((row, count))
    scores = np.zeros((len(questions), len(texts)))
    for at, question in enumerate(questions):
        for word in set(re.findall(r"[a-z0-9]+", question.lower())):
            found = postings.get(word)
            if found:
                rows, counts = (np.array(part) for part in zip(*found, strict=True))
                idf = math.log(1 + (len(texts) - len(found) + 0.5) / (len(found) + 0.5))
                scores[at, rows] += idf * counts * (k1 + 1) / (counts + penalty[rows])
    return scores


def _best(scores: NDArray[Any]) -> list[list[int]]:
    return [row.tolist() for row in np.argsort(-scores, axis=1, kind="stable")[:, :DEPTH]]


def _fused(one: Sequence[int], two: Sequence[int], k: int = 60) -> list[int]:
    totals: dict[int, float] = {}
    for ranking in (one, two):
        for place, row in enumerate(ranking, 1):
            totals[row] = totals.get(row, 0.0) + 1 / (k + place)
    return sorted(totals, key=lambda row: (-totals[row], row))


def recall_and_iou(retrieved: Sequence[Span], gold: Sequence[Span]) -> tuple[float, float]:
    """Return Chroma's recall and IoU: overlapping chunks count once in the numerator and each time below it."""
    wanted = {(uri, place) for uri, start, stop in gold for place in range(start, stop)}
    covered = {
        (uri, place)
        for uri, start, stop in retrieved
        for other, first, last in gold
        if uri == other
        for place in range(max(start, first), min(stop, last))
    }
    size = sum(stop - start for _, start, stop in retrieved)
    return len(covered) / len(wanted), len(covered) / (size + len(wanted) - len(covered))


def scores_of(data: QuestionSet, chunked: Chunked, mode: str, characters: int) -> list[float]:
    """Return each question's score within a budget: a hit for xquad, recall elsewhere."""
    found = []
    for at, question in enumerate(data.questions):
        spans = chunked.retrieved(mode, at, characters)
        whole = data.name == "xquad"
        found.append(whole_share(spans, question.gold) if whole else recall_and_iou(spans, question.gold)[0])
    return found


def chroma_table(data: QuestionSet, runs: Mapping[tuple[str, int], Chunked]) -> list[dict[str, Any]]:
    """Return, for each published row, the best recall and the best IoU of the dense runs at its characters."""
    per_token = sum(len(document.text) for document in data.documents.values()) / CHROMA_TOKENS
    rows = []
    for name, tokens, recall, iou in CHROMA_ROWS:
        characters = round(5 * tokens * per_token)
        found = {
            f"{chunker} {cap}": np.mean(
                [
                    recall_and_iou(chunked.retrieved("dense", at, characters), question.gold)
                    for at, question in enumerate(data.questions)
                ],
                axis=0,
            )
            for (chunker, cap), chunked in runs.items()
        }
        by_recall, by_iou = (max(found, key=lambda key: found[key][part]) for part in (0, 1))
        rows.append(
            {
                "row": name,
                "characters": characters,
                "their_recall": recall,
                "our_recall": 100 * float(found[by_recall][0]),
                "by_recall": by_recall,
                "their_iou": iou,
                "our_iou": 100 * float(found[by_iou][1]),
                "by_iou": by_iou,
            }
        )
    return rows


def compare(data: QuestionSet, runs: Mapping[tuple[str, int], Chunked], characters: int) -> list[dict[str, Any]]:
    """Return every run's mean score by mode, and the dense difference to recursive under the same cap."""
    rows = []
    for (chunker, cap), chunked in runs.items():
        row: dict[str, Any] = {
            "set": data.name,
            "chunker": chunker,
            "cap": cap,
            "chunks": len(chunked.spans),
            "mean_characters": float(np.mean([stop - start for _, start, stop in chunked.spans])),
            "budget": characters,
        }
        for mode in MODES:
            scores = scores_of(data, chunked, mode, characters)
            row[mode] = 100 * float(np.mean(scores))
            plain = runs.get(("recursive", cap))
            if plain is not None and chunker != "recursive":
                mean, low, high = paired_bootstrap(scores, scores_of(data, plain, mode, characters))
                row[f"{mode}_difference"] = [100 * mean, 100 * low, 100 * high]
                row[f"{mode}_against_recursive"] = f"{100 * mean:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"
        rows.append(row)
    return rows


def budget_of(data: QuestionSet) -> int:
    """Return the characters at which the chunkers are compared on a set."""
    if data.name == "xquad":
        return XQUAD_CHARACTERS
    if data.name == "code_search":
        sizes = [stop - start for question in data.questions for _, start, stop in question.gold]
        return round(5 * float(np.mean(sizes)))
    per_token = sum(len(document.text) for document in data.documents.values()) / CHROMA_TOKENS
    return round(5 * 168 * per_token)


def perplexity_build(window: int = 512, segment: int = 512) -> Build:
    """Return the perplexity chunker with the bundled generator."""
    from ragkit.chunking.decoder_losses import DecoderLosses
    from ragkit.generation.engine import Engine

    engine = Engine.load(GENERATOR, kv_tokens=64)
    losses = DecoderLosses(engine.decoder, window, segment)
    scorer = PerplexityScorer(losses, engine.tokenizer, GENERATOR, PerplexityOptions())
    return lambda config, tokenizer, _: perplexity_chunker(config, tokenizer, scorer)


def first_questions(data: QuestionSet, count: int) -> QuestionSet:
    """Return the set with its first questions and the documents that they ask about."""
    kept: list[Question] = list(data.questions[:count])
    uris = {uri for question in kept for uri, _, _ in question.gold}
    documents = {uri: document for uri, document in data.documents.items() if uri in uris}
    return QuestionSet(data.name, data.metric, data.k, documents, {}, kept, data.score)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", choices=SETS, default=SETS)
    parser.add_argument("--chunkers", nargs="+", choices=list(CHUNKERS), default=list(CHUNKERS))
    parser.add_argument("--max-tokens", nargs="+", type=int, default=[64, 128, 256])
    parser.add_argument("--perplexity", action="store_true", help="the perplexity chunker too; wants a GPU or an hour")
    parser.add_argument("--questions", type=int, help="only the first N questions and their documents: a quick look")
    parser.add_argument("--cache", type=Path)
    options = parser.parse_args()
    tokenizer = ModelTokenizer(resolve(GENERATOR))
    embedder = CachedEmbedder(load_embedder(EmbeddingConfig()), options.cache)
    builds = {name: CHUNKERS[name] for name in options.chunkers}
    if options.perplexity:
        builds["perplexity"] = perplexity_build()
    rows: list[dict[str, Any]] = []
    chroma: list[dict[str, Any]] = []
    for data in load_question_sets(options.sets):
        chosen = first_questions(data, options.questions) if options.questions else data
        runs: dict[tuple[str, int], Chunked] = {}
        for name, build in builds.items():
            for cap in options.max_tokens:
                chunker = build(ChunkingConfig(max_tokens=cap), tokenizer, embedder)
                runs[name, cap] = rank(chosen, chunker, cap, embedder)
                embedder.save()
        rows += compare(chosen, runs, budget_of(chosen))
        if data.name == "chunking_evaluation":
            chroma = chroma_table(chosen, runs)
    columns = ["set", "chunker", "cap", "chunks", "mean_characters", "budget", *MODES, "dense_against_recursive"]
    print(markdown_table(rows, columns))
    if chroma:
        print("\n" + markdown_table(chroma, list(chroma[0])))
    name = "chunking_quality_quick" if options.questions else "chunking_quality"
    print(f"\nraw numbers: {write_result(name, {'runs': rows, 'chroma': chroma})}")


if __name__ == "__main__":
    main()
