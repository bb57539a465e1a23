"""Drafting changes nothing but the number of passes: tokens, stops, limits and rows are those of plain decoding."""

import logging
import math
import random
import sys
from pathlib import Path

import pytest
import torch

from ragkit.errors import ConfigError, GenerationError, RagkitError
from ragkit.generation.acceptance import Transfer
from ragkit.generation.contiguous_decode import ContiguousDecodeRunner
from ragkit.generation.decode import decode
from ragkit.generation.draft_control import DraftLimits
from ragkit.generation.draft_costs import MeasuredCosts, NominalCosts
from ragkit.generation.draft_tree import DraftTree
from ragkit.generation.drafter import DraftPrice
from ragkit.generation.drafter_lookup import LookupDrafter
from ragkit.generation.full_prefill import FullPrefill
from ragkit.generation.sampling import SamplingConfig, distribution
from ragkit.generation.speculative_decode import Drafting, SpeculativeRequest, advance, speculative_decode
from ragkit.generation.steps import Finished, FinishReason, GeneratedToken
from ragkit.kvcache.request_kv import RequestKV, pack_rows
from ragkit.setting_names import DraftMode
from ragkit.types import Chunk, Prompt, Segment

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from draft_doubles import ScriptedDrafter, ScriptedSession, drawn_trees, random_trees

VOCAB = 300
PROMPT = Prompt((Segment((1, 40, 50)), Segment((60, 70, 80, 60, 70, 81), "chunk"), Segment((90, 60))))
FIXED = DraftLimits(depth=8, nodes=8, length=8)  # drafts whatever it costs


def sampling(tokens=24, **changes):
    return SamplingConfig(**{"max_new_tokens": tokens, "ignore_stop_tokens": True, **changes})


def run(engine, config, drafting=None, prompt=PROMPT):
    steps = list(engine.generate(prompt, config, drafting=drafting))
    assert all(isinstance(step, GeneratedToken) for step in steps[:-1])
    assert isinstance(steps[-1], Finished)
    assert [step.token_id for step in steps[:-1]] == list(steps[-1].token_ids)
    return steps[-1]


def prompts(count):
    """Return prompts whose chunks repeat, so that answers find something to copy."""
    chance = random.Random(5)
    for _ in range(count):
        words = [tuple(chance.randrange(3, VOCAB) for _ in range(4)) for _ in range(3)]
        chunks = [Segment(sum(chance.choices(words, k=chance.randrange(1, 6)), ()), str(at)) for at in range(2)]
        yield Prompt((Segment((1,)), *chunks, Segment(tuple(chance.choices(range(3, VOCAB), k=3)))))


def right_answer(engine, config, prompt=PROMPT):
    return run(engine, config, prompt=prompt).token_ids


def oracle(right, length=4):
    """Return a drafter that proposes the answer itself."""

    def draft(session, budget):
        at = len(session.tokens)
        return DraftTree.chain(right[at : at + min(length, budget.depth)])

    return ScriptedDrafter(draft)


# ------------------------------------------------------------------------------------------------------ the same answer


def test_greedy_answers_to_200_prompts_are_those_of_plain_decoding(engine):
    config, accepted = sampling(20), 0
    for seed, prompt in enumerate(prompts(200)):
        plain = right_answer(engine, config, prompt)
        drafter = LookupDrafter() if seed % 2 else ScriptedDrafter(random_trees(seed, VOCAB, plain))
        finished = run(engine, config, Drafting(drafter, limits=FIXED), prompt)
        assert finished.token_ids == plain
        accepted += finished.draft.accepted
    assert accepted > 500


@pytest.mark.parametrize("top_p", [1.0, 0.7])
def test_drafts_that_are_not_drawn_leave_the_tokens_of_a_seed(engine, top_p):
    accepted = 0
    for seed in range(20):
        config = sampling(seed=seed, temperature=1.0, top_p=top_p)
        plain = right_answer(engine, config)
        for drafter in (LookupDrafter(), ScriptedDrafter(random_trees(seed, VOCAB, plain))):
            finished = run(engine, config, Drafting(drafter, limits=FIXED))
            assert finished.token_ids == plain
            accepted += finished.draft.accepted
    assert accepted > 50


