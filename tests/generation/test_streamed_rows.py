import gc
import random
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from ragkit.generation import private_rows, question_pass
from ragkit.generation.blend_prefill import BlendOptions, BlendPrefill
from ragkit.generation.chunk_prefill import ChunkPrefill
from ragkit.generation.full_prefill import FullPrefill
from ragkit.generation.reused_rows import BlendLayout, ReusedRows
from ragkit.generation.rotary_cache import RotaryCache
from ragkit.generation.step_clock import StepClock
from ragkit.generation.strategy import PrefillRequest
from ragkit.generation.streamed_rows import StreamedChunks
from ragkit.kvcache.codecs import make_codec
from ragkit.kvcache.copy_queue import CopyQueue
from ragkit.kvcache.encoded_rows import EncodedRows
from ragkit.kvcache.eviction import make_policy
from ragkit.kvcache.kv_key import KVRecipe
from ragkit.kvcache.kv_store import KVStore
from ragkit.kvcache.memory_tier import MemoryTier
from ragkit.kvcache.pool import KVPool
from ragkit.kvcache.pool_tier import PinnedBlocks, PoolTier
from ragkit.kvcache.request_kv import RequestKV
from ragkit.kvcache.selectors_question import TwoRounds
from ragkit.kvcache.selectors_static import FirstTokens
from ragkit.types import Prompt, Segment

from .conftest import decoder_of, hf_model

CODECS = ["fp32", "bf16", "int8", "int4", "int4+bf16", "int4+int8", "entropy2"]


def _ids(seed, count):
    return tuple(torch.randint(3, 300, (count,), generator=torch.Generator().manual_seed(seed)).tolist())


PREFIX, ENDING = _ids(0, 12), _ids(1, 9)
CHUNKS = [Segment(_ids(seed, count), f"chunk-{seed}") for seed, count in ((2, 40), (3, 33), (4, 57))]
PROMPT = Prompt((Segment(PREFIX), *CHUNKS, Segment(ENDING)))
LAYOUT = BlendLayout(PROMPT)


DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"


@pytest.fixture(scope="module")
def decoder():
    torch.backends.cuda.matmul.allow_tf32 = False
    return decoder_of(hf_model("llama", head_dim=16, num_hidden_layers=5).to(DEVICE))


class Bench:
    """One model with a chunk store, whose pool keeps chunks as well."""

    def __init__(self, decoder, codec, blocks=24, options=None, budget_bytes=None):
        self.decoder = decoder
        self.rotary = RotaryCache(decoder)
        self.pool = KVPool(decoder.layout, 64, decoder.device, 16)
        self.tier = PoolTier(self.pool, blocks, make_policy("lru"), budget_bytes=budget_bytes)
        self.codec = make_codec(codec, decoder.layout)
        recipe = KVRecipe("0" * 64, decoder.config, "tokens", decoder.dtype, self.codec.codec_id)
        self.chunks = ChunkPrefill(decoder, self.rotary, recipe, PREFIX)
        memory = MemoryTier("ram", 1 << 24, make_policy("lru"), page_locked=ON_GPU)
        self.store = KVStore(self.codec, memory, pool=self.tier)
        self.blend = BlendPrefill(self.store, self.chunks, options or BlendOptions(ratio=0.3))

    def fetch(self):
        refs = [self.chunks.ref(segment) for segment in LAYOUT.chunks]
        return self.store.fetch(refs, self.chunks.compute)

    @torch.inference_mode()
    def run(self, strategy=None, prompt=PROMPT):
        with RequestKV(self.pool) as kv:
            request = PrefillRequest(prompt, kv, self.rotary.table(256, len(prompt)))
            result = (strategy or self.blend).prefill(self.decoder, request)
            slots = kv.slots(0, len(prompt)).to(DEVICE)
            return result, torch.stack([torch.stack(self.pool.rows(layer, slots)) for layer in range(5)])


def _same(source, expected):
    rows = slice(0, LAYOUT.stop)
    for layer in range(5):
        for mine, theirs in zip(source.layer(layer), expected.layer(layer), strict=True):
            # A GPU multiplies and adds in one step, the codecs' definitions on the host in two.
            torch.testing.assert_close(mine[rows], theirs[rows], rtol=0, atol=1e-4 if ON_GPU else 0)


@pytest.mark.parametrize("codec", CODECS)
@torch.inference_mode()
def test_streamed_rows_are_those_decoded_chunk_by_chunk_in_any_order_of_layers(decoder, codec):
    bench = Bench(decoder, codec)
    prefix = bench.chunks.prefix_kv(PREFIX)
    with bench.fetch() as fetched:
        expected = ReusedRows.gather(decoder, LAYOUT, prefix, fetched.chunks, bench.codec)
        streamed = StreamedChunks(decoder, LAYOUT, prefix, fetched.chunks, bench.codec)
        rows = streamed.rows()
        _same(rows.draft, expected.draft)
        _same(rows, expected)
        first = rows.layer(0)[1][: LAYOUT.stop]
        torch.testing.assert_close(first, expected.layers[0][1][: LAYOUT.stop], rtol=0, atol=1e-4 if ON_GPU else 0)
    assert (rows.draft is rows) == ("+" not in codec)


