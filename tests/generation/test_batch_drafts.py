"""Drafting inside a batch: the answers of plain single requests, in fewer passes."""

from __future__ import annotations

import dataclasses
import random
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ragkit.config import BatchConfig
from ragkit.errors import CacheCapacityError
from ragkit.generation.acceptance import Transfer
from ragkit.generation.batch_drafts import BatchDrafts
from ragkit.generation.batch_engine import BatchEngine
from ragkit.generation.batch_request import BatchRequest
from ragkit.generation.decode_runner import DecodeRunner
from ragkit.generation.draft_control import DraftController, DraftLimits
from ragkit.generation.draft_costs import NominalCosts
from ragkit.generation.draft_tree import DraftTree
from ragkit.generation.drafter_lookup import LookupDrafter
from ragkit.generation.drafter_self import self_drafter
from ragkit.generation.engine import Engine
from ragkit.generation.sampling import SamplingConfig
from ragkit.generation.speculative_decode import Drafting
from ragkit.types import Prompt, Segment

from .test_batch_engine import Strategy, alone, requests

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from draft_doubles import ScriptedDrafter, random_trees

VOCAB = 300
FIXED = DraftLimits(depth=8, nodes=8, length=8)  # drafts whatever it costs
PREFIX = Segment(tuple(range(10, 40)))


def make_engine(folder: Path, blocks: int, *, paged: bool = False) -> Engine:
    engine = Engine.load(folder, device="cpu", dtype="float32", kv_tokens=64 * blocks)
    if paged:
        engine._runner = DecodeRunner(engine.decoder, engine.pool)
    return engine


@pytest.fixture(scope="module")
def engines(tiny_folder) -> dict[tuple[int, bool], Engine]:
    """Engines by the blocks of their pool and by whether attention reads them: few blocks preempt."""
    return {(blocks, paged): make_engine(tiny_folder, blocks, paged=paged) for blocks in (5, 60) for paged in (0, 1)}


@pytest.fixture(scope="module")
def engine(engines) -> Engine:
    return engines[60, False]


def asked(index: int) -> BatchRequest:
    """Return one of 24 requests, whose chunks repeat so that answers find something to copy."""
    chance = random.Random(index)
    words = [tuple(chance.randrange(3, VOCAB) for _ in range(4)) for _ in range(3)]
    chunks = [Segment(sum(chance.choices(words, k=4), ()), f"c{index}-{at}") for at in range(2)]
    prompt = Prompt((PREFIX, *chunks, Segment((41, 50 + index))))
    sampling = SamplingConfig(
        chance.choice((1, 5, 20, 60, 140)), float(index % 3 == 0), 0.9, seed=index, ignore_stop_tokens=index % 4 > 0,
        stop_token_ids=(2, *range(100, 106)),
    )  # fmt: skip
    return BatchRequest(f"r{index}", prompt, sampling, Strategy() if index % 5 == 4 else "full")


@pytest.fixture(scope="module")
def plain(engine):
    """The answers of `asked`, alone and without drafts."""
    return [alone(engine, asked(index)) for index in range(24)]


def drafted(index: int, right: tuple[int, ...], limits: DraftLimits = FIXED) -> BatchRequest:
    drafter = LookupDrafter() if index % 2 else ScriptedDrafter(random_trees(index, VOCAB, right))
    return dataclasses.replace(asked(index), drafting=Drafting(drafter, limits=limits))


def oracle(right: tuple[int, ...], length: int = 4) -> ScriptedDrafter:
    """Return a drafter that proposes the answer itself."""

    def draft(session, budget):
        at = len(session.tokens)
        return DraftTree.chain(right[at : at + min(length, budget.depth)])

    return ScriptedDrafter(draft)


def check(engine: Engine, made: list[BatchRequest], plain, config: BatchConfig) -> BatchEngine:
    free, batch = engine.pool.num_free, BatchEngine(engine, config)
    results = {one.request_id: one for one in batch.run(made)}
    assert engine.pool.num_free == free
    assert len(results) == len(made)
    for request in made:
        result, expected = results[request.request_id], plain[int(request.request_id[1:])]
        assert result.error is None, result.error
        assert result.finished.token_ids == expected.token_ids
        assert result.finished.reason is expected.reason
        assert result.text == engine.tokenizer.decode(expected.token_ids)
        assert result.finished.usage.generated == expected.usage.generated
        if request.drafting is None:
            assert result.finished.draft.mode == "none"
        else:
            use = result.finished.draft
            assert (use.mode, use.drafter) == ("exact", request.drafting.drafter.name)
            assert 0 <= use.accepted <= use.drafted
    return batch