def test_equal_seeds_give_equal_answers_where_drafts_are_drawn(engine):
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(2))

    def tokens(seed):
        drafter = ScriptedDrafter(drawn_trees(3, logits, 1, 4), has_probabilities=True)
        return run(engine, sampling(seed=seed, temperature=1.2), Drafting(drafter)).token_ids

    assert tokens(1) == tokens(1)
    assert tokens(1) != tokens(2)


@pytest.mark.parametrize(("width", "depth"), [(1, 3), (2, 2), (3, 1)])
def test_sampled_answers_have_the_distribution_of_the_model(engine, width, depth):
    """Chi-square over the second and third token, whose drafts come from another distribution."""
    config = sampling(3, temperature=0.5)
    prompt = Prompt((Segment((1, 40)),))
    joint, accepted, runs = {}, 0, 400
    first = int(engine.forward(prompt.token_ids).logits.argmax())
    law, logits = {}, engine.forward([*prompt.token_ids, first]).logits
    noise = torch.randn(VOCAB, generator=torch.Generator().manual_seed(7))
    drafter = ScriptedDrafter(drawn_trees(11, logits + noise, width, depth), has_probabilities=True)
    second = distribution(logits, config)
    for token in second.topk(6).indices.tolist():
        third = distribution(engine.forward([*prompt.token_ids, first, token]).logits, config)
        for last in third.topk(3).indices.tolist():
            law[token, last] = float(second[token] * third[last])
    for seed in range(runs):
        costs = MeasuredCosts()
        request = SpeculativeRequest(
            Drafting(drafter, limits=FIXED), prompt, sampling(3, temperature=0.5, seed=seed), frozenset(), costs
        )
        with torch.inference_mode(), RequestKV(engine.pool) as kv:
            rotary = engine.rotary.table(64, 2)
            FullPrefill().extend(engine.decoder, kv, rotary, torch.tensor(prompt.token_ids))
            kv.reserve(40)
            # The first token is given, so that the law of the others has few cells.
            logits = torch.full((VOCAB,), -1e9)
            logits[first] = 1e9
            decoded = list(
                speculative_decode(request, engine._runner, engine.verifier, kv, rotary, logits, engine.tokenizer)
            )
        answer = tuple(step.token_id for step in decoded)
        assert answer[0] == first
        joint[answer[1:]] = joint.get(answer[1:], 0) + 1
        accepted += request.use().accepted
    assert accepted > runs / 4
    cells = [cell for cell in law if law[cell] * runs >= 5]
    observed = [joint.get(cell, 0) for cell in cells]
    expected = [law[cell] * runs for cell in cells]
    observed.append(runs - sum(observed))
    expected.append(runs - sum(expected))
    freedom = len(cells)
    assert freedom >= 4
    statistic = sum((count - want) ** 2 / want for count, want in zip(observed, expected, strict=True))
    score = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    assert 0.5 * math.erfc(score / math.sqrt(2)) > 1e-3


# -------------------------------------------------------------------------------------------------------- where it ends


@pytest.mark.parametrize("tokens", range(1, 12))
def test_the_limit_of_tokens_is_met_exactly(engine, tokens):
    right = right_answer(engine, sampling(30))
    finished = run(engine, sampling(tokens), Drafting(oracle(right), limits=FIXED))
    assert finished.token_ids == right[:tokens]
    assert finished.reason is FinishReason.LENGTH
    assert finished.usage.generated == tokens


@pytest.mark.parametrize("place", range(8))
def test_a_stop_token_ends_the_answer_wherever_it_stands_in_a_draft(engine, place):
    right = right_answer(engine, sampling(30))
    config = sampling(30, stop_token_ids=(right[place],), ignore_stop_tokens=False)
    plain = run(engine, config)
    finished = run(engine, config, Drafting(oracle(right), limits=FIXED))
    assert (finished.reason, finished.token_ids) == (plain.reason, plain.token_ids)
    assert finished.reason is FinishReason.STOP_TOKEN


