"""The user's own question set: documents, and a JSONL file of questions with the text or the spans that answer them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ragkit.bench.question_sets import XQUAD_CHARACTERS, Metric, Question, QuestionSet
from ragkit.bench.spans import Span
from ragkit.errors import UsageError
from ragkit.types import Document

_FORM = (
    '{"question": "...", "answer": "exact text"} or {"question": "...", "spans": [[first, stop]]}, '
    'with "document": "name" where there are several'
)


def own_question_set(documents: Sequence[Document], questions: Path, characters: int = XQUAD_CHARACTERS) -> QuestionSet:
    """Return the set of `documents` with the rows of the JSONL file `questions`.

    A row holds `question`, and `answer` (exact text, or a list of such texts) or `spans` (half-open, in characters of
    the document's text, as `ragkit chunk --json` shows them). `document` is the URI of the document or its last part.

    Raises:
        UsageError: a row is not of this form, names no document, or its answer is not to be found; names the line.
    """
    if not documents:
        raise UsageError("there is no document to ask about")
    by_uri = {document.uri: document for document in documents}
    found = [_question(row, by_uri, f"{questions}, line {number}") for number, row in _rows(questions)]
    if not found:
        raise UsageError(f"{questions} holds no question; write one a line as {_FORM}")
    return QuestionSet(questions.stem, by_uri, found, Metric.HIT, characters)


def _rows(path: Path) -> list[tuple[int, dict[str, Any]]]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise UsageError(f"cannot read {str(path)!r}: {error.strerror}; give the file of questions") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} cannot be read as UTF-8 text: {error}") from error
    rows = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UsageError(f"{path}, line {number}: this is not JSON ({error}); write {_FORM}") from error
            if not isinstance(row, dict) or not isinstance(row.get("question"), str) or not row["question"].strip():
                raise UsageError(f"{path}, line {number}: there is no question; write {_FORM}")
            rows.append((number, row))
    return rows


def _question(row: Mapping[str, Any], documents: Mapping[str, Document], place: str) -> Question:
    document = _document(row.get("document"), documents, place)
    if "spans" in row:
        gold = _given_spans(row["spans"], document, place)
    else:
        gold = [_found(text, document, place) for text in _answers(row.get("answer"), place)]
    return Question(row["question"], tuple(gold))


def _answers(answer: object, place: str) -> list[str]:
    answers = answer if isinstance(answer, list) else [answer]
    texts = [text for text in answers if isinstance(text, str) and text]
    if not texts or len(texts) != len(answers):
        raise UsageError(f"{place}: there is neither an answer nor spans; write {_FORM}")
    return texts


def _document(name: object, documents: Mapping[str, Document], place: str) -> Document:
    if name is None and len(documents) == 1:
        return next(iter(documents.values()))
    if not isinstance(name, str) or not name:
        raise UsageError(f'{place}: there are {len(documents)} documents; name one as "document": "..."')
    matches = [document for uri, document in documents.items() if uri == name or uri.endswith(f"/{name}")]
    if len(matches) != 1:
        raise UsageError(f"{place}: {name!r} is the name of {len(matches)} documents; it must be that of one")
    return matches[0]


def _given_spans(spans: object, document: Document, place: str) -> list[Span]:
    size = len(document.text)
    pairs = spans if isinstance(spans, list) else []
    found = [
        (document.uri, pair[0], pair[1])
        for pair in pairs
        if isinstance(pair, list) and len(pair) == 2 and all(type(value) is int for value in pair)
        if 0 <= pair[0] < pair[1] <= size
    ]
    if not found or len(found) != len(pairs):
        raise UsageError(f"{place}: spans must be pairs [first, stop] within 0 to {size}, got {spans!r}")
    return found


def _found(text: str, document: Document, place: str) -> Span:
    count = document.text.count(text)
    if count != 1:
        shown = text if len(text) <= 60 else f"{text[:59]}…"
        what = "does not occur" if count == 0 else f"occurs {count} times"
        raise UsageError(f'{place}: the answer {shown!r} {what} in {document.uri}; give "spans": [[first, stop]]')
    start = document.text.index(text)
    return document.uri, start, start + len(text)
