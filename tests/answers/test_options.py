"""The options of a question are named once, and every call of the SDK takes them."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import get_type_hints

import pytest

from ragkit import Pipeline
from ragkit.answers.options import QuestionChanges, QuestionOptions


def test_what_may_be_said_is_what_can_be_changed():
    assert get_type_hints(QuestionOptions) == get_type_hints(QuestionChanges)
    assert [one.name for one in fields(QuestionChanges)] == list(QuestionOptions.__annotations__)
    assert QuestionChanges.of({}) == QuestionChanges()
    assert QuestionChanges.of({"k": 3, "draft": "lookup"}) == replace(QuestionChanges(), k=3, draft="lookup")


def ask(pipeline: Pipeline, call: str, **options: object) -> None:
    outcome = getattr(pipeline, call)("Where?", **options)
    if call == "aquery":
        outcome.send(None)
    elif call == "query_many":
        next(outcome)


@pytest.mark.parametrize("call", ["query", "stream", "aquery", "astream", "query_many"])
def test_a_keyword_that_is_no_option_is_refused_as_python_does(tmp_path: Path, call: str):
    with (
        Pipeline.open(tmp_path / "store") as pipeline,
        pytest.raises(TypeError, match="'tempereture'; its options are"),
    ):
        ask(pipeline, call, tempereture=1.0)