def test_drafts_end_where_the_window_ends(engine):
    long = Prompt((Segment(tuple(range(3, 3 + engine.max_context - 6))),))
    plain = run(engine, sampling(100), prompt=long)
    drafter = oracle(plain.token_ids)
    finished = run(engine, sampling(100), Drafting(drafter, limits=FIXED), prompt=long)
    assert finished.token_ids == plain.token_ids
    assert len(finished.token_ids) == 6
    assert finished.draft.accepted >= 3


def test_all_blocks_are_free_and_the_session_is_closed_after_an_abandoned_answer(engine):
    free, drafter = engine.pool.num_free, oracle(right_answer(engine, sampling(30)))
    answer = engine.generate(PROMPT, sampling(30), drafting=Drafting(drafter, limits=FIXED))
    for _ in range(4):
        next(answer)
    assert engine.pool.num_free < free
    answer.close()
    assert engine.pool.num_free == free
    assert drafter.sessions[0].closed == 1


def test_the_first_token_waits_for_no_drafter(engine):
    drafter = oracle(right_answer(engine, sampling(30)))
    answer = engine.generate(PROMPT, sampling(30), drafting=Drafting(drafter, limits=FIXED))
    next(answer)
    assert drafter.sessions == []


# ---------------------------------------------------------------------------------------------------------- the KV rows


def decoded_rows(engine, tokens_of):
    """Return the rows of a request after `tokens_of(kv, rotary, logits)` is exhausted."""
    with torch.inference_mode(), RequestKV(engine.pool) as kv:
        rotary = engine.rotary.table(128, len(PROMPT))
        logits = FullPrefill().extend(engine.decoder, kv, rotary, torch.tensor(PROMPT.token_ids))
        kv.reserve(len(PROMPT) + 24)
        tokens = list(tokens_of(kv, rotary, logits))
        packed = pack_rows([kv])
        return tokens, packed.positions, [kv.rows(layer, packed) for layer in range(engine.pool.layout.num_layers)]


def test_rows_after_drafting_are_those_of_plain_decoding(engine):
    config = sampling(24)
    right = right_answer(engine, config)
    drafting = Drafting(ScriptedDrafter(random_trees(1, VOCAB, right)), limits=FIXED)
    request = SpeculativeRequest(drafting, PROMPT, config, frozenset(), MeasuredCosts())
    plain = decoded_rows(
        engine, lambda kv, rotary, logits: decode(
            ContiguousDecodeRunner(engine.decoder), kv, rotary, logits, config, frozenset(), engine.tokenizer
        ),
    )  # fmt: skip
    drafted = decoded_rows(
        engine, lambda kv, rotary, logits: speculative_decode(
            request, engine._runner, engine.verifier, kv, rotary, logits, engine.tokenizer
        ),
    )  # fmt: skip
    assert drafted[0] == plain[0]
    assert torch.equal(drafted[1], plain[1])
    assert len(drafted[1]) == len(PROMPT) + 23
    assert request.use().accepted >= 5
    for own, theirs in zip(drafted[2], plain[2], strict=True):
        for one, other in zip(own, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=2e-4)


# ----------------------------------------------------------------------------------------------------------- in numbers


def test_a_drafter_that_is_always_right_saves_all_but_one_pass_in_five(engine):
    right = right_answer(engine, sampling(26))
    use = run(engine, sampling(26), Drafting(oracle(right), limits=FIXED)).draft
    assert (use.mode, use.drafter) == ("exact", "scripted")
    assert (use.drafted, use.accepted, use.steps) == (20, 20, 5)
    assert use.ms_per_step > 0


def test_plain_decoding_drafts_nothing(engine):
    use = run(engine, sampling(3)).draft
    assert (use.mode, use.drafted, use.accepted) == ("none", 0, 0)


def test_a_drafter_that_is_always_wrong_is_soon_asked_no_more(engine, monkeypatch):
    monkeypatch.setattr(engine, "draft_costs", NominalCosts())  # with no other test's drafts and times
    drafter = ScriptedDrafter(lambda session, budget: DraftTree.chain([299] * budget.depth), step_ms=0.5)
    config = sampling(200)
    finished = run(engine, config, Drafting(drafter))
    assert finished.token_ids == right_answer(engine, config)
    assert 0 < finished.draft.drafted < 15


