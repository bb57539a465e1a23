"""The public sets are read as they were published; what is missing or broken is named."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from question_folder import write_question_folder

from ragkit.bench.question_sets import Metric, Question, chroma_characters, code_search_pieces, load_question_set
from ragkit.errors import UsageError
from ragkit.types import Document


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_question_folder(tmp_path)
    return tmp_path


def test_xquad_has_one_span_a_question_and_800_characters(data):
    found = load_question_set("xquad", data)
    assert found.questions[0] == Question("Where do frogs live?", (("Frogs", 15, 23),))
    assert found.documents["Frogs"].text[15:23] == "in ponds"
    assert (found.metric, found.characters) == (Metric.HIT, 800)


def test_chunking_evaluation_has_several_spans_and_the_characters_of_five_chunks(data):
    found = load_question_set("chunking_evaluation", data)
    assert found.questions[0].gold == (("animals", 0, 20), ("animals", 30, 40))
    assert found.metric is Metric.RECALL
    long = replace(found, documents={"a": Document.from_text("x" * 328_208)})
    assert chroma_characters(long, 168) == 5 * 168
    assert found.characters == 1


def test_code_search_is_joined_from_its_chunks(data):
    found = load_question_set("code_search", data)
    assert found.documents["repo"].text == "def frog():\n    hop()\ndef toad():\n    crawl()\n"
    start = len("def frog():\n    hop()\n")
    assert found.questions[0].gold == (("repo", start, len(found.documents["repo"].text)),)
    assert found.characters == 5 * len("def toad():\n    crawl()\n")
    assert [number for number, _ in code_search_pieces(data / "code_search")["repo"]] == [0, 1]


def test_the_first_questions_keep_the_documents_that_they_ask_about(data):
    found = load_question_set("xquad", data)
    assert set(found.documents) == {"Frogs", "Stars"}
    assert set(found.first(1).documents) == {"Frogs"}
    assert len(found.first(1).questions) == 1


def test_a_missing_set_and_a_missing_folder_are_named(data, tmp_path):
    with pytest.raises(UsageError, match="no question set 'squad'; there are chunking_evaluation, xquad, code_search"):
        load_question_set("squad", data)
    with pytest.raises(UsageError, match="holds no folder xquad; give the folder that does with --data"):
        load_question_set("xquad", tmp_path / "code_search")


def test_a_set_in_another_form_is_refused(data):
    (data / "xquad" / "questions.jsonl").write_text(json.dumps({"question": "Where?"}) + "\n")
    with pytest.raises(UsageError, match="xquad does not hold the question set as published: KeyError: 'doc'"):
        load_question_set("xquad", data)
