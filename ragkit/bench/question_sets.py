"""Questions with the spans that answer them, and three public sets of them, read from a folder.

The folder (`RAGKIT_DATA`) holds `chunking_evaluation` (brandonstarxel/chunking_evaluation: `corpora/*.md`,
`questions_df.csv`), `xquad` (`docs.jsonl`, `questions.jsonl`) and `code_search` (`ctx_codebase_chunks.json`,
`ctx_evaluation_set.jsonl` of anthropics/anthropic-cookbook). Spans are half-open characters of a document.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np

from ragkit.bench.spans import Span
from ragkit.errors import UsageError
from ragkit.types import Document

XQUAD_CHARACTERS = 800
CHROMA_TOKENS = 328_208  # of the five corpora of chunking_evaluation, in its own tokens
_CHROMA_CHUNK, _CHROMA_CHUNKS = 168, 5  # tokens of a chunk of its cluster chunker, and chunks retrieved
_GOLD_CHUNKS = 5  # code_search: as many characters as so many mean gold chunks


class Metric(StrEnum):
    """What a question scores: the share of its spans that one retrieved piece holds whole, or of their characters."""

    HIT = "hit"
    RECALL = "recall"


@dataclass(frozen=True, slots=True)
class Question:
    """A question and the spans that answer it."""

    text: str
    gold: tuple[Span, ...]


@dataclass(frozen=True, slots=True)
class QuestionSet:
    """A collection with its questions; `characters` is the budget at which chunkers are compared on it."""

    name: str
    documents: Mapping[str, Document]
    questions: Sequence[Question]
    metric: Metric
    characters: int

    def first(self, count: int) -> QuestionSet:
        """Return the set with its first questions and the documents that they ask about: for a quick look."""
        questions = self.questions[:count]
        asked = {uri for question in questions for uri, _, _ in question.gold}
        documents = {uri: document for uri, document in self.documents.items() if uri in asked}
        return replace(self, documents=documents, questions=questions)


def load_question_set(name: str, data: Path) -> QuestionSet:
    """Return the public set `name` from the folder `data`.

    Raises:
        UsageError: there is no such set, the folder does not hold it, or its files are not what they should be.
    """
    loader = PUBLIC_SETS.get(name)
    if loader is None:
        raise UsageError(f"there is no question set {name!r}; there are {', '.join(PUBLIC_SETS)}")
    folder = data / name
    if not folder.is_dir():
        raise UsageError(f"{data} holds no folder {name}; give the folder that does with --data or RAGKIT_DATA")
    try:
        return loader(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{folder} does not hold the question set as published: {type(error).__name__}: {error}"
        ) from error


def chroma_characters(data: QuestionSet, tokens: float) -> int:
    """Return the characters of five chunks of `tokens` tokens of chunking_evaluation, counted as Chroma counts them."""
    total = sum(len(document.text) for document in data.documents.values())
    return max(1, round(_CHROMA_CHUNKS * tokens * total / CHROMA_TOKENS))


def _chunking_evaluation(folder: Path) -> QuestionSet:
    paths = sorted((folder / "corpora").glob("*.md"))
    documents = {path.stem: Document.from_text(path.read_text(encoding="utf-8"), uri=path.stem) for path in paths}
    questions = []
    with (folder / "questions_df.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            spans = [(row["corpus_id"], ref["start_index"], ref["end_index"]) for ref in json.loads(row["references"])]
            questions.append(Question(row["question"], tuple(spans)))
    data = QuestionSet("chunking_evaluation", documents, questions, Metric.RECALL, 0)
    return replace(data, characters=chroma_characters(data, _CHROMA_CHUNK))


def _xquad(folder: Path) -> QuestionSet:
    rows = _json_lines(folder / "docs.jsonl")
    documents = {row["doc"]: Document.from_text(row["text"], uri=row["doc"]) for row in rows}
    questions = [
        Question(row["question"], ((row["doc"], row["start"], row["end"]),))
        for row in _json_lines(folder / "questions.jsonl")
    ]
    return QuestionSet("xquad", documents, questions, Metric.HIT, XQUAD_CHARACTERS)


def code_search_pieces(folder: Path) -> dict[str, list[tuple[int, str]]]:
    """Return the chunks that code_search comes in, by document: the number that questions give each, and its text."""
    rows = json.loads((folder / "ctx_codebase_chunks.json").read_text(encoding="utf-8"))
    return {row["original_uuid"]: [(part["original_index"], part["content"]) for part in row["chunks"]] for row in rows}


def _code_search(folder: Path) -> QuestionSet:
    documents: dict[str, Document] = {}
    places: dict[tuple[str, int], Span] = {}
    for uri, pieces in code_search_pieces(folder).items():
        documents[uri] = Document.from_text("".join(text for _, text in pieces), uri=uri)
        start = 0
        for number, text in pieces:
            places[uri, number] = (uri, start, start + len(text))
            start += len(text)
    questions = [
        Question(row["query"], tuple(places[uri, number] for uri, number in row["golden_chunk_uuids"]))
        for row in _json_lines(folder / "ctx_evaluation_set.jsonl")
    ]
    sizes = [stop - start for question in questions for _, start, stop in question.gold]
    characters = round(_GOLD_CHUNKS * float(np.mean(sizes)))
    return QuestionSet("code_search", documents, questions, Metric.RECALL, characters)


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        yield from (json.loads(line) for line in file if line.strip())


PUBLIC_SETS: Mapping[str, Callable[[Path], QuestionSet]] = {
    "chunking_evaluation": _chunking_evaluation,
    "xquad": _xquad,
    "code_search": _code_search,
}
