"""What only a CUDA device runs: graph replay, masks of pieces, the whole engine. Run with `pytest -m gpu`."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from ragkit.generation.decode_runner import DecodeRunner
from ragkit.generation.full_prefill import FullPrefill
from ragkit.generation.rotary_cache import RotaryCache
from ragkit.generation.sampling import SamplingConfig
from ragkit.generation.steps import Finished
from ragkit.kvcache.pool import KVPool
from ragkit.kvcache.request_kv import RequestKV
from ragkit.types import Prompt, Segment

from .conftest import decoder_of, hf_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")]
TOKENS = torch.randint(3, 300, (200,), generator=torch.Generator().manual_seed(2))
FAMILIES = {"llama": {}, "qwen3": {"head_dim": 32}, "qwen2": {}}
LIMIT = 2e-3  # of fp32 logits that are about 10 in size; CPU and GPU sum in different orders


@pytest.fixture(params=FAMILIES)
def decoder(request):
    torch.backends.cuda.matmul.allow_tf32 = False
    return decoder_of(hf_model(request.param, **FAMILIES[request.param]).cuda())


@torch.inference_mode()
def _prefill(decoder, pool, tokens, piece_tokens=65_536):
    kv = RequestKV(pool)
    rotary = RotaryCache(decoder).table(256, len(tokens))
    return FullPrefill(piece_tokens).extend(decoder, kv, rotary, tokens.cuda()), kv


def _cpu_logits(family, tokens):
    with torch.inference_mode():
        return hf_model(family, **FAMILIES[family])(tokens.unsqueeze(0)).logits[0]


def test_prefill_gives_the_logits_of_transformers(decoder):
    got, _ = _prefill(decoder, KVPool(decoder.layout, 20, decoder.device), TOKENS)
    assert float((got.cpu() - _cpu_logits(decoder.config.family, TOKENS)[-1]).abs().max()) < LIMIT


def test_pieces_give_the_logits_of_one_piece(decoder):
    pool = KVPool(decoder.layout, 20, decoder.device)
    whole, _ = _prefill(decoder, pool, TOKENS)
    pieced, _ = _prefill(decoder, pool, TOKENS, piece_tokens=67)
    torch.testing.assert_close(pieced, whole, rtol=0, atol=LIMIT)


@torch.inference_mode()
def test_graph_steps_of_changing_batches_give_the_logits_of_a_prefill(decoder):
    pool = KVPool(decoder.layout, 40, decoder.device)
    runner, rotary = DecodeRunner(decoder, pool), RotaryCache(decoder).table(256, 200)
    expected = _cpu_logits(decoder.config.family, TOKENS)
    states, done = [], []
    for length in (100, 3, 64, 127):
        kv = RequestKV(pool)
        FullPrefill().extend(decoder, kv, rotary, TOKENS[:length].cuda())
        kv.reserve(length + 40)
        states.append(runner.begin(kv, rotary))
        done.append(length)
    batches = [[0], [0, 1, 2, 3], [3, 1], [2], [1, 0, 2], [0, 1, 2, 3], [3]] * 4
    for batch in batches:
        logits = runner.step([states[i] for i in batch], [int(TOKENS[done[i]]) for i in batch])
        for row, index in enumerate(batch):
            assert float((logits[row].cpu() - expected[done[index]]).abs().max()) < LIMIT
            done[index] += 1


@torch.inference_mode()
def test_steps_without_waiting_for_each_other_keep_their_inputs(decoder):
    pool = KVPool(decoder.layout, 20, decoder.device)
    runner, rotary = DecodeRunner(decoder, pool), RotaryCache(decoder).table(256, 200)
    _, kv = _prefill(decoder, pool, TOKENS[:50])
    kv.reserve(150)
    state = runner.begin(kv, rotary)
    for token in TOKENS[50:150].tolist():
        last = runner.step([state], [token])[0]
    expected = _cpu_logits(decoder.config.family, TOKENS[:150])[-1]
    assert float((last.cpu() - expected).abs().max()) < LIMIT


def test_the_engine_gives_the_tokens_of_transformers(tiny_folder):
    from ragkit.generation.engine import Engine

    engine = Engine.load(tiny_folder, device="cuda", dtype="float32")
    prompt = Prompt((Segment((1, 40, 50)), Segment((60, 70, 80), "chunk"), Segment((90,))))
    model = hf_model("llama")
    expected = model.generate(
        torch.tensor([prompt.token_ids]), max_new_tokens=40, do_sample=False, pad_token_id=0, eos_token_id=None
    )[0, len(prompt) :].tolist()
    for _ in range(2):
        *_, finished = engine.generate(prompt, SamplingConfig(max_new_tokens=40, ignore_stop_tokens=True))
        assert isinstance(finished, Finished)
        assert list(finished.token_ids) == expected
    sampling = SamplingConfig(max_new_tokens=20, temperature=1.0, seed=7)
    drawn = [list(engine.generate(prompt, sampling))[-1].token_ids for _ in range(2)]
    assert drawn[0] == drawn[1]
    assert engine.pool.num_free == engine.pool.num_blocks - 1  # the runner keeps one


@torch.inference_mode()
def test_a_graph_is_captured_while_another_thread_waits_for_the_device(decoder):
    pool = KVPool(decoder.layout, 20, decoder.device)
    runner, rotary = DecodeRunner(decoder, pool), RotaryCache(decoder).table(256, 200)
    expected = _cpu_logits(decoder.config.family, TOKENS)
    _, kv = _prefill(decoder, pool, TOKENS[:50])
    kv.reserve(60)
    stop = threading.Event()

    def wait_for_the_device():
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            while not stop.is_set():
                torch.ones(1000, device="cuda").sum().item()

    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(wait_for_the_device)
        try:
            logits = runner.step([runner.begin(kv, rotary)], [int(TOKENS[50])])[0].cpu()
        finally:
            stop.set()
        waiting.result()
    assert float((logits - expected[50]).abs().max()) < LIMIT
