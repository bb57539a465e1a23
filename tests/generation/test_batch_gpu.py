"""Batches on a CUDA device: packed passes, graphs, tables. Run with `pytest -m gpu`."""

from __future__ import annotations

import pytest
import torch

from ragkit.config import BatchConfig
from ragkit.generation.batch_engine import BatchEngine
from ragkit.generation.engine import Engine

from .test_batch_engine import check, requests

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
