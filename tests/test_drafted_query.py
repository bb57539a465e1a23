"""Questions whose answers are drafted: the same answers, said how they came about."""

import json
import sys
from pathlib import Path

import pytest

from ragkit import Pipeline
from ragkit.answers.json_form import answer_json
from ragkit.config import DraftConfig, DraftMode
from ragkit.drafting import NO_PAGES
from ragkit.errors import ConfigError, ModelError, UsageError
from ragkit.generation.engine import Engine

sys.path.insert(0, str(Path(__file__).parent / "support"))
from blended_pipeline import QUESTIONS, open_blended, write_documents
from tiny_generator import write_generator


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_generator(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory, model) -> Pipeline:
    folder = tmp_path_factory.mktemp("drafted")
    engine = Engine.load(model, device="cpu", dtype="float32")
    with open_blended(folder / "store", engine) as pipeline:
        pipeline.ingest([write_documents(folder / "docs")])
        yield pipeline


@pytest.mark.parametrize("strategy", ["full", "blend"])
@pytest.mark.parametrize("draft", ["auto", "lookup", "self"])
def test_drafted_answers_are_those_without_drafts(pipeline, draft, strategy):
    for question in QUESTIONS:
        plain = pipeline.query(question, strategy=strategy)
        answer = pipeline.query(question, strategy=strategy, draft=draft)
        assert answer.text == plain.text
        assert plain.draft.mode == "none"
        assert answer.draft.mode == "exact"
        assert answer.draft.drafter == ("lookup" if draft == "auto" else draft)
        assert answer.draft.steps + answer.draft.accepted == answer.tokens.generated - 1


@pytest.mark.parametrize("strategy", ["full", "blend"])
@pytest.mark.parametrize("draft", ["auto", "self"])
def test_answers_of_a_drafted_batch_are_those_without_drafts(pipeline, draft, strategy):
    plain = [pipeline.query(question, strategy=strategy) for question in QUESTIONS]
    together = [one.answer for one in pipeline.query_many(QUESTIONS, strategy=strategy, draft=draft)]
    assert [one.text for one in together] == [one.text for one in plain]
    assert {(one.draft.mode, one.draft.drafter) for one in together} == {
        ("exact", "lookup" if draft == "auto" else draft)
    }
    for one in together:
        assert one.draft.steps + one.draft.accepted == one.tokens.generated - 1


def test_a_model_by_its_name_drafts(pipeline, model):
    plain = pipeline.query(QUESTIONS[0], strategy="full")
    answer = pipeline.query(QUESTIONS[0], strategy="full", draft=str(model))
    assert answer.text == plain.text
    assert answer.draft.drafter == str(model)
    assert answer.draft.accepted > 0


def test_the_json_of_a_drafted_answer_says_what_was_drafted(pipeline, model):
    drafted = answer_json(pipeline.query(QUESTIONS[0], strategy="full", draft=str(model)))["draft"]
    assert drafted["mode"] == "exact"
    assert 0 < drafted["accepted"] <= drafted["drafted"]
    assert drafted["ms_per_step"] > 0
    plain = answer_json(pipeline.query(QUESTIONS[0], strategy="full"))["draft"]
    assert (plain["mode"], plain["drafted"], plain["accepted"]) == ("none", 0, 0)
    assert json.dumps(drafted)


def test_transfer_is_said_in_the_answer(pipeline, model):
    answer = pipeline.query(QUESTIONS[0], strategy="full", draft=str(model), draft_mode="transfer")
    assert answer.draft.mode == DraftMode.TRANSFER


def test_attention_may_be_dropped_and_chunks_dealt_out(pipeline):
    from dataclasses import replace

    plain = pipeline.query(QUESTIONS[1], strategy="full")
    config = pipeline.parts.config
    pipeline.parts.config = replace(config, draft=DraftConfig(drafter="self", dropped_layers=1, prompts=2, depth=8))
    try:
        answer = pipeline.query(QUESTIONS[1], strategy="full")
    finally:
        pipeline.parts.config = config
    assert answer.text == plain.text
    assert answer.draft.drafter == "self"


def test_answers_from_pages_say_that_they_are_not_drafted(pipeline):
    (document,) = [row.uri for row in pipeline.documents()][:1]
    answer = pipeline.query(QUESTIONS[0], strategy="pages", document=document, draft="lookup")
    assert NO_PAGES in answer.warnings
    assert answer.draft.mode == "none"


def test_a_model_that_is_not_there_is_named(pipeline):
    with pytest.raises(ModelError, match="no-such-model"):
        pipeline.query(QUESTIONS[0], strategy="full", draft="no-such-model")


def test_unknown_modes_are_refused(pipeline):
    with pytest.raises(UsageError, match="no draft mode 'fast'; take one of exact, transfer"):
        pipeline.query(QUESTIONS[0], draft="lookup", draft_mode="fast")


@pytest.mark.parametrize("draft", [None, "none"])
def test_a_mode_without_a_drafter_is_refused(pipeline, draft):
    with pytest.raises(UsageError, match="transfer says what drafts may do: name a drafter"):
        pipeline.query(QUESTIONS[0], draft=draft, draft_mode="transfer")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"drafter": " "}, "draft.drafter must be"),
        ({"drafter": "lookup", "mode": DraftMode.TRANSFER}, "lookup has none"),
        ({"strength": -1.0}, "draft.strength"),
        ({"depth": 0}, "draft.depth"),
        ({"depth": 16, "prompts": 2}, "at most 31"),
        ({"context_tokens": 0}, "draft.context_tokens"),
        ({"dropped_layers": -1}, "draft.dropped_layers"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        DraftConfig(**settings)