# ------------------------------------------------------------------------------------------------------ the same answer


@settings(max_examples=40, deadline=None)
@given(
    order=st.lists(st.integers(0, 23), min_size=1, max_size=10, unique=True),
    blocks=st.sampled_from([5, 60]),
    paged=st.sampled_from([0, 0, 0, 1]),
    budget=st.sampled_from([5, 16, 60, 4096]),
    max_running=st.integers(1, 10),
    look_ahead=st.integers(1, 12),
    undrafted=st.integers(2, 5),
)
def test_answers_are_those_of_single_requests_without_drafts(
    engines, plain, order, blocks, paged, budget, max_running, look_ahead, undrafted
):
    made = [
        asked(index) if at % undrafted == 1 else drafted(index, plain[index].token_ids)
        for at, index in enumerate(order)
    ]
    config = BatchConfig(budget, max_running=max_running, look_ahead=look_ahead)
    check(engines[blocks, bool(paged)], made, plain, config)


@pytest.mark.parametrize("paged", [False, True])
def test_drafts_that_stand_take_fewer_steps(engines, plain, paged):
    made = [asked(index) for index in range(0, 24, 3)]
    right = [dataclasses.replace(one, drafting=Drafting(oracle(plain[int(one.request_id[1:])].token_ids), limits=FIXED))
             for one in made]  # fmt: skip
    config = BatchConfig(4096, max_running=4)
    without, stats = (check(engines[60, paged], some, plain, config).stats for some in (made, right))
    assert without.verify_steps == without.draft_tokens_verified == 0
    assert stats.draft_tokens_accepted > 0.8 * stats.draft_tokens_verified > 100
    assert stats.steps < 0.5 * without.steps
    assert stats.decode_tokens + stats.draft_tokens_accepted == without.decode_tokens


def test_preempted_requests_begin_a_session_again_with_their_tokens(engines, plain):
    made, drafters = [], []
    long = [index for index in range(24) if len(plain[index].token_ids) > 60]
    for index in long[:6]:
        drafters.append(oracle(plain[index].token_ids))
        made.append(dataclasses.replace(asked(index), drafting=Drafting(drafters[-1], limits=FIXED)))
    stats = check(engines[5, False], made, plain, BatchConfig(64)).stats
    assert stats.preemptions > 0
    assert any(len(one.sessions) > 1 for one in drafters)
    for one, index in zip(drafters, long, strict=False):
        assert all(session.closed == 1 for session in one.sessions)
        seeds = [session.context.sampling.seed for session in one.sessions]
        assert len({*seeds}) == len(seeds)
        for session in one.sessions:
            assert session.tokens == list(plain[index].token_ids[: len(session.tokens)])


def test_a_model_drafts_in_a_batch_and_its_blocks_are_free_afterwards(engines, plain):
    engine = engines[60, False]
    drafting = Drafting(self_drafter(engine), limits=FIXED)
    made = [dataclasses.replace(asked(index), drafting=drafting) for index in range(24) if index % 3]
    stats = check(engine, made, plain, BatchConfig(4096, max_running=4)).stats
    assert stats.draft_tokens_accepted > 0.9 * stats.draft_tokens_verified > 100


def test_a_model_that_drafts_gives_its_blocks_up_before_a_request_gives_way(tiny_folder, plain):
    engine = make_engine(tiny_folder, 7)
    long = [index for index in range(24) if index % 3 and len(plain[index].token_ids) > 60]
    drafting = Drafting(self_drafter(engine, context_tokens=20), limits=FIXED)
    made = [dataclasses.replace(asked(index), drafting=drafting) for index in long[:3]]
    results = {one.request_id: one.finished for one in BatchEngine(engine).run(made)}
    for one in made:
        assert results[one.request_id].token_ids == plain[int(one.request_id[1:])].token_ids
    warnings = [warning for one in results.values() for warning in one.warnings]
    assert any("other requests need the KV blocks" in warning or "that are spare" in warning for warning in warnings)
    assert engine.pool.num_free == engine.pool.num_blocks


