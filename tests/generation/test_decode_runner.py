"""Steps of several requests through one runner; `test_gpu` has its graphs."""

import pytest
import torch

from ragkit.generation.decode_runner import DecodeRunner, _Bucket
from ragkit.generation.full_prefill import FullPrefill
from ragkit.generation.rotary_cache import RotaryCache
from ragkit.kvcache.pool import KVPool
from ragkit.kvcache.request_kv import RequestKV

from .conftest import decoder_of, hf_model

TOKENS = torch.randint(3, 300, (60,), generator=torch.Generator().manual_seed(2))


@pytest.fixture
def replayed(monkeypatch):
    """Steps as graphs do them: each writes its logits where the one before it did."""
    run, buffers = _Bucket.run, {}

    def run_into_one_buffer(bucket, states, token_ids):
        logits = run(bucket, states, token_ids)
        return buffers.setdefault(bucket, torch.empty_like(logits)).copy_(logits)

    monkeypatch.setattr(_Bucket, "run", run_into_one_buffer)


@torch.inference_mode()
def test_the_logits_of_a_step_outlast_the_step_of_another_request(replayed):
    decoder = decoder_of(hf_model("llama"))
    pool = KVPool(decoder.layout, 20, decoder.device)
    runner, rotary = DecodeRunner(decoder, pool), RotaryCache(decoder).table(256, 60)
    states = []
    for length in (40, 23):
        kv = RequestKV(pool)
        FullPrefill().extend(decoder, kv, rotary, TOKENS[:length])
        kv.reserve(length + 8)
        states.append(runner.begin(kv, rotary))
    first = runner.step(states[:1], [5])
    kept = first.clone()
    other = runner.step(states[1:], [7])
    assert torch.equal(first, kept)
    assert not torch.equal(first, other)