def test_a_drafter_that_cannot_pay_is_not_begun(engine, monkeypatch, caplog):
    monkeypatch.setattr(engine, "draft_costs", NominalCosts())
    drafter = oracle(right_answer(engine, sampling(30)))
    drafter.price = lambda prompt: DraftPrice(step_share=1.01)
    with caplog.at_level(logging.INFO, logger="ragkit"):
        finished = run(engine, sampling(30), Drafting(drafter))
    assert drafter.sessions == []
    assert (finished.draft.drafter, finished.draft.drafted, finished.draft.steps) == ("scripted", 0, 29)
    assert [record.message for record in caplog.records if "not drafted" in record.message] == [
        "not drafted by scripted: even if all of its tokens stood, the answer would come 0.99 times as fast"
    ]
    assert finished.warnings == ()


def test_transfer_is_drafted_whatever_it_costs(engine, monkeypatch):
    monkeypatch.setattr(engine, "draft_costs", NominalCosts())
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(2))
    drafter = ScriptedDrafter(drawn_trees(3, logits, 1, 4), has_probabilities=True)
    drafter.price = lambda prompt: DraftPrice(step_share=1.01)
    assert run(engine, sampling(10), Drafting(drafter, Transfer(1.0))).draft.drafted > 0


def test_transfer_is_drafted_in_every_pass_though_nothing_stands(engine, monkeypatch):
    monkeypatch.setattr(engine, "draft_costs", NominalCosts())
    drafter = ScriptedDrafter(
        lambda session, budget: DraftTree.chain([299] * budget.depth, torch.eye(VOCAB)[[299] * budget.depth]),
        has_probabilities=True, step_ms=0.5,
    )  # fmt: skip
    use = run(engine, sampling(100), Drafting(drafter, Transfer(0.0))).draft
    assert use.drafted >= use.steps - 1 > 50  # the last has no room for a draft


def test_requests_of_one_pass_are_drafted_together_and_get_their_own_answers(engine):
    config = sampling(16)
    several = [PROMPT, Prompt((Segment(tuple(range(100, 170))),)), Prompt((Segment((5, 6, 7)),))]
    plain = [right_answer(engine, config, prompt) for prompt in several]
    by_session = {}
    drafter = ScriptedDrafter(
        lambda session, budget: DraftTree.chain(
            by_session[session.context.prompt][len(session.tokens) :][: min(3, budget.depth)]
        )
    )
    by_session.update(zip(several, plain, strict=True))
    requests, held = [], []
    with torch.inference_mode():
        for prompt in several:
            kv, rotary = RequestKV(engine.pool), engine.rotary.table(128, len(prompt))
            logits = FullPrefill().extend(engine.decoder, kv, rotary, torch.tensor(prompt.token_ids))
            kv.reserve(len(prompt) + 16)
            request = engine.speculative_request(Drafting(drafter, limits=FIXED), prompt, config, frozenset())
            request.first(logits)
            request.state = engine._runner.begin(kv, rotary)
            requests.append(request)
            held.append(kv)
        while running := [request for request in requests if request.reason is None]:
            advance(running, engine._runner, engine.verifier)
    for kv in held:
        kv.release()
    assert [tuple(request.token_ids) for request in requests] == plain
    assert drafter.batches == [3, 3, 3, 3]


def test_greedy_transfer_follows_a_drafter_that_is_sure(engine):
    config = sampling(12)
    plain = right_answer(engine, config)
    other = [token + 1 for token in plain]

    def draft(session, budget):
        at = len(session.tokens)
        tokens = other[at : at + budget.depth]
        return DraftTree.chain(tokens, torch.nn.functional.one_hot(torch.tensor(tokens), VOCAB).float())

    drafter = ScriptedDrafter(draft, has_probabilities=True)
    assert run(engine, config, Drafting(drafter, limits=FIXED)).token_ids == plain
    moved = run(engine, config, Drafting(drafter, Transfer(1e6), FIXED))
    assert moved.draft.mode == DraftMode.TRANSFER
    assert list(moved.token_ids[1:9]) == other[1:9]
    assert drafter.sessions[-1].context.needs_probabilities


