"""Full prefill and plain RAG as answerers, over a tiny generator."""

from __future__ import annotations

from dataclasses import replace

import pytest
from blended_pipeline import CONFIG, text_of
from doubles import HashEmbedder

from ragkit.bench.answer_full import FullAnswerer
from ragkit.bench.answer_pages import pages_answerers
from ragkit.bench.answer_rag import RagAnswerer
from ragkit.bench.long_answers import (
    AnswererTools,
    PagesVariants,
    chunk_of,
    frame_tokens,
    fresh_builder,
    generate_text,
    with_prefix,
)
from ragkit.bench.long_items import LongQuestion, Material
from ragkit.bench.long_strategies import ANSWERERS, make_answerers
from ragkit.bench.needle import NeedleTask
from ragkit.cli.eval_long import STRATEGIES
from ragkit.config import ChunkingConfig, CodecName, PagesConfig, PageSelectorName, RetrievalConfig, SearchMode
from ragkit.errors import GenerationError
from ragkit.generation.paged_prefill import PagedPrefill

NEW_TOKENS = 8
QUESTIONS = [LongQuestion(text, ("x",), begun, (), 0.0) for text, begun in (("Where?", "It is"), ("Who is it?", "She"))]


@pytest.fixture
def tools(engine) -> AnswererTools:
    config = replace(
        CONFIG, chunking=ChunkingConfig(max_tokens=300), retrieval=RetrievalConfig(k=3, mode=SearchMode.BM25)
    )
    return AnswererTools(engine, HashEmbedder(), config)


def test_a_document_that_is_read_once_gives_the_answers_of_whole_prompts(tools, engine):
    document = text_of(1, 8)
    answers = list(FullAnswerer(tools).answer(document, QUESTIONS, NEW_TOKENS))
    for question, answer in zip(QUESTIONS, answers, strict=True):
        built = engine.prompt_builder().build(question.text, [chunk_of(document)], max_new_tokens=NEW_TOKENS).prompt
        prompt = with_prefix(built, engine.tokenizer.encode(question.answer_prefix))
        assert answer.text == generate_text(engine, prompt, NEW_TOKENS)
        assert answer.prompt_tokens == len(prompt)
        assert answer.shown == ((0, len(document)),)


def test_the_document_is_computed_once_and_its_rows_are_given_back(tools, engine, monkeypatch):
    free, sizes, run = engine.pool.num_free, [], type(engine.decoder).run

    def counted(self, token_ids, attend):
        sizes.append(len(token_ids))
        return run(self, token_ids, attend)

    monkeypatch.setattr(type(engine.decoder), "run", counted)
    document = text_of(1, 8)
    list(FullAnswerer(tools).answer(document, QUESTIONS, NEW_TOKENS))
    assert sum(size > len(document) for size in sizes) == 1
    assert engine.pool.num_free == free


def test_a_document_beyond_the_window_is_refused_with_numbers(tools, engine):
    answerer = FullAnswerer(tools)
    assert answerer.most_tokens == engine.max_context == 4096
    with pytest.raises(GenerationError, match=r"^a document of 4,102 tokens, question and answer do not fit into the"):
        list(answerer.answer("x" * 4100, QUESTIONS, NEW_TOKENS))


def test_an_item_as_long_as_the_window_fits_also_where_the_document_cannot_be_held(tools, engine):
    material = Material(engine.tokenizer, frame_tokens=frame_tokens(tools))
    item = NeedleTask((0.5,)).make(material, engine.max_context, 0)
    [answer] = FullAnswerer(tools).answer(item.document, item.questions, item.max_new_tokens)
    assert 0.99 * 4096 <= answer.prompt_tokens + item.max_new_tokens <= 4096
    whole = engine.pool.blocks_for(answer.prompt_tokens + item.max_new_tokens)
    taken = engine.pool.allocate(engine.pool.num_free - whole)  # no block is left for the document's gap
    [again] = FullAnswerer(tools).answer(item.document, item.questions, item.max_new_tokens)
    engine.pool.release(taken)
    assert again.text == answer.text


