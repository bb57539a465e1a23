import dataclasses

import pytest
import torch

from ragkit.errors import CacheCapacityError, ConfigError, GenerationError
from ragkit.generation.engine import Engine
from ragkit.generation.full_prefill import FullPrefill
from ragkit.generation.sampling import SamplingConfig
from ragkit.generation.steps import Finished, FinishReason, GeneratedToken
from ragkit.types import Prompt, Segment, TokenUsage

from .conftest import hf_model

PROMPT = Prompt((Segment((1, 40, 50)), Segment((60, 70, 80), "chunk"), Segment((90,))))


def _run(engine, sampling, prompt=PROMPT):
    steps = list(engine.generate(prompt, sampling))
    assert all(isinstance(step, GeneratedToken) for step in steps[:-1])
    assert isinstance(steps[-1], Finished)
    return steps


def test_greedy_tokens_are_those_of_transformers(engine):
    model = hf_model("llama")
    expected = model.generate(
        torch.tensor([PROMPT.token_ids]), max_new_tokens=40, do_sample=False, pad_token_id=0, eos_token_id=None
    )[0, len(PROMPT) :].tolist()
    finished = _run(engine, SamplingConfig(max_new_tokens=40, ignore_stop_tokens=True))[-1]
    assert list(finished.token_ids) == expected


def test_pieces_join_to_the_decoded_tokens(engine):
    steps = _run(engine, SamplingConfig(max_new_tokens=60, temperature=1.5, seed=4, ignore_stop_tokens=True))
    assert "".join(step.piece for step in steps) == engine.tokenizer.decode(steps[-1].token_ids)


def test_equal_seeds_give_equal_answers(engine):
    def tokens(seed):
        return _run(engine, SamplingConfig(max_new_tokens=20, temperature=1.0, seed=seed))[-1].token_ids

    assert tokens(5) == tokens(5)
    assert tokens(5) != tokens(6)


def test_a_stop_token_ends_the_answer_and_is_not_in_it(engine):
    free = _run(engine, SamplingConfig(max_new_tokens=10, ignore_stop_tokens=True))[-1].token_ids
    stop = free[4]
    finished = _run(engine, SamplingConfig(max_new_tokens=10, stop_token_ids=(stop,)))[-1]
    assert finished.reason is FinishReason.STOP_TOKEN
    assert finished.token_ids == free[: free.index(stop)]


def test_the_length_limit_ends_the_answer(engine):
    finished = _run(engine, SamplingConfig(max_new_tokens=7, ignore_stop_tokens=True))[-1]
    assert (finished.reason, len(finished.token_ids)) == (FinishReason.LENGTH, 7)


def test_usage_and_timings_are_reported(engine):
    finished = _run(engine, SamplingConfig(max_new_tokens=3, ignore_stop_tokens=True))[-1]
    assert finished.usage == TokenUsage(prompt=7, reused=0, recomputed=7, generated=3)
    timings = finished.timings_ms
    assert 0 < timings["prefill"] <= timings["first_token"] <= timings["total"]


def test_the_first_token_does_not_wait_for_what_only_later_ones_need(engine, monkeypatch):
    runner, begun = engine._runner, []
    monkeypatch.setattr(runner, "begin", lambda *state: begun.append(1) or type(runner).begin(runner, *state))
    steps = engine.generate(PROMPT, SamplingConfig(max_new_tokens=3, ignore_stop_tokens=True))
    seen = [len(begun) for _ in steps]
    assert seen == [0, 1, 1, 1]


def test_the_builder_of_a_system_prompt_is_made_once_while_it_is_in_use(engine):
    plain, other = engine.prompt_builder(), engine.prompt_builder("Be brief.")
    assert engine.prompt_builder() is plain
    assert other.prefix != plain.prefix
    for number in range(8):
        engine.prompt_builder(f"Prompt {number}.")
    assert engine.prompt_builder("Be brief.") is not other
    assert engine.prompt_builder("Be brief.").prefix == other.prefix


def test_a_strategy_can_be_given_itself(engine):
    sampling = SamplingConfig(max_new_tokens=5, ignore_stop_tokens=True)
    given = list(engine.generate(PROMPT, sampling, engine.strategies["full"]))[-1]
    assert given.token_ids == _run(engine, sampling)[-1].token_ids
    with pytest.raises(GenerationError, match="no prefill strategy 'fast'; there are full"):
        next(engine.generate(PROMPT, sampling, "fast"))