def test_a_drafter_that_fails_ends_drafts_and_no_answer(engine, plain):
    def fail(session, budget):
        raise CacheCapacityError("no room to draft")

    index = max(range(24), key=lambda one: len(plain[one].token_ids))
    made = [dataclasses.replace(asked(index), drafting=Drafting(ScriptedDrafter(fail), limits=FIXED)), asked(2)]
    results = {one.request_id: one.finished for one in BatchEngine(engine).run(made)}
    assert results[f"r{index}"].token_ids == plain[index].token_ids
    assert results[f"r{index}"].warnings == ("drafting ended after 0 steps: no room to draft",)


def test_other_chunks_that_cannot_be_looked_for_end_no_answer(engine, plain, monkeypatch):
    monkeypatch.setattr(DraftController, "pays_to_refresh", lambda *given: True)
    asked_for = []

    def retrieve(tokens):
        asked_for.append(len(tokens))
        raise CacheCapacityError("no other chunks")

    index = max(range(24), key=lambda one: len(plain[one].token_ids))
    right = plain[index].token_ids

    def worsening(session, budget):
        at = len(session.tokens)
        return DraftTree.chain(right[at : at + 2] if at < 30 else (0,))

    drafting = Drafting(ScriptedDrafter(worsening), limits=FIXED, retrieve=retrieve)
    (result,) = BatchEngine(engine).run([dataclasses.replace(asked(index), drafting=drafting)])
    assert result.finished.token_ids == right
    assert len(asked_for) == 1


# ----------------------------------------------------------------------------------------------------- what it may take


def test_steps_keep_to_their_budget_with_drafts(engine, plain, monkeypatch):
    seen = []
    embed = type(engine.decoder).embed
    monkeypatch.setattr(type(engine.decoder), "embed", lambda own, ids: seen.append(len(ids)) or embed(own, ids))
    made = [drafted(index, plain[index].token_ids) for index in range(12) if index % 5 < 4]
    stats = check(engine, made, plain, BatchConfig(20)).stats
    assert max(seen) <= 20
    assert stats.draft_tokens_verified > 0


def test_drafts_are_left_out_where_they_do_not_pay(engine, plain, monkeypatch):
    monkeypatch.setattr(type(engine.draft_costs), "of_pass", lambda own, context, nodes, requests=1: 1 + 5.0 * nodes)
    made = [drafted(index, plain[index].token_ids, DraftLimits()) for index in range(1, 24, 2)]
    stats = check(engine, made, plain, BatchConfig(4096)).stats
    assert stats.draft_tokens_verified == 0


def wrong_model(step_ms):
    return ScriptedDrafter(
        lambda session, budget: DraftTree.chain([299] * budget.depth, torch.eye(VOCAB)[[299] * budget.depth]),
        has_probabilities=True, step_ms=step_ms,
    )  # fmt: skip


def test_a_model_whose_drafts_are_not_worth_a_common_pass_is_asked_ever_more_seldom(engines, monkeypatch):
    monkeypatch.setattr(engines[60, 1], "draft_costs", NominalCosts())
    monkeypatch.setattr(NominalCosts, "of_pass", lambda own, context, nodes, requests=1: 1 + 0.1 * nodes)
    drafter, config = wrong_model(0.3), SamplingConfig(100, ignore_stop_tokens=True)
    made = [
        BatchRequest(str(at), asked(at).prompt, config, drafting=None if at else Drafting(drafter)) for at in range(8)
    ]
    batch = BatchEngine(engines[60, 1], BatchConfig(4096))
    assert all(one.error is None for one in batch.run(made))
    assert batch.stats.draft_tokens_verified == 0
    assert 0 < len(drafter.trees) <= 7


def changing(right, better_after):
    """Return a lookup that is sure of two tokens, which are wrong for so many tokens of the answer and then right."""

    def draft(session, budget):
        at = len(session.tokens)
        tokens = right[at : at + min(2, budget.depth)]
        if at < better_after:
            tokens = [(token + 1) % VOCAB for token in tokens]
        return dataclasses.replace(DraftTree.chain(tokens), chances=(0.9, 0.8)[: len(tokens)])

    return ScriptedDrafter(draft)


