"""The user's own questions: answers are found or given as spans, and every mistake names its line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ragkit.bench.own_questions import own_question_set
from ragkit.bench.question_sets import Metric
from ragkit.errors import UsageError
from ragkit.types import Document

FROGS = Document.from_text("Frogs live in ponds. Frogs eat flies. 🐸 hop.", uri="/docs/frogs.md")
STARS = Document.from_text("Stars shine.", uri="/docs/stars.md")


def write(tmp_path: Path, *rows: object) -> Path:
    path = tmp_path / "qa.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def test_answers_are_found_and_spans_are_taken(tmp_path):
    path = write(
        tmp_path,
        {"question": "Where?", "answer": "in ponds", "document": "frogs.md"},
        "",
        {"question": "What?", "answer": ["eat flies", "hop."], "document": "/docs/frogs.md"},
        {"question": "When?", "spans": [[0, 5], [6, 11]], "document": "stars.md"},
    )
    found = own_question_set([FROGS, STARS], path, 500)
    assert [question.gold for question in found.questions] == [
        (("/docs/frogs.md", 11, 19),),
        (("/docs/frogs.md", 27, 36), ("/docs/frogs.md", 40, 44)),
        (("/docs/stars.md", 0, 5), ("/docs/stars.md", 6, 11)),
    ]
    assert (found.name, found.metric, found.characters) == ("qa", Metric.HIT, 500)


def test_one_document_needs_no_name(tmp_path):
    found = own_question_set([STARS], write(tmp_path, {"question": "When?", "answer": "shine"}))
    assert found.questions[0].gold == (("/docs/stars.md", 6, 11),)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{not json", "line 2: this is not JSON"),
        ("[1]", "line 2: there is no question"),
        ({"question": " "}, "line 2: there is no question"),
        ({"question": "q", "document": "frogs.md"}, "line 2: there is neither an answer nor spans"),
        ({"question": "q", "answer": ["", "a"], "document": "frogs.md"}, "neither an answer nor spans"),
        ({"question": "q", "answer": "a"}, 'there are 2 documents; name one as "document"'),
        ({"question": "q", "answer": "a", "document": "md"}, "'md' is the name of 0 documents"),
        ({"question": "q", "answer": "wolves", "document": "frogs.md"}, "'wolves' does not occur in /docs/frogs.md"),
        ({"question": "q", "answer": "Frogs", "document": "frogs.md"}, "'Frogs' occurs 2 times in /docs/frogs.md"),
        (
            {"question": "q", "spans": [[0, 99]], "document": "frogs.md"},
            "pairs .* within 0 to 44, got \\[\\[0, 99\\]\\]",
        ),
        ({"question": "q", "spans": [[3, 3]], "document": "frogs.md"}, "pairs .* within 0 to 44"),
        ({"question": "q", "spans": [[True, 3]], "document": "frogs.md"}, "pairs .* within 0 to 44"),
        ({"question": "q", "spans": "0-3", "document": "frogs.md"}, "pairs .* within 0 to 44"),
    ],
)
def test_a_wrong_row_is_named_by_its_line(tmp_path, row, message):
    good = {"question": "Where?", "answer": "in ponds", "document": "frogs.md"}
    with pytest.raises(UsageError, match=message):
        own_question_set([FROGS, STARS], write(tmp_path, good, row))


def test_a_file_without_questions_is_refused(tmp_path):
    with pytest.raises(UsageError, match="holds no question; write one a line as"):
        own_question_set([FROGS], write(tmp_path, ""))
    with pytest.raises(UsageError, match="No such file or directory"):
        own_question_set([FROGS], tmp_path / "gone.jsonl")