def test_rag_shows_the_model_what_a_question_retrieves_and_any_length_goes(tools, engine):
    material = Material(engine.tokenizer, frame_tokens=frame_tokens(tools))
    item = NeedleTask((0.2, 0.8), together=True).make(material, 20_000, 0)
    answerer = RagAnswerer(tools)
    answers = list(answerer.answer(item.document, item.questions, NEW_TOKENS))
    assert answerer.most_tokens == 0
    for question, answer in zip(item.questions, answers, strict=True):
        [(start, stop)] = question.gold
        assert len(answer.shown) == 3
        assert any(first <= start and stop <= last for first, last in answer.shown)
        assert answer.prompt_tokens < 1000


def test_the_frame_is_what_a_prompt_takes_besides_document_and_question(tools, engine):
    builder = fresh_builder(tools)
    prompt = builder.build("Who?", [chunk_of("A text.")], max_new_tokens=1).prompt
    own = len(engine.tokenizer.encode("Who?")) + len(engine.tokenizer.encode("A text."))
    assert 0 <= frame_tokens(tools) - (len(prompt) - own) <= 2


def test_the_command_line_knows_the_strategies_that_there_are(tools):
    assert tuple(ANSWERERS) == STRATEGIES
    assert [answerer.name for answerer in make_answerers(STRATEGIES, tools)] == ["full", "rag", "pages low-rank"]


@pytest.fixture
def paged(tools) -> AnswererTools:
    pages = PagesConfig(page_tokens=16, sink_tokens=32, budget_tokens=64, local_tokens=64, window_tokens=128)
    mean = PageSelectorName.MEAN_KEY
    pages = replace(pages, codec=CodecName.BF16, selector=mean, reading_selector=mean)
    return replace(tools, config=replace(tools.config, pages=pages))


def test_selectors_and_budgets_are_compared_over_one_reading(paged, monkeypatch):
    variants = PagesVariants((PageSelectorName.MEAN_KEY, PageSelectorName.WINDOW), (32, 64))
    answerers = pages_answerers(replace(paged, pages=variants))
    assert [one.name for one in answerers] == [
        "pages mean-key 32", "pages mean-key 64", "pages window 32", "pages window 64",
    ]  # fmt: skip
    read, readings = PagedPrefill.read, []
    monkeypatch.setattr(PagedPrefill, "read", lambda self, *rest: readings.append(self.reading) or read(self, *rest))
    document = text_of(1, 30)
    answers = [list(one.answer(document, QUESTIONS, NEW_TOKENS)) for one in answerers]
    assert [(one.selector.selector_id, one.budget_pages) for one in readings] == [("mean-key", 4)]
    assert answers[3][0].document_seconds == pytest.approx(answers[2][0].document_seconds, rel=0.05)  # the one reading
    narrow, wide = (sum(stop - start for start, stop in some[0].shown) for some in (answers[2], answers[0]))
    assert 32 <= narrow <= 64  # the local window: the sinks lie in the prompt's prefix
    assert narrow + 16 <= wide < len(document)


def test_with_a_prefill_of_its_own_each_selector_reads(paged, monkeypatch):
    variants = PagesVariants((PageSelectorName.MEAN_KEY, PageSelectorName.WINDOW), own_prefill=True)
    answerers = pages_answerers(replace(paged, pages=variants))
    assert [one.name for one in answerers] == ["pages mean-key own prefill", "pages window own prefill"]
    read, readings = PagedPrefill.read, []
    monkeypatch.setattr(PagedPrefill, "read", lambda self, *rest: readings.append(self.reading) or read(self, *rest))
    for answerer in answerers:
        list(answerer.answer(text_of(1, 30), QUESTIONS[:1], NEW_TOKENS))
    assert [one.selector.selector_id for one in readings] == ["mean-key", "window"]


def test_with_every_page_answers_are_those_of_full_prefill(paged):
    document = text_of(1, 8)
    [answerer] = pages_answerers(replace(paged, pages=PagesVariants((PageSelectorName.EVERYTHING,))))
    every = PageSelectorName.EVERYTHING
    config = replace(paged.config.pages, codec=CodecName.FP32, selector=every, reading_selector=every)
    [exact] = pages_answerers(replace(paged, config=replace(paged.config, pages=config)))
    assert answerer.name == exact.name == "pages everything"
    found = [one.text for one in exact.answer(document, QUESTIONS, NEW_TOKENS)]
    assert found == [one.text for one in FullAnswerer(paged).answer(document, QUESTIONS, NEW_TOKENS)]
    [shown] = {one.shown for one in answerer.answer(document, QUESTIONS, NEW_TOKENS)}
    assert shown == ((0, len(document)),)