def test_what_a_strategy_leaves_for_later_is_done_once_and_after_the_first_token(engine):
    events = []

    class Leaving(FullPrefill):
        def prefill(self, decoder, request):
            result = super().prefill(decoder, request)
            return dataclasses.replace(result, afterwards=lambda: events.append("afterwards"))

    sampling = SamplingConfig(max_new_tokens=3, ignore_stop_tokens=True)
    for step in engine.generate(PROMPT, sampling, strategy=Leaving()):
        events.append(type(step))
    assert events == [GeneratedToken, "afterwards", GeneratedToken, GeneratedToken, Finished]


def test_all_blocks_are_free_after_an_answer_and_after_an_abandoned_one(engine):
    free = engine.pool.num_free
    _run(engine, SamplingConfig(max_new_tokens=3))
    abandoned = engine.generate(PROMPT, SamplingConfig(max_new_tokens=100, ignore_stop_tokens=True))
    next(abandoned)
    assert engine.pool.num_free < free
    abandoned.close()
    assert engine.pool.num_free == free


def test_interleaved_requests_give_the_answers_they_give_alone(engine):
    other = Prompt((Segment(tuple(range(100, 180))),))
    sampling = SamplingConfig(max_new_tokens=15, ignore_stop_tokens=True)
    alone = [_run(engine, sampling, prompt)[-1].token_ids for prompt in (PROMPT, other)]
    together = zip(engine.generate(PROMPT, sampling), engine.generate(other, sampling), strict=True)
    ended = list(together)[-1]
    assert [step.token_ids for step in ended] == alone


def test_the_answer_is_cut_to_what_the_window_leaves(engine):
    long = Prompt((Segment((5,) * (engine.max_context - 4)),))
    finished = _run(engine, SamplingConfig(max_new_tokens=100, ignore_stop_tokens=True), long)[-1]
    assert len(finished.token_ids) == 4


@pytest.mark.parametrize("length", [0, 256])
def test_prompts_without_room_for_an_answer_are_refused(engine, length):
    with pytest.raises(GenerationError, match=f"the prompt has {length} tokens, and .* takes 1 to 255"):
        next(engine.generate(Prompt((Segment((5,) * length),))))


def test_an_unknown_strategy_is_refused_by_name(engine):
    with pytest.raises(GenerationError, match="no prefill strategy 'warp'; there are full"):
        next(engine.generate(PROMPT, strategy="warp"))


def test_a_pool_that_is_too_small_says_so(tiny_folder):
    small = Engine.load(tiny_folder, device="cpu", dtype="float32", kv_tokens=64)
    with pytest.raises(CacheCapacityError, match="asked for"):
        list(small.generate(PROMPT, SamplingConfig(max_new_tokens=200)))
    assert small.pool.num_free == small.pool.num_blocks


def test_forward_behind_earlier_kv_equals_one_pass(engine):
    tokens = list(range(30, 80))
    whole = engine.forward(tokens)
    first = engine.forward(tokens[:20])
    second = engine.forward(tokens[20:], first.kv)
    torch.testing.assert_close(second.logits, whole.logits, rtol=0, atol=2e-4)
    keys = torch.cat((first.kv[2][0], second.kv[2][0]))
    torch.testing.assert_close(keys, whole.kv[2][0], rtol=0, atol=2e-4)


def test_token_losses_are_those_of_transformers(engine):
    tokens = torch.randint(3, 300, (100,), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        logits = hf_model("llama")(tokens.unsqueeze(0)).logits[0]
    expected = torch.nn.functional.cross_entropy(logits[:-1], tokens[1:], reduction="none")
    torch.testing.assert_close(engine.token_losses(tokens.tolist()), expected, rtol=0, atol=2e-4)


def test_token_losses_of_many_rows_do_not_depend_on_how_they_are_split(engine, monkeypatch):
    tokens = list(range(10, 90))
    whole = engine.token_losses(tokens)
    monkeypatch.setattr("ragkit.generation.engine._LOSS_ROWS", 7)
    torch.testing.assert_close(engine.token_losses(tokens), whole, rtol=0, atol=1e-5)


def test_one_token_has_no_loss(engine):
    assert engine.token_losses([5]).shape == (0,)


def test_a_pass_longer_than_the_window_is_refused(engine):
    with pytest.raises(GenerationError, match="1 to 256 tokens"):
        engine.forward([5] * 257)


@pytest.mark.parametrize(("setting", "value"), [("device", "cuda"), ("dtype", "int3")])
def test_impossible_placements_are_refused(tiny_folder, setting, value):
    if value == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(ConfigError, match=f"{setting}.*{value}"):
        Engine.load(tiny_folder, **{setting: value})
