"""Questions whose answers are drafted: the same answers, said how they came about."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from ragkit import Pipeline, drafting
from ragkit.answers.json_form import answer_json
from ragkit.config import DraftConfig, DraftMode, DraftWeights
from ragkit.drafting import NO_PAGES
from ragkit.errors import ConfigError, ModelError, UsageError
from ragkit.generation import draft_control
from ragkit.generation.draft_control import DraftLimits
from ragkit.generation.draft_costs import MeasuredCosts
from ragkit.generation.drafter import DraftPrice
from ragkit.generation.drafter_lookup import LookupDrafter
from ragkit.generation.engine import Engine
from ragkit.types import Prompt, Segment

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


@pytest.fixture
def whatever_it_costs(monkeypatch):
    """Draft four tokens always: no model is small beside the tiny one, so that none would pay."""
    monkeypatch.setattr(draft_control, "DraftLimits", lambda depth: DraftLimits(depth, length=4))


def test_a_model_by_its_name_drafts(pipeline, model, whatever_it_costs):
    plain = pipeline.query(QUESTIONS[0], strategy="full")
    answer = pipeline.query(QUESTIONS[0], strategy="full", draft=str(model))
    assert answer.text == plain.text
    assert answer.draft.drafter == str(model)
    assert answer.draft.accepted > 0


def test_a_drafter_that_cannot_pay_leaves_the_answer_undrafted(pipeline, model):
    answer = pipeline.query(QUESTIONS[0], strategy="full", draft=str(model))
    assert answer.draft.drafter == str(model)
    assert (answer.draft.drafted, answer.draft.accepted) == (0, 0)
    assert answer.draft.steps == answer.tokens.generated - 1


@pytest.fixture
def configured(pipeline):
    """Return a function that changes settings of drafting for the rest of a test."""
    config = pipeline.parts.config

    def change(**settings):
        pipeline.parts.config = replace(config, draft=DraftConfig(**settings))

    yield change
    pipeline.parts.config = config


def test_self_drafts_with_a_copy_of_4_bits_where_that_is_configured(pipeline, configured, whatever_it_costs):
    plain = pipeline.query(QUESTIONS[0], strategy="blend")
    configured(drafter="self", weights=DraftWeights.INT4)
    answer = pipeline.query(QUESTIONS[0], strategy="blend")
    assert answer.text == plain.text
    assert answer.draft.drafted > 0
    engine, (drafter,) = pipeline.parts.engine, [
        part for name, part in pipeline.parts._loaded.items() if name.startswith("drafter self") and "int4" in name
    ]  # fmt: skip
    assert drafter._model.decoder is pipeline.parts.int4_decoder is not engine.decoder
    assert drafter._model.reader is engine.decoder  # prompts are read by the true weights


def test_naming_no_drafter_turns_off_what_is_configured(pipeline, configured):
    configured(drafter="self", mode=DraftMode.TRANSFER)
    assert pipeline.query(QUESTIONS[0], strategy="full", draft="none").draft.mode == "none"


@pytest.mark.parametrize(
    ("share", "acceptance", "looked_up", "temperature", "chosen"),
    [
        (0.3, 0.9, 1.1, 0.0, "self"),
        (0.3, 0.9, 1.1, 1.0, "lookup"),  # the tokens of a seed stay
        (0.3, 0.9, 3.0, 0.0, "lookup"),
        (0.3, 0.2, 1.1, 0.0, "lookup"),
        (0.9, 0.9, 1.0, 0.0, "lookup"),
    ],
)
def test_auto_takes_self_where_it_should_bring_more_than_lookup_has_brought(
    pipeline, share, acceptance, looked_up, temperature, chosen, monkeypatch
):
    costs = MeasuredCosts("cuda")
    for at in range(2000):
        costs.record("lookup").note(0, 0, 1 / looked_up)
        costs.record("self").note(1, int(at % 10 < 10 * acceptance), 1.0)
    monkeypatch.setattr(pipeline.parts.engine, "draft_costs", costs)
    monkeypatch.setattr(drafting, "_self_price", lambda *_, **__: DraftPrice(step_share=share, begin_tokens=100))
    asked = []
    monkeypatch.setattr(
        type(pipeline.parts), "drafter", lambda self, config, **_: asked.append(config.drafter) or LookupDrafter()
    )
    pipeline.query(QUESTIONS[0], strategy="full", draft="auto", temperature=temperature)
    assert asked == [chosen]


def test_transfer_without_strength_is_exact_and_said_to_be_so(pipeline, configured):
    plain = pipeline.query(QUESTIONS[0], strategy="full")
    configured(drafter="self", mode=DraftMode.TRANSFER, strength=0.0)
    answer = pipeline.query(QUESTIONS[0], strategy="full")
    assert (answer.text, answer.draft.mode) == (plain.text, "exact")


def test_a_drafter_that_is_neither_known_nor_a_model_is_refused_with_all_that_are(pipeline):
    with pytest.raises(
        ModelError, match=r"draft with 'lookpu' \(a drafter is none, auto, self, lookup or a model\): there"
    ):
        pipeline.query(QUESTIONS[0], strategy="full", draft="lookpu")


@pytest.mark.parametrize("prompts", [1, 2])
def test_self_is_priced_with_all_its_prompts_before_it_is_made(pipeline, prompts):
    prompt = Prompt((Segment((1, 2)), *(Segment(tuple(range(9)), str(at)) for at in range(4)), Segment((3,))))
    config = DraftConfig(drafter="self", prompts=prompts, context_tokens=18)
    price = drafting._self_price(pipeline.parts, config, prompt, blended=False)
    assert price.begin_tokens == prompts * 21


def test_a_blended_prompt_is_cheap_to_begin_with_before_self_is_made(pipeline):
    prompt = Prompt((Segment((1, 2)), Segment(tuple(range(17)), "0"), Segment((3,))))
    parts, config = pipeline.parts, DraftConfig(drafter="self", context_tokens=100, depth=7)
    dropping = replace(config, dropped_layers=1, context_tokens=101)
    assert drafting._self_price(parts, replace(config, context_tokens=99), prompt, blended=True).begin_tokens == 5
    assert drafting._self_price(parts, dropping, prompt, blended=True).begin_tokens == 20


def test_the_json_of_a_drafted_answer_says_what_was_drafted(pipeline, model, whatever_it_costs):
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
    plain = pipeline.query(QUESTIONS[1], strategy="full")
    config = pipeline.parts.config
    pipeline.parts.config = replace(config, draft=DraftConfig(drafter="self", dropped_layers=1, prompts=2))
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
        ({"depth": 32}, "draft.depth must be at most 31"),
        ({"prompts": 32}, "draft.prompts must be at most 31"),
        ({"mode": DraftMode.TRANSFER}, "draft.mode transfer says what drafts may do, and draft.drafter is none"),
        ({"context_tokens": 0}, "draft.context_tokens"),
        ({"dropped_layers": -1}, "draft.dropped_layers"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        DraftConfig(**settings)
