import pytest
import torch

from ragkit.errors import CacheCapacityError, ConfigError
from ragkit.generation.contiguous_decode import ContiguousDecodeRunner
from ragkit.generation.decode_runner import DecodeRunner
from ragkit.generation.full_prefill import FullPrefill
from ragkit.generation.strategy import PrefillRequest
from ragkit.kvcache.pool import KVPool
from ragkit.kvcache.request_kv import RequestKV
from ragkit.kvcache.rope import RotaryTable
from ragkit.types import Prompt, Segment

from .conftest import decoder_of, hf_model

FAMILIES = {
    "llama": {},
    "qwen3": {"head_dim": 16},
    "qwen2": {"rope_parameters": {
        "rope_theta": 1e4, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64,
    }},
}  # fmt: skip
TOKENS = torch.randint(3, 300, (200,), generator=torch.Generator().manual_seed(2))


@pytest.fixture(params=FAMILIES)
def decoder(request):
    return decoder_of(hf_model(request.param, **FAMILIES[request.param]))


def _fresh(decoder, blocks=12):
    kv = RequestKV(KVPool(decoder.layout, blocks, decoder.device))
    return kv, RotaryTable.build(decoder.config.rope, decoder.config.head_dim, 256, decoder.device)


@torch.inference_mode()
def _prefill(decoder, tokens, piece_tokens=65_536):
    kv, rotary = _fresh(decoder)
    return FullPrefill(piece_tokens).extend(decoder, kv, rotary, tokens), kv, rotary


def test_pieces_give_the_logits_and_rows_of_one_piece(decoder):
    whole, one, _ = _prefill(decoder, TOKENS)
    pieced, many, _ = _prefill(decoder, TOKENS, piece_tokens=67)
    torch.testing.assert_close(pieced, whole, rtol=0, atol=2e-4)
    slots = one.slots(0, 200)
    for layer in range(3):
        for mine, other in zip(one.pool.rows(layer, slots), many.pool.rows(layer, many.slots(0, 200)), strict=True):
            torch.testing.assert_close(mine, other, rtol=0, atol=2e-4)


def test_the_pool_holds_keys_before_rotation(decoder):
    _, kv, _ = _prefill(decoder, torch.tensor([7, 7, 7]))
    keys = kv.pool.rows(0, kv.slots(0, 3))[0]
    torch.testing.assert_close(keys[0], keys[2])


def test_the_result_counts_every_token_as_computed(decoder):
    kv, rotary = _fresh(decoder)
    prompt = Prompt((Segment((5, 6)), Segment((7,), "chunk")))
    with torch.inference_mode():
        result = FullPrefill().prefill(decoder, PrefillRequest(prompt, kv, rotary))
    assert (result.reused, result.recomputed, kv.num_tokens) == (0, 3, 3)


def test_a_prompt_larger_than_the_pool_is_refused_before_anything_is_computed(decoder):
    kv, rotary = _fresh(decoder, blocks=2)
    with pytest.raises(CacheCapacityError, match="asked for 4 KV blocks"):
        FullPrefill().extend(decoder, kv, rotary, TOKENS)
    assert kv.num_tokens == 0


@pytest.mark.parametrize("runner_type", ["contiguous", "paged"])
@torch.inference_mode()
def test_decoding_gives_the_logits_of_a_full_prefill_at_every_step(decoder, runner_type):
    _, kv, rotary = _prefill(decoder, TOKENS[:60])
    kv.reserve(80)
    runner = ContiguousDecodeRunner(decoder) if runner_type == "contiguous" else DecodeRunner(decoder, kv.pool)
    state = runner.begin(kv, rotary)
    for position in range(60, 80):
        got = runner.step([state], [int(TOKENS[position])])[0]
        expected, *_ = _prefill(decoder, TOKENS[: position + 1])
        torch.testing.assert_close(got, expected, rtol=0, atol=2e-4)
    assert kv.num_tokens == 80


