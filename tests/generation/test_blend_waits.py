"""The host never waits for a GPU while it launches a warm blend. Run with `pytest -m gpu`."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

from ragkit.config import BatchConfig, BlendRows
from ragkit.generation.batch_engine import BatchEngine
from ragkit.generation.batch_request import BatchRequest
from ragkit.generation.batch_run import BatchRun
from ragkit.generation.blend_prefill import BlendOptions, BlendPrefill
from ragkit.generation.engine import Engine
from ragkit.generation.strategy import PrefillRequest
from ragkit.kvcache.request_kv import RequestKV

from .conftest import decoder_of, hf_model
from .test_batch_blend import SAMPLING, blend_of, prompt
from .test_streamed_rows import DEVICE, PROMPT, Bench

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")]
WARM_UPS = 4  # kernels are compiled, and graphs recorded where a number of tokens comes again
BUSY_CYCLES = 1_000_000_000  # about half a second


@contextmanager
def busy(is_warm=True):
    """Have the device be busy with something else; where all is warm, torch refuses what makes the host wait for it.

    It is busy while all is warmed up as well: page-locked memory that copies still read is not taken again, and to lock
    more the driver may wait.
    """
    torch.cuda.synchronize()
    done = torch.cuda.Event()
    torch.cuda._sleep(BUSY_CYCLES)
    done.record()
    torch.cuda.set_sync_debug_mode("error" if is_warm else "default")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
    if is_warm:
        assert not done.query(), "the host has waited for the device, by something that torch does not look at"


@pytest.mark.parametrize("codec", ["bf16", "int4"])
@pytest.mark.parametrize(("rows", "place"), [("shared", "pool"), ("private", "pool"), ("private", "host")])
@torch.inference_mode()
def test_a_warm_blend_is_launched_without_a_wait(rows, place, codec):
    torch.backends.cuda.matmul.allow_tf32 = False
    decoder = decoder_of(hf_model("llama", head_dim=16, num_hidden_layers=5).to(DEVICE))
    bench = Bench(decoder, codec)
    blend = BlendPrefill(bench.store, bench.chunks, BlendOptions(rows=BlendRows(rows)))
    rotary = bench.rotary.table(256, len(PROMPT))
    results = []
    for index in range(WARM_UPS + 1):
        with RequestKV(bench.pool) as kv:
            request = PrefillRequest(PROMPT, kv, rotary, answer_tokens=8)
            with busy(is_warm=index == WARM_UPS):
                launched = blend.launch(decoder, request)
            results.append(launched.finish())
            if results[-1].afterwards is not None and place == "pool":
                results[-1].afterwards()
    result = results[-1]
    assert set(result.kv.bytes_by_tier) == {"gpu" if place == "pool" else "ram"}
    assert result.warnings == ()
    torch.testing.assert_close(result.logits, results[0].logits, rtol=0, atol=1e-4)
    bench.store.close()


@pytest.mark.parametrize("rows", BlendRows)
def test_a_batch_launches_its_blends_without_a_wait(tiny_folder, rows, monkeypatch):
    torch.backends.cuda.matmul.allow_tf32 = False
    engine = Engine.load(tiny_folder, device="cuda", dtype="float32", kv_tokens=64 * 100)
    blend, launch, launches = blend_of(engine, rows), BatchRun._launch_into, []
    made = [BatchRequest(str(index), prompt(0, 1, question=index), SAMPLING, blend, 0.3) for index in range(3)]

    def answers():
        return {one.request_id: one.finished.token_ids for one in BatchEngine(engine, BatchConfig(100)).run(made)}

    def launched(self, kv, job):
        launches.append(job)
        with busy(is_warm=len(launches) > WARM_UPS * len(made)):
            launch(self, kv, job)

    expected = answers()
    monkeypatch.setattr(BatchRun, "_launch_into", launched)
    for _ in range(WARM_UPS + 1):
        assert answers() == expected
    assert len(launches) == (WARM_UPS + 1) * len(made)
    blend.kv_store.close()