@pytest.mark.parametrize("codec", CODECS)
def test_every_place_that_a_chunk_is_found_in_gives_the_same_answer(decoder, codec):
    bench = Bench(decoder, codec, options=BlendOptions(ratio=0.3, selector=TwoRounds()))
    computed, first = bench.run()
    hosted, second = bench.run()
    hosted.afterwards()
    pooled, third = bench.run()
    assert [result.kv.misses for result, _ in ((computed, 0), (hosted, 0), (pooled, 0))] == [3, 0, 0]
    assert set(hosted.kv.bytes_by_tier) == {"ram"}
    assert set(pooled.kv.bytes_by_tier) == {"gpu"}
    assert pooled.afterwards is None
    for result, rows in ((hosted, second), (pooled, third)):
        assert torch.equal(result.logits, computed.logits)
        assert torch.equal(rows, first)


@pytest.mark.parametrize("codec", ["bf16", "int4+bf16", "entropy2"])
def test_chunks_from_the_pool_and_from_the_host_stand_beside_each_other(decoder, codec):
    bench = Bench(decoder, codec, blocks=3)  # of 16 tokens: only the 33 and 40 tokens fit, one of them at a time
    computed, first = bench.run()
    bench.run()[0].afterwards()
    with bench.fetch() as fetched:
        assert [isinstance(chunk, PinnedBlocks) for chunk in fetched.chunks] == [True, False, False]
    mixed, rows = bench.run()
    assert torch.equal(mixed.logits, computed.logits)
    assert torch.equal(rows, first)
    twice = Prompt((PROMPT.segments[0], CHUNKS[1], CHUNKS[0], CHUNKS[0], CHUNKS[1], PROMPT.segments[-1]))
    plain = Bench(decoder, codec, blocks=0)
    assert torch.equal(bench.run(prompt=twice)[0].logits, plain.run(prompt=twice)[0].logits)


def test_with_every_token_chosen_chunks_from_the_pool_give_full_prefill(decoder):
    bench = Bench(decoder, "int4+bf16", options=BlendOptions(ratio=1.0))
    bench.run()[0].afterwards()
    full, rows = bench.run(FullPrefill())
    result, blended = bench.run()
    torch.testing.assert_close(result.logits, full.logits, rtol=0, atol=2e-3)
    torch.testing.assert_close(blended, rows, rtol=0, atol=2e-3)


@pytest.mark.parametrize("ending", [9, 10])
def test_no_length_of_a_prompt_has_kernels_compiled_for_its_addresses(decoder, monkeypatch, ending):
    addresses = []

    def watched(function):
        def watching(*tensors, **others):
            addresses.extend(tensor.data_ptr() for tensor in tensors if isinstance(tensor, torch.Tensor))
            return function(*tensors, **others)

        return watching

    for module, name in ((question_pass, "rope_write_kv"), (private_rows, "selected_attention")):
        monkeypatch.setattr(module, name, watched(getattr(module, name)))
    bench = Bench(decoder, "bf16")
    prompt = Prompt((Segment(_ids(0, 13)), *CHUNKS, Segment(_ids(1, ending))))
    bench.run(prompt=prompt)[0].afterwards()
    addresses.clear()
    assert set(bench.run(prompt=prompt)[0].kv.bytes_by_tier) == {"gpu"}
    assert addresses
    assert not [address for address in addresses if address % 16]


def test_keeping_chunks_lets_go_of_the_bytes_and_happens_once(decoder):
    bench = Bench(decoder, "int4+bf16")
    with torch.inference_mode():
        prefix = bench.chunks.prefix_kv(PREFIX)
        with bench.fetch() as fetched:
            streamed = StreamedChunks(decoder, LAYOUT, prefix, fetched.chunks, bench.codec)
            del fetched
        gc.collect()
        streamed.keep(bench.tier)
        assert len(bench.tier.refs()) == 3
        bench.tier.discard([ref.key for ref in bench.tier.refs()])
        streamed.keep(bench.tier)
    assert bench.tier.refs() == []
    assert not streamed.came_from_host


def test_a_request_reserves_its_rows_although_chunks_fill_the_pool(decoder):
    bench = Bench(decoder, "bf16", blocks=64)
    for seed in range(40):
        chunk = Segment(_ids(seed + 10, 32), f"other-{seed}")
        ref = bench.chunks.ref(chunk)
        bench.tier.add(bench.chunks.compute([ref])[0], ref).release()
    assert bench.pool.num_free == 0
    result, _ = bench.run()
    assert result.kv.misses == 3


