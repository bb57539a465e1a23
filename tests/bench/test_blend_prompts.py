"""The prompts that blending is measured with."""

from __future__ import annotations

import pytest
from blended_pipeline import text_of
from doubles import HashEmbedder
from filled_store import fill

from ragkit.bench.blend_prompts import (
    Question,
    collection_prompt,
    musique_prompts,
    questions_from,
    random_prompt,
    retrieved_prompts,
)
from ragkit.bench.musique import MusiqueItem
from ragkit.errors import UsageError
from ragkit.store import Store

SENTENCE = "The otters of the upper river build their dams from willow branches every spring."


@pytest.fixture
def store(tmp_path):
    with Store.open_or_create(tmp_path / "store") as store:
        texts = {f"{seed}.txt": [text_of(seed, 2), f"{SENTENCE} Number {seed}.\n"] for seed in range(40)}
        fill(store, HashEmbedder(), texts)
        yield store


def chunk_ids(prompt) -> list[str]:
    return [one.chunk_id for one in prompt.segments if one.chunk_id is not None]


def test_a_random_prompt_has_the_length_that_was_asked_for(engine):
    prompt = random_prompt(engine.prompt_builder(), 259, 700, 64)
    assert len(prompt) == 700
    assert {len(one.token_ids) for one in prompt.segments[1:-2]} == {64}


def test_a_longer_random_prompt_begins_with_the_chunks_of_a_shorter_one(engine):
    short, long = (random_prompt(engine.prompt_builder(), 259, tokens, 64) for tokens in (700, 1400))
    assert short.segments[:-2] == long.segments[: len(short.segments) - 2]


def test_a_random_prompt_shorter_than_its_frame_is_wrong_usage(engine):
    with pytest.raises(UsageError, match="a prompt of 20 tokens has no room for chunks"):
        random_prompt(engine.prompt_builder(), 259, 20, 64)


def test_a_prompt_of_the_collection_is_as_long_as_its_chunks_allow(engine, store):
    prompt = collection_prompt(engine.prompt_builder(), store, 800)
    assert 800 - 150 < len(prompt) <= 800
    assert len(set(chunk_ids(prompt))) == len(chunk_ids(prompt)) >= 2


def test_a_small_collection_gives_no_prompt(engine, store):
    assert collection_prompt(engine.prompt_builder(), store, 4000) is None


def test_questions_are_halves_of_sentences_with_the_rest_as_answer(store):
    questions = questions_from(store, 4)
    assert len(questions) == 4
    assert questions[0].text == ('How does the sentence go on that begins with "The otters of the upper river build"?')
    assert questions[0].answer == "their dams from willow branches every spring."


def test_short_sentences_make_no_questions(tmp_path):
    with Store.open_or_create(tmp_path / "short") as store:
        fill(store, HashEmbedder(), {"a.txt": ["Otters swim. ", "Millers grind."]})
        assert questions_from(store, 4) == []


def test_retrieved_chunks_make_the_prompt_and_one_alone_makes_none(engine, store):
    chunks = [one.chunk for one in store.chunks(store.row_ids())]
    found = {"many": chunks[:3], "one": chunks[:1]}
    questions = [Question("many", "the river"), Question("one")]
    [one] = retrieved_prompts(questions, found.get, engine.prompt_builder(), engine.tokenizer, 64)
    assert sorted(chunk_ids(one.prompt)) == sorted(chunk.chunk_id for chunk in chunks[:3])
    assert one.gold == tuple(engine.tokenizer.encode("the river"))


def test_items_that_do_not_fit_the_window_whole_are_left_out(engine):
    items = [
        MusiqueItem(0, "Where?", ("There",), ("otters " * 20, "millers " * 20)),
        MusiqueItem(1, "Where?", ("There",), ("otters " * 2000, "millers")),
    ]
    [one] = musique_prompts(items, engine.prompt_builder(), engine.tokenizer, 64)
    assert len(chunk_ids(one.prompt)) == 2
