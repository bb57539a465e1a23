"""Distances of blended prefill from full prefill, over a tiny model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ragkit.bench.answer_distance import ANSWER_TOKENS, AnswerScorer
from ragkit.bench.blend_quality import NO_PROPAGATION, PLAIN_REUSE, BlendQuality, Variant
from ragkit.config import BlendRows
from ragkit.errors import GenerationError
from ragkit.generation.full_prefill import FullPrefill
from ragkit.generation.sampling import SamplingConfig
from ragkit.kvcache.coverage import Coverage
from ragkit.kvcache.kv_key import ContextKind
from ragkit.kvcache.pool import KVPool
from ragkit.kvcache.selectors_question import QuestionAttention
from ragkit.kvcache.selectors_static import Everything, NoTokens

EVERYTHING = Variant("everything", Everything(), 1.0, NO_PROPAGATION)
QUARTER = Variant("question", QuestionAttention(), 0.25)


@pytest.fixture(scope="module")
def scorer(engine) -> AnswerScorer:
    return AnswerScorer(engine.decoder, engine.rotary, engine.pool)


def quality(engine, scorer, codec="bf16", context=ContextKind.PREFIX) -> BlendQuality:
    return BlendQuality(scorer, engine.prompt_builder().prefix.token_ids, codec, context)


def test_recomputing_everything_is_no_distance_and_plain_reuse_is_some(engine, scorer, prompt_of):
    found = quality(engine, scorer).score(prompt_of(0), [PLAIN_REUSE, EVERYTHING, QUARTER])
    assert list(found) == ["reuse @ 0", "everything @ 1", "question @ 0.25"]
    assert found["everything @ 1"].kl_mean == pytest.approx(0, abs=1e-6)
    assert found["everything @ 1"].largest_logit_difference < 1e-3
    assert found["reuse @ 0"].kl_mean > 1e-3
    assert found["question @ 0.25"].kl_mean > 1e-3


def test_the_share_recomputed_is_that_of_the_chunks_tokens(engine, scorer, prompt_of):
    found = quality(engine, scorer).score(prompt_of(0), [PLAIN_REUSE, EVERYTHING, QUARTER])
    shares = [one.recomputed for one in found.values()]
    assert shares == pytest.approx([0, 1, 0.25], abs=0.01)


def test_a_ratio_that_the_prompt_finds_is_named_by_what_it_covers(engine, scorer, prompt_of):
    auto = [Variant("question", QuestionAttention(), Coverage(share, 0.05, 0.5)) for share in (0.5, 1.0)]
    found = quality(engine, scorer).score(prompt_of(0), auto)
    assert list(found) == ["question auto 0.5", "question auto 1"]
    assert 0.05 <= found["question auto 0.5"].recomputed < found["question auto 1"].recomputed
    assert found["question auto 1"].recomputed == pytest.approx(0.5, abs=0.01)


def test_plain_reuse_is_measured_the_same_way_whatever_the_codec_and_context(engine, scorer, prompt_of):
    plain = quality(engine, scorer).score(prompt_of(0), [PLAIN_REUSE, QUARTER])
    other = quality(engine, scorer, "int4", ContextKind.ISOLATED).score(prompt_of(0), [PLAIN_REUSE, QUARTER])
    assert plain["reuse @ 0"] == other["reuse @ 0"]
    assert plain["question @ 0.25"] != other["question @ 0.25"]


def test_each_variant_may_have_a_context_of_its_own(engine, scorer, prompt_of):
    prompt = prompt_of(0)
    chunks = [one for one in prompt.segments if one.chunk_id is not None]
    before = {one.chunk_id: chunks[:index] for index, one in enumerate(chunks)}
    made = BlendQuality(
        scorer, engine.prompt_builder().prefix.token_ids, "bf16", ContextKind.PREFIX, before.__getitem__
    )
    variants = [Variant(kind.value, NoTokens(), 0.0, NO_PROPAGATION, kind) for kind in ContextKind]
    found = made.score(prompt, [PLAIN_REUSE, *variants])
    assert found["prefix @ 0"] == found["reuse @ 0"]
    assert found["isolated @ 0"].kl_first > 1e-6
    # Behind all that stands before it in the prompt a chunk's KV is that of full prefill, through bf16.
    assert found["neighbours @ 0"].kl_first < found["reuse @ 0"].kl_first / 100


def test_shared_rows_are_measured_beside_private_ones_and_a_fallback_is_not_taken_for_them(engine, scorer, prompt_of):
    roomy = AnswerScorer(engine.decoder, engine.rotary, KVPool(engine.decoder.layout, 96, engine.decoder.device))
    variants = [EVERYTHING, replace(EVERYTHING, name="shared", rows=BlendRows.SHARED)]
    still = [replace(QUARTER, name=rows.value, rows=rows, propagation=NO_PROPAGATION) for rows in BlendRows]
    found = quality(engine, roomy).score(prompt_of(0), [PLAIN_REUSE, *variants, *still])
    assert found["shared @ 1"].largest_logit_difference < 1e-3
    assert found["shared @ 0.25"].kl_mean == pytest.approx(found["private @ 0.25"].kl_mean, rel=1e-3)
    small = AnswerScorer(engine.decoder, engine.rotary, KVPool(engine.decoder.layout, 14, engine.decoder.device))
    with pytest.raises(GenerationError, match="not what was to be measured: rows are private"):
        quality(engine, small).score(prompt_of(0), variants)


def test_full_prefill_follows_its_own_greedy_answer(engine, scorer, prompt_of):
    outcome = scorer.outcome(FullPrefill(), prompt_of(0))
    assert outcome.along.shape == (ANSWER_TOKENS, engine.decoder.config.vocab_size)
    assert outcome.along.argmax(-1).tolist() == list(outcome.answer)
    assert outcome.nll is None


def test_an_answer_that_is_followed_at_once_is_the_one_that_was_decoded(engine, scorer, prompt_of):
    prompt = prompt_of(0)
    found = scorer.outcome(FullPrefill(), prompt)
    sampling = SamplingConfig(ANSWER_TOKENS, ignore_stop_tokens=True)
    *_, finished = engine.generate(prompt, sampling)
    assert finished.token_ids == found.answer
    followed = scorer.outcome(FullPrefill(), prompt, answer=found.answer)
    assert torch.allclose(followed.along, found.along, atol=1e-4)


def test_the_gold_answers_likelihood_is_its_mean_nats(engine, scorer, prompt_of):
    gold = engine.tokenizer.encode("the river")
    outcome = scorer.outcome(FullPrefill(), prompt_of(0), gold, gold)
    expected = -sum(float(row.log_softmax(-1)[token]) for row, token in zip(outcome.along, gold, strict=True))
    assert outcome.nll == pytest.approx(expected / len(gold), rel=1e-5)


def test_blocks_are_free_again(engine, scorer, prompt_of):
    before = engine.pool.num_free
    scorer.outcome(FullPrefill(), prompt_of(0))
    assert engine.pool.num_free == before
