"""Batches on a CUDA device: packed passes, graphs, tables. Run with `pytest -m gpu`."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from ragkit.config import BatchConfig
from ragkit.generation.batch_engine import BatchEngine
from ragkit.generation.drafter_self import self_drafter
from ragkit.generation.engine import Engine
from ragkit.generation.speculative_decode import Drafting

from .test_batch_drafts import FIXED, asked, drafted
from .test_batch_drafts import check as check_drafted
from .test_batch_engine import alone, check, requests

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")]


@pytest.mark.parametrize("budget", [16, 4096])
@pytest.mark.parametrize("kv_tokens", [64 * 8, 64 * 100])
def test_answers_are_those_of_single_requests(tiny_folder, budget, kv_tokens):
    torch.backends.cuda.matmul.allow_tf32 = False
    engine = Engine.load(tiny_folder, device="cuda", dtype="float32", kv_tokens=kv_tokens)
    check(engine, BatchEngine(engine, BatchConfig(budget)), requests(24))


def test_a_batch_takes_the_same_graphs_again(tiny_folder):
    engine = Engine.load(tiny_folder, device="cuda", dtype="float32", kv_tokens=64 * 100)
    batch = BatchEngine(engine, BatchConfig(4096))
    first = {one.request_id: one.text for one in batch.run(requests(16))}
    buckets = len(engine.step_runner._buckets)
    assert {one.request_id: one.text for one in batch.run(requests(16))} == first
    assert len(engine.step_runner._buckets) == buckets


@pytest.mark.parametrize("budget", [24, 4096])
@pytest.mark.parametrize("kv_tokens", [64 * 6, 64 * 100])
def test_drafted_answers_are_those_of_single_requests_without_drafts(tiny_folder, budget, kv_tokens):
    """A pass over several tokens adds up in another order than a step: fp32, so that no two tokens change places."""
    torch.backends.cuda.matmul.allow_tf32 = False
    engine = Engine.load(tiny_folder, device="cuda", dtype="float32", kv_tokens=kv_tokens)
    plain = [alone(engine, asked(index)) for index in range(24)]
    made = [asked(index) if index % 5 == 0 else drafted(index, plain[index].token_ids) for index in range(24)]
    stats = check_drafted(engine, made, plain, BatchConfig(budget, max_running=8)).stats
    assert stats.verify_steps > 0
    assert stats.draft_tokens_accepted > 0


def test_a_model_drafts_in_a_batch(tiny_folder):
    torch.backends.cuda.matmul.allow_tf32 = False
    engine = Engine.load(tiny_folder, device="cuda", dtype="float32", kv_tokens=64 * 100)
    plain = [alone(engine, asked(index)) for index in range(24)]
    drafting = Drafting(self_drafter(engine), limits=FIXED)
    made = [dataclasses.replace(asked(index), drafting=drafting) for index in range(24) if index % 3]
    stats = check_drafted(engine, made, plain, BatchConfig(4096, max_running=4)).stats
    assert stats.draft_tokens_accepted > 0.9 * stats.draft_tokens_verified > 100


def test_the_same_graphs_verify_the_drafts_of_a_second_batch(tiny_folder):
    engine = Engine.load(tiny_folder, device="cuda", dtype="float32", kv_tokens=64 * 100)
    plain = [alone(engine, asked(index)) for index in range(12)]
    made = [drafted(index, plain[index].token_ids) for index in range(12)]
    batch = BatchEngine(engine, BatchConfig(4096, max_running=4))
    first = {one.request_id: one.text for one in batch.run(made)}
    assert {one.request_id: one.text for one in batch.run(made)} == first
