"""The three question sets of the retrieval benchmarks: documents, chunks, questions with gold spans, and their scores.

Read from the folder that RAGKIT_DATA names. Spans are half-open characters of a document.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from report import data_folder

from ragkit.chunking.registry import create_chunker
from ragkit.config import ChunkingConfig
from ragkit.models import resolve
from ragkit.models.tokenizer import ModelTokenizer
from ragkit.types import Chunk, Document, chunk_id_of

Span = tuple[str, int, int]  # document uri, first character, one past the last


@dataclass(frozen=True)
class Question:
    """A question and the spans that answer it."""

    text: str
    gold: tuple[Span, ...]


@dataclass(frozen=True)
class QuestionSet:
    """A collection with its questions.

    Attributes:
        name, metric: how the table calls them.
        k: how many chunks the published metric looks at.
        score: from the retrieved spans, best first, and the gold spans to a number between 0 and 1.
    """

    name: str
    metric: str
    k: int
    documents: Mapping[str, Document]
    chunks: Mapping[str, Sequence[Chunk]]
    questions: Sequence[Question]
    score: Callable[[Sequence[Span], Sequence[Span]], float]


def load_question_sets(names: Sequence[str], chunker: str = "recursive", max_tokens: int = 256) -> list[QuestionSet]:
    """Return the named sets, chunked as the product chunks by default (code_search comes in chunks already)."""
    tokenizer = ModelTokenizer(resolve("smollm2-135m-instruct"))
    cut = create_chunker(ChunkingConfig(chunker=chunker, max_tokens=max_tokens), tokenizer).chunk
    loaders = {"chunking_evaluation": _chunking_evaluation, "code_search": _code_search, "xquad": _xquad}
    folders = {name: data_folder(name) for name in names}
    missing = [name for name, folder in folders.items() if folder is None]
    if missing:
        sys.exit(f"skipped: RAGKIT_DATA is not set or holds no {', '.join(missing)}")
    return [loaders[name](folder, cut) for name, folder in folders.items() if folder is not None]


def within_budget(spans: Sequence[Span], characters: int) -> list[Span]:
    """Return the spans up to `characters` characters in all; the last one is cut to fit."""
    kept: list[Span] = []
    left = characters
    for uri, start, stop in spans:
        if left <= 0:
            break
        kept.append((uri, start, min(stop, start + left)))
        left -= stop - start
    return kept


def covered_share(retrieved: Sequence[Span], gold: Sequence[Span]) -> float:
    """Return the share of the gold characters that are retrieved (recall of Chroma's chunking evaluation)."""
    wanted = {(uri, place) for uri, start, stop in gold for place in range(start, stop)}
    found = {(uri, place) for uri, start, stop in retrieved for place in range(start, stop)}
    return len(wanted & found) / len(wanted)


def whole_share(retrieved: Sequence[Span], gold: Sequence[Span]) -> float:
    """Return the share of the gold spans that lie whole within one retrieved span."""
    return sum(
        any(uri == got and start <= first and last <= stop for got, start, stop in retrieved)
        for uri, first, last in gold
    ) / len(gold)


def _chunking_evaluation(folder: Path, cut: Callable[[Document], list[Chunk]]) -> QuestionSet:
    documents = {}
    for path in sorted((folder / "corpora").glob("*.md")):
        documents[path.stem] = Document.from_text(path.read_text(encoding="utf-8"), uri=path.stem)
    questions = []
    with (folder / "questions_df.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            spans = [(row["corpus_id"], ref["start_index"], ref["end_index"]) for ref in json.loads(row["references"])]
            questions.append(Question(row["question"], tuple(spans)))
    return QuestionSet(
        "chunking_evaluation", "recall@5", 5, documents, {uri: cut(d) for uri, d in documents.items()}, questions,
        covered_share,
    )  # fmt: skip


def _xquad(folder: Path, cut: Callable[[Document], list[Chunk]]) -> QuestionSet:
    documents = {
        row["doc"]: Document.from_text(row["text"], uri=row["doc"]) for row in _json_lines(folder / "docs.jsonl")
    }
    questions = [
        Question(row["question"], ((row["doc"], row["start"], row["end"]),))
        for row in _json_lines(folder / "questions.jsonl")
    ]
    return QuestionSet(
        "xquad", "hit@1", 1, documents, {uri: cut(d) for uri, d in documents.items()}, questions, whole_share
    )


def _code_search(folder: Path, cut: Callable[[Document], list[Chunk]]) -> QuestionSet:
    """Return the set as given: its documents come in chunks, one behind the other."""
    del cut
    documents, chunks, places = {}, {}, {}
    for row in json.loads((folder / "ctx_codebase_chunks.json").read_text(encoding="utf-8")):
        uri, parts = row["original_uuid"], [part["content"] for part in row["chunks"]]
        document = Document.from_text("".join(parts), uri=uri)
        start, cuts = 0, []
        for index, (part, given) in enumerate(zip(parts, row["chunks"], strict=True)):
            stop = start + len(part)
            cuts.append(
                Chunk(
                    chunk_id_of(document.doc_id, start, stop), document.doc_id, index, part, start, stop, len(part) // 3
                )
            )
            places[uri, given["original_index"]] = (uri, start, stop)
            start = stop
        documents[uri], chunks[uri] = document, cuts
    questions = [
        Question(row["query"], tuple(places[uri, index] for uri, index in row["golden_chunk_uuids"]))
        for row in _json_lines(folder / "ctx_evaluation_set.jsonl")
    ]
    return QuestionSet("code_search", "pass@5", 5, documents, chunks, questions, whole_share)


def _json_lines(path: Path) -> list[dict]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.strip()]