def test_transfer_from_a_drafter_without_a_distribution_is_refused():
    with pytest.raises(ConfigError, match="lookup has none"):
        Drafting(LookupDrafter(), Transfer())


@pytest.mark.parametrize("error", [GenerationError("no chunk fits"), torch.OutOfMemoryError("no memory")])
@pytest.mark.parametrize("place", ["begin", "propose", "retrieve", "refresh"])
def test_what_goes_wrong_with_a_drafter_ends_drafts_and_no_answer(engine, place, error, monkeypatch):
    monkeypatch.setattr(engine, "draft_costs", NominalCosts())
    config = sampling(150)
    right = right_answer(engine, config)

    def fail(*_):
        raise error

    def draft(session, budget):
        at = len(session.tokens)
        return DraftTree.chain(right[at : at + min(4, budget.depth)] if at < 40 else [299] * budget.depth)

    drafter = ScriptedDrafter(fail if place == "propose" else draft)
    if place == "begin":
        drafter.begin = fail
    if place == "refresh":
        monkeypatch.setattr(ScriptedSession, "refresh", fail)
    limits = DraftLimits(depth=8, nodes=8, length=4)
    finished = run(engine, config, Drafting(drafter, None, limits, fail if place == "retrieve" else lambda _: PROMPT))
    assert finished.token_ids == right
    assert [warning.partition(": ")[2] for warning in finished.warnings] == [str(error)]
    assert all(session.closed for session in drafter.sessions)


def test_what_is_drafted_from_is_retrieved_anew_where_acceptance_falls(engine):
    config = sampling(160)
    right = right_answer(engine, config)

    def draft(session, budget):
        at, fresh = len(session.tokens), len(session.prompts) > 1
        tokens = right[at : at + 1] if at < 50 or fresh else (299,)
        return DraftTree.chain(tokens[: budget.depth])

    asked = []
    drafter = ScriptedDrafter(draft)
    other = Prompt((Segment((9,), "other"),))
    finished = run(
        engine, config, Drafting(drafter, limits=FIXED, retrieve=lambda tokens: asked.append(len(tokens)) or other)
    )
    assert finished.token_ids == right
    assert len(asked) == 1
    assert 50 < asked[0] < 70
    assert drafter.sessions[0].prompts == [PROMPT, other]


@pytest.mark.slow
def test_greedy_answers_of_the_bundled_model_are_those_of_plain_decoding():
    """200 prompts of random runs of English words, in fp32, drafted by lookup and by the model over fewer chunks."""
    from ragkit.generation.drafter_self import self_drafter
    from ragkit.generation.engine import Engine

    try:
        bundled = Engine.load("smollm2-135m-instruct", device="cpu", dtype="float32", offline=True)
    except RagkitError as error:
        pytest.skip(f"the bundled model is not there: {error}")
    chance, accepted = random.Random(3), 0
    words = [
        "the",
        "old",
        "miller",
        "sold",
        "his",
        "grain",
        "at",
        "the",
        "market",
        "below",
        "the",
        "bridge",
        "where",
        "otters",
        "live",
        "by",
        "the",
        "river",
    ]
    drafters = [LookupDrafter(), self_drafter(bundled, context_tokens=60)]
    for number in range(200):
        texts = [" ".join(chance.choices(words, k=30)) + "." for _ in range(4)]
        chunks = [Chunk(str(at), "d", at, text, 0, len(text), 40) for at, text in enumerate(texts)]
        prompt = bundled.prompt_builder().build(
            f"What is said of the {chance.choice(words)}?", chunks, max_new_tokens=32
        )
        plain = run(bundled, sampling(32), prompt=prompt.prompt).token_ids
        drafted = run(bundled, sampling(32), Drafting(drafters[number % 2], limits=FIXED), prompt.prompt)
        assert drafted.token_ids == plain
        accepted += drafted.draft.accepted
    assert accepted > 1000