def test_steps_are_timed_one_after_the_other():
    clock = StepClock(torch.device("cpu"))
    for name in ("load_kv", "select"):
        clock.lap(name)
    timings = clock.finish()
    assert list(timings) == ["load_kv", "select", "overlapped"]
    assert all(0 <= spent < 1000 for spent in timings.values())
    assert timings["overlapped"] == 0


def test_a_selector_that_scores_nothing_has_the_chunks_themselves_brought_next(decoder, monkeypatch):
    bench = Bench(decoder, "int4+bf16", options=BlendOptions(ratio=0.3, selector=FirstTokens()))
    postponed = []
    monkeypatch.setattr(CopyQueue, "postpone", lambda queue, numbers: postponed.append(list(numbers)))
    computed, _ = bench.run()
    hosted, _ = bench.run()
    assert postponed
    assert torch.equal(hosted.logits, computed.logits)


def test_copies_that_keeping_begins_have_arrived_before_their_bytes_are_let_go(decoder, monkeypatch):
    bench = Bench(decoder, "int4+bf16")
    seen = []
    finish = CopyQueue.finish

    def noting(queue):
        seen.append((len(bench.tier.refs()), data() is not None))
        finish(queue)

    monkeypatch.setattr(CopyQueue, "finish", noting)
    with torch.inference_mode():
        with bench.fetch() as fetched:
            streamed = StreamedChunks(decoder, LAYOUT, bench.chunks.prefix_kv(PREFIX), fetched.chunks, bench.codec)
            bench.store.memory.discard([ref.key for ref in bench.store.memory.refs()])
            data = weakref.ref(fetched.chunks[0].data)
            del fetched
        streamed.keep(bench.tier)
    assert seen == [(3, True)]
    gc.collect()
    assert data() is None


def test_drafts_are_kept_within_the_budget_of_their_tier(decoder):
    sizes = {}
    for codec in ("bf16", "int4+bf16"):
        bench = Bench(decoder, codec)
        bench.run()[0].afterwards()
        sizes[codec] = bench.tier.bytes_used
    assert sizes["int4+bf16"] > 1.1 * sizes["bf16"]
    bench = Bench(decoder, "int4+bf16", budget_bytes=sizes["int4+bf16"] - 1)
    bench.run()[0].afterwards()
    assert len(bench.tier.refs()) == 2
    assert bench.tier.bytes_used < sizes["int4+bf16"]
    roomy = Bench(decoder, "int4+bf16", budget_bytes=sizes["int4+bf16"])
    roomy.run()[0].afterwards()
    assert len(roomy.tier.refs()) == 3


def test_a_gpu_without_memory_for_drafts_leaves_the_chunks_where_they_are(decoder, monkeypatch, caplog):
    bench = Bench(decoder, "int4+bf16")
    first, _ = bench.run()

    def no_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(EncodedRows, "bytes_of", no_memory)
    first.afterwards()
    assert "3 chunks are not kept in the tier gpu" in caplog.text
    assert bench.pool.num_free == 64
    again, _ = bench.run()
    assert again.kv.bytes_by_tier.keys() == {"ram"}


def test_a_hundred_requests_at_once_over_a_pool_with_little_room_get_the_answers_they_get_alone(decoder):
    chance = random.Random(3)
    chunks = [Segment(_ids(50 + number, 6 + 7 * number % 40), f"one-{number}") for number in range(12)]
    prompts = [Prompt((Segment(PREFIX), *chance.choices(chunks, k=3), Segment(ENDING))) for _ in range(14)]
    alone = Bench(decoder, "int4+bf16", blocks=0)
    expected = [alone.run(prompt=prompt) for prompt in prompts]
    bench = Bench(decoder, "int4+bf16")
    bench.store.memory.budget_bytes = 60_000  # some of the chunks

    def ask(number):
        result, rows = bench.run(prompt=prompts[number % 14])
        if result.afterwards is not None and number % 5:  # an answer may be broken off
            with torch.inference_mode():
                result.afterwards()
        wanted, wanted_rows = expected[number % 14]
        torch.testing.assert_close(result.logits, wanted.logits, rtol=0, atol=1e-4 if ON_GPU else 0)
        torch.testing.assert_close(rows, wanted_rows, rtol=0, atol=1e-4 if ON_GPU else 0)
        return True

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(ask, range(100)))
    assert bench.store.stats.hits["gpu"] > 0
    assert bench.store.memory.evictions > 0
    assert bench.store._in_flight == {}
    bench.store.close()
    assert bench.pool.num_free == 64