def answered_by(engine, drafters):
    """Return the answers to a request a drafter, and what was counted; those of None are not drafted."""
    config, batch = SamplingConfig(120, ignore_stop_tokens=True), BatchEngine(engine, BatchConfig(4096))
    made = [
        BatchRequest(str(at), asked(at).prompt, config, drafting=one and Drafting(one))
        for at, one in enumerate(drafters)
    ]
    results = sorted(batch.run(made), key=lambda one: one.request_id)
    return [one.finished.token_ids for one in results], batch.stats


@pytest.mark.parametrize(("paged", "requests"), [(0, 1), (0, 4), (1, 4)])
def test_lookups_whose_drafts_fell_are_trusted_again_once_they_stand(engines, monkeypatch, paged, requests):
    engine = engines[60, paged]
    monkeypatch.setattr(engine, "draft_costs", NominalCosts())
    monkeypatch.setattr(NominalCosts, "of_pass", lambda own, context, nodes, requests=1: 1 + 0.08 * nodes)
    right, plain = answered_by(engine, [None] * requests)
    tokens, stats = answered_by(engine, [changing(one, 60) for one in right])
    assert tokens == right
    assert stats.draft_tokens_accepted > 15 * requests
    assert stats.steps < plain.steps - 15


@pytest.mark.parametrize(("paged", "node"), [(0, 0.08), (1, 0.08), (0, 0.3)])
def test_probes_of_lookups_that_are_always_wrong_cost_a_hundredth_of_all_passes(engines, monkeypatch, paged, node):
    engine, lost = engines[60, paged], []
    monkeypatch.setattr(engine, "draft_costs", NominalCosts())
    monkeypatch.setattr(NominalCosts, "of_pass", lambda own, context, nodes, requests=1: 1 + node * nodes)
    observe = BatchDrafts.observe

    def noted(own, jobs, trees, *rest):
        nodes = [len(tree) for tree in trees]
        lost.append(node * (max(nodes) if paged else sum(nodes) / len(nodes)))
        observe(own, jobs, trees, *rest)

    monkeypatch.setattr(BatchDrafts, "observe", noted)
    right, _ = answered_by(engine, [None] * 4)
    tokens, stats = answered_by(engine, [changing(one, 1000) for one in right])
    assert tokens == right
    assert stats.draft_tokens_accepted == 0
    assert 0 < sum(lost[80:]) <= 0.01 * len(lost)  # by then nobody trusts them


def test_transfer_drafts_in_a_batch_whatever_it_costs(engine, monkeypatch):
    monkeypatch.setattr(engine, "draft_costs", NominalCosts())
    config = SamplingConfig(60, ignore_stop_tokens=True)
    made = [BatchRequest(str(at), asked(at).prompt, config, drafting=Drafting(wrong_model(0.5), Transfer(0.0)))
            for at in range(3)]  # fmt: skip
    for one in BatchEngine(engine, BatchConfig(4096)).run(made):
        assert one.finished.draft.drafted >= one.finished.draft.steps - 2  # the last has no room for a draft


def test_a_run_that_is_closed_closes_its_sessions(engine, plain):
    free, drafters = engine.pool.num_free, []
    for index in range(4):
        drafters.append(oracle(plain[index].token_ids, 1))
    made = [dataclasses.replace(one, drafting=Drafting(drafters[at], limits=FIXED))
            for at, one in enumerate(requests(4))]  # fmt: skip
    results = BatchEngine(engine, BatchConfig(64)).run(made)
    next(results)
    results.close()
    assert engine.pool.num_free == free
    assert all(session.closed for one in drafters for session in one.sessions)


def test_costs_are_noted_once_a_pass_with_the_number_of_requests(engine, plain, monkeypatch):
    noted = []
    monkeypatch.setattr(type(engine.draft_costs), "note", lambda own, *given: noted.append(given))
    made = [drafted(index, plain[index].token_ids) for index in range(8)]
    batch = check(engine, made, plain, BatchConfig(4096))
    assert 0 < len(noted) <= batch.stats.steps
    assert max(requests for *_, requests in noted) > 4