@pytest.mark.parametrize("runner_type", ["contiguous", "paged"])
@torch.inference_mode()
def test_requests_of_one_batch_do_not_touch_each_other(decoder, runner_type):
    pool = KVPool(decoder.layout, 12, decoder.device)
    rotary = RotaryTable.build(decoder.config.rope, decoder.config.head_dim, 256, decoder.device)
    runner = ContiguousDecodeRunner(decoder) if runner_type == "contiguous" else DecodeRunner(decoder, pool)
    states, lengths = [], (100, 3, 64)
    for length in lengths:
        kv = RequestKV(pool)
        FullPrefill().extend(decoder, kv, rotary, TOKENS[:length])
        kv.reserve(length + 2)
        states.append(runner.begin(kv, rotary))
    for extra in range(2):
        tokens = [int(TOKENS[length + extra]) for length in lengths]
        got = runner.step(states, tokens).clone()
        for index, length in enumerate(lengths):
            expected, *_ = _prefill(decoder, TOKENS[: length + extra + 1])
            torch.testing.assert_close(got[index], expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("runner_type", ["contiguous", "paged"])
@torch.inference_mode()
def test_a_chunk_computed_elsewhere_serves_at_another_position_and_can_be_replaced(decoder, runner_type):
    """Shared blocks of a chunk, all of their rows recomputed in place: the logits are those of a full prefill."""
    pool = KVPool(decoder.layout, 20, decoder.device)
    rotary = RotaryTable.build(decoder.config.rope, decoder.config.head_dim, 256, decoder.device)
    exact = RequestKV(pool)
    FullPrefill().extend(decoder, exact, rotary, TOKENS[:150])
    chunk = RequestKV(pool)  # rows 0 to 70 as another request holds them, but spoiled in 20 places
    FullPrefill().extend(decoder, chunk, rotary, TOKENS[:70])
    for layer in range(3):
        pool.keys[layer].flatten(0, 1)[chunk.slots(10, 30)] += 1
    kv = RequestKV(pool)
    kv.append_shared(chunk.block_ids, 70)
    slots = kv.replace(torch.arange(10, 30))
    kv.reserve(151)
    for layer in range(3):
        for mine, theirs in ((pool.keys[layer], 0), (pool.values[layer], 1)):
            mine.flatten(0, 1)[slots] = pool.rows(layer, exact.slots(10, 30))[theirs]
            mine.flatten(0, 1)[kv.slots(70, 150)] = pool.rows(layer, exact.slots(70, 150))[theirs]
    kv.num_tokens = 150
    runner = ContiguousDecodeRunner(decoder) if runner_type == "contiguous" else DecodeRunner(decoder, pool)
    got = runner.step([runner.begin(kv, rotary)], [int(TOKENS[150])])[0]
    expected, *_ = _prefill(decoder, TOKENS[:151])
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-4)


@torch.inference_mode()
def test_a_step_without_a_reserved_row_is_refused(decoder):
    from ragkit.errors import KVCacheError

    _, kv, rotary = _prefill(decoder, TOKENS[:64])
    runner = ContiguousDecodeRunner(decoder)
    with pytest.raises(KVCacheError, match="no private row is reserved for position 64"):
        runner.step([runner.begin(kv, rotary)], [5])


def test_pieces_of_no_tokens_are_refused():
    with pytest.raises(ConfigError, match="piece_tokens"):
        FullPrefill(0)


@torch.inference_mode()
def test_in_the_last_layer_only_the_last_token_goes_on_behind_attention(decoder, monkeypatch):
    completed = []
    complete = decoder.complete
    monkeypatch.setattr(
        decoder, "complete", lambda layer, attended, residual: completed.append(len(attended))
        or complete(layer, attended, residual)
    )  # fmt: skip
    _prefill(decoder, TOKENS)
    assert completed == [200, 200, 1]
