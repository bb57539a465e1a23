"""Blending with shared rows: the chunks stay in the pool's blocks, and their change is a field beside them."""

import logging
import re
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from types import SimpleNamespace

import pytest
import torch

from ragkit.config import BlendRows
from ragkit.errors import CacheCapacityError
from ragkit.generation.blend_pass import BlendInputs, Propagation
from ragkit.generation.blend_prefill import BlendOptions, BlendPrefill, BlendScene
from ragkit.generation.chunk_prefill import ChunkPrefill
from ragkit.generation.contiguous_decode import ContiguousDecodeRunner
from ragkit.generation.decode_runner import DecodeRunner
from ragkit.generation.full_prefill import FullPrefill
from ragkit.generation.prefix_rows import write_prefix
from ragkit.generation.reused_rows import BlendLayout, ReusedRows
from ragkit.generation.rotary_cache import RotaryCache
from ragkit.generation.shared_rows import SharedRows, shared_slots
from ragkit.generation.strategy import PrefillRequest
from ragkit.kernels.paged_rows import FIELD_ROWS
from ragkit.kernels.propagation_plan import ChunkTiles
from ragkit.kvcache.change_strength import ChangeStrength
from ragkit.kvcache.codecs import make_codec
from ragkit.kvcache.eviction import make_policy
from ragkit.kvcache.kv_key import KVRecipe
from ragkit.kvcache.kv_store import KVStore
from ragkit.kvcache.memory_tier import MemoryTier
from ragkit.kvcache.pool import KVPool
from ragkit.kvcache.pool_tier import PoolTier
from ragkit.kvcache.request_kv import RequestKV, pack_rows
from ragkit.kvcache.selectors_cache_craft import CacheCraft
from ragkit.kvcache.selectors_deviation import DeviationAtOneLayer, DeviationOf, GradualFiltering
from ragkit.kvcache.selectors_question import QuestionAttention, TwoRounds
from ragkit.kvcache.selectors_static import Everything, FirstTokens, NoTokens, RandomTokens
from ragkit.kvcache.token_selection import LayerRange
from ragkit.types import Prompt, Segment

from .conftest import decoder_of, hf_model

FAMILIES = {
    "llama": {},
    "qwen3": {"head_dim": 16},
    "qwen2": {"rope_parameters": {
        "rope_theta": 1e4, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64,
    }},
}  # fmt: skip
# Where there is a GPU the same tests run there, through the kernels.
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
CHOOSE_ONLY = Propagation(key_strength=0.0, value_strength=0.0)
SELECTORS = {
    "question": QuestionAttention(),
    "two rounds": TwoRounds(),
    "first": FirstTokens(),
    "random": RandomTokens(),
    "values": DeviationAtOneLayer(DeviationOf.VALUES),
    "gradual": GradualFiltering(3, layers=2),
    "cache-craft": CacheCraft(),
}
BLOCK_SIZE = 16
LENGTHS = (40, 33, 57)


def _ids(seed, count):
    return tuple(torch.randint(3, 300, (count,), generator=torch.Generator().manual_seed(seed)).tolist())


PREFIX, ENDING = _ids(0, 12), _ids(1, 9)
CHUNKS = [Segment(_ids(seed, count), f"chunk-{seed}") for seed, count in enumerate(LENGTHS, 2)]
PROMPT = Prompt((Segment(PREFIX), *CHUNKS, Segment(ENDING)))
STOP = len(PROMPT) - len(ENDING)


@pytest.fixture(scope="module", autouse=True)
def exact_products():
    """Products of fp32 in fp32, on a GPU as well."""
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.fixture(scope="module", params=FAMILIES)
def decoder(request):
    return decoder_of(hf_model(request.param, **FAMILIES[request.param]).to(DEVICE))


@pytest.fixture(scope="module")
def llama():
    return decoder_of(hf_model("llama").to(DEVICE))


class Bench:
    """One model with a chunk store, whose pool keeps chunks."""

    def __init__(self, decoder, codec="fp32", blocks=64, tier_blocks=16, block_size=BLOCK_SIZE):
        self.decoder = decoder
        self.rotary = RotaryCache(decoder)
        self.pool = KVPool(decoder.layout, blocks, decoder.device, block_size)
        for layer in (*self.pool.keys, *self.pool.values):
            layer.fill_(torch.nan)  # rows that nobody wrote poison whoever reads them
        self.tier = PoolTier(self.pool, tier_blocks, make_policy("lru"))
        made = make_codec(codec, decoder.layout)
        recipe = KVRecipe("0" * 64, decoder.config, "tokens", decoder.dtype, made.codec_id)
        self.chunks = ChunkPrefill(decoder, self.rotary, recipe, PREFIX)
        memory = MemoryTier("ram", 1 << 24, make_policy("lru"), page_locked=ON_GPU)
        self.store = KVStore(made, memory, pool=self.tier if tier_blocks else None)

    def blend(self, rows=BlendRows.SHARED, **options):
        return BlendPrefill(self.store, self.chunks, BlendOptions(rows=rows, **options))

    @torch.inference_mode()
    def begin(self, strategy, prompt=PROMPT):
        """Return the result, and the request, which the caller releases."""
        kv = RequestKV(self.pool)
        request = PrefillRequest(prompt, kv, self.rotary.table(256, len(prompt)))
        return strategy.prefill(self.decoder, request), kv

    @torch.inference_mode()
    def run(self, strategy, prompt=PROMPT):
        """Return the result and the rows of all positions as attention sees them, layer by layer."""
        result, kv = self.begin(strategy, prompt)
        with kv:
            assert kv.num_tokens == len(prompt)
            packed = pack_rows([kv])
            assert packed.positions.tolist() == list(range(len(prompt)))
            packed = packed.to(self.pool.device)
            return result, [kv.rows(layer, packed) for layer in range(3)]

    @torch.inference_mode()
    def decode(self, strategy, runner, steps=6, prompt=PROMPT):
        """Return greedy tokens and the logits of every step."""
        result, kv = self.begin(strategy, prompt)
        with kv:
            kv.reserve(len(prompt) + steps)
            state = runner.begin(kv, self.rotary.table(256, len(prompt)))
            logits, tokens = [result.logits], [int(result.logits.argmax())]
            for _ in range(steps):
                logits.append(runner.step([state], tokens[-1:])[0].clone())
                tokens.append(int(logits[-1].argmax()))
            return tokens, torch.stack(logits)


def _close(mine, theirs, atol):
    for one, other in zip(mine, theirs, strict=True):
        for part, expected in zip(one, other, strict=True):
            torch.testing.assert_close(part, expected, rtol=0, atol=atol)


def _averaged(moved, cached, chosen):
    """Rows (positions, heads, head_dim) with the change of those not chosen averaged over the cells of their chunk."""
    out, start = moved.clone(), len(PREFIX)
    for length in LENGTHS:
        for first in range(start, start + length, FIELD_ROWS):
            cell = [row for row in range(first, min(first + FIELD_ROWS, start + length)) if row not in chosen]
            if cell:
                out[cell] = cached[cell] + (moved[cell] - cached[cell]).mean(0)
        start += length
    return out


def _smoothing(chosen, propagation):
    """The weights (positions before the ending, chosen) of the change of each chosen token, and its strengths."""
    cuts = (0, *accumulate((len(PREFIX), *LENGTHS)))
    of_chunks = torch.searchsorted(chosen, torch.tensor(cuts, device=DEVICE)).tolist()
    weights = torch.zeros(STOP, len(chosen), device=DEVICE)
    plan = ChunkTiles(cuts, propagation.sigma, DEVICE).plan(chosen)
    for block in plan.blocks:
        weights[block.rows, block.entries] = block.weights
    return weights, ChangeStrength(chosen, of_chunks, propagation.sigma, plan.stands_for)


def _twin(bench, rows, chosen, propagation, dropping=(None, ())):
    """The private blend whose change is averaged over cells, as loops with dense masks. Returns logits and rows.

    `dropping` names a layer, and tokens that are computed up to it only.
    """
    decoder, table = bench.decoder, bench.rotary.table(256, len(PROMPT))
    ids, positions = torch.tensor(PROMPT.token_ids, device=DEVICE), torch.arange(len(PROMPT), device=DEVICE)
    active = torch.cat((chosen, positions[STOP:]))
    activations, out = decoder.embed(ids[active]), []
    for layer in range(3):
        queries, keys, values, residual = decoder.project(layer, activations)
        weights, strength = _smoothing(chosen, propagation)
        blended = []
        for old, fresh, full in zip(
            rows.layers[layer], (keys, values), (propagation.key_strength, propagation.value_strength), strict=True
        ):
            change = fresh[: len(chosen)] - old[chosen]
            part = full * (strength.of(change)[:, None] if propagation.by_evidence else 1.0)
            new = old.clone()
            if layer:
                new[:STOP] += torch.einsum("tj,jhd->thd", weights, change) * part
            new = _averaged(new, old, chosen.tolist())
            new[active] = fresh
            blended.append(new)
        out.append(tuple(blended))
        group = queries.shape[1] // keys.shape[1]
        turned = table.rotate(blended[0], positions).repeat_interleave(group, 1)
        scores = torch.einsum("qhd,khd->hqk", table.rotate(queries, active), turned) * decoder.scale
        scores = scores.masked_fill(positions > active[:, None], -torch.inf)
        attended = torch.einsum("hqk,khd->qhd", scores.softmax(-1), blended[1].repeat_interleave(group, 1))
        if layer == dropping[0]:
            kept = torch.tensor([position not in dropping[1] for position in active.tolist()], device=DEVICE)
            chosen, active = chosen[kept[: len(chosen)]], active[kept]
            attended, residual = attended[kept], residual[kept]
        activations = decoder.complete(layer, attended, residual)
    return decoder.logits(activations.rows(slice(-1, None)))[0], out


@pytest.mark.parametrize("name", SELECTORS)
def test_with_every_token_chosen_logits_and_rows_are_those_of_full_prefill(decoder, name):
    bench = Bench(decoder)
    full, rows = bench.run(FullPrefill())
    result, shared = bench.run(bench.blend(ratio=1.0, selector=SELECTORS[name]))
    torch.testing.assert_close(result.logits, full.logits, rtol=0, atol=1e-3)
    _close(shared, rows, 1e-3)
    assert result.warnings == ()


def test_with_no_token_chosen_it_is_plain_reuse(decoder):
    bench = Bench(decoder)
    options = {"ratio": 0.0, "selector": NoTokens()}
    plain, rows = bench.run(bench.blend(BlendRows.PRIVATE, **options))
    result, shared = bench.run(bench.blend(**options))
    torch.testing.assert_close(result.logits, plain.logits, rtol=0, atol=1e-4)
    _close(shared, rows, 1e-4)
    assert (result.reused, result.recomputed) == (plain.reused, plain.recomputed)


@pytest.mark.parametrize("ratio", [0.05, 0.3, 0.8])
@pytest.mark.parametrize("name", SELECTORS)
def test_without_propagation_shared_rows_are_the_private_ones(llama, name, ratio):
    bench = Bench(llama, "int8")
    options = {"ratio": ratio, "selector": SELECTORS[name], "propagation": CHOOSE_ONLY}
    private, rows = bench.run(bench.blend(BlendRows.PRIVATE, **options))
    result, shared = bench.run(bench.blend(**options))
    torch.testing.assert_close(result.logits, private.logits, rtol=0, atol=2e-4)
    _close(shared, rows, 2e-4)
    assert result.recomputed == private.recomputed


@pytest.mark.parametrize("block_size", [16, 64])
@pytest.mark.parametrize(
    "propagation",
    [Propagation(7.0, 1.0, 0.5), Propagation(2.0, 0.0, 1.0), Propagation(), Propagation(9.0, by_evidence=True)],
    ids=["short", "values", "default", "by evidence"],
)
@torch.inference_mode()
def test_shared_rows_are_their_definition(decoder, propagation, block_size):
    bench = Bench(decoder, block_size=block_size)
    bench.run(bench.blend())  # brings the chunks into the pool
    chosen = torch.tensor([13, 14, 30, 52, 60, 61, 62, 84, *range(101, 117), 141], device=DEVICE)
    with RequestKV(bench.pool) as kv:
        placed = _listed(bench, kv, propagation)
        target = SharedRows(kv, placed.inputs, chosen, propagation)
        logits = placed.scene.blend_pass().run(chosen, target)
        kv.num_tokens = len(PROMPT)
        packed = pack_rows([kv]).to(DEVICE)
        expected, rows = _twin(bench, placed.rows, chosen, propagation)
        torch.testing.assert_close(logits, expected, rtol=0, atol=3e-4)
        _close([kv.rows(layer, packed) for layer in range(3)], rows, 3e-4)


class Dropping(RandomTokens):
    """Leaves some tokens out after a layer."""

    def __init__(self, layer, tokens):
        super().__init__()
        self.layer, self.tokens = layer, tokens

    def narrow(self, scene, layer, chosen, fresh):
        if layer == self.layer:
            return torch.tensor([position not in self.tokens for position in chosen.tolist()], device=chosen.device)
        return None


@pytest.mark.parametrize("propagation", [Propagation(7.0, 1.0, 0.5), CHOOSE_ONLY], ids=["moved", "chosen only"])
@pytest.mark.parametrize("layer", [0, 1])
@torch.inference_mode()
def test_tokens_that_are_not_computed_in_upper_layers_move_there_with_their_cells(decoder, layer, propagation):
    bench = Bench(decoder)
    bench.run(bench.blend())
    chosen = torch.tensor([13, 14, 30, 52, 60, 61, 62, 84, *range(101, 117), 141], device=DEVICE)
    dropped = (14, 60, 62, *range(101, 114), 141)
    with RequestKV(bench.pool) as kv:
        placed = _listed(bench, kv, propagation)
        target = SharedRows(kv, placed.inputs, chosen, propagation)
        logits = placed.scene.blend_pass().run(chosen, target, Dropping(layer, dropped))
        kv.num_tokens = len(PROMPT)
        packed = pack_rows([kv]).to(DEVICE)
        expected, rows = _twin(bench, placed.rows, chosen, propagation, (layer, dropped))
        torch.testing.assert_close(logits, expected, rtol=0, atol=3e-4)
        # What `kv.rows` adds to rows of the table's shared entries is in the private ones already.
        _close([kv.rows(index, packed) for index in range(3)], rows, 3e-4)


def _listed(bench, kv, propagation):
    """The scene of the prompt, whose chunks `kv` lists, and the plain reused rows beside it."""
    layout = BlendLayout(PROMPT)
    refs = [bench.chunks.ref(segment) for segment in CHUNKS]
    prefix = bench.chunks.prefix_kv(PREFIX)
    pins = bench.tier.pin_all(refs)
    kv.append_private(len(PREFIX))
    for pin in pins:
        kv.append_shared(pin.block_ids, pin.num_tokens)
    kv.reserve(len(PROMPT))
    rows = ReusedRows.unwritten(bench.decoder, len(PROMPT))
    slots = shared_slots(kv, len(PROMPT))
    write_prefix(bench.pool, slots[: len(PREFIX)], prefix)
    for layer, pair in enumerate(rows.layers):
        for target, pooled in zip(pair, bench.pool.rows(layer, slots.to(DEVICE)), strict=True):
            target.copy_(pooled)
    bench.tier.release_all(pins)
    request = PrefillRequest(PROMPT, kv, bench.rotary.table(256, len(PROMPT)))
    spans = layout.spans(False)
    inputs = BlendInputs.of(request, spans, propagation.sigma, slots)
    scene = BlendScene(bench.decoder, request.rotary, inputs, rows, spans, 0.3, propagation)
    return SimpleNamespace(scene=scene, inputs=inputs, rows=rows)


@pytest.mark.parametrize("propagation", [Propagation(7.0, 1.0, 0.5), CHOOSE_ONLY], ids=["moved", "chosen only"])
@pytest.mark.parametrize("runner_type", ["contiguous", "paged"])
@torch.inference_mode()
def test_decoding_goes_on_as_behind_private_rows_with_the_averaged_change(decoder, runner_type, propagation):
    bench = Bench(decoder)
    bench.run(bench.blend())
    chosen = torch.tensor([30, 52, 60, 61, 62, 84, 100, 141], device=DEVICE)
    contiguous = ContiguousDecodeRunner(decoder)
    runner = contiguous if runner_type == "contiguous" else DecodeRunner(decoder, bench.pool)
    with RequestKV(bench.pool) as kv, RequestKV(bench.pool) as twin:
        placed = _listed(bench, kv, propagation)
        target = SharedRows(kv, placed.inputs, chosen, propagation)
        logits = placed.scene.blend_pass().run(chosen, target)
        expected, rows = _twin(bench, placed.rows, chosen, propagation)
        twin.reserve(len(PROMPT))
        slots = twin.slots(0, len(PROMPT)).to(DEVICE)
        for layer, pair in enumerate(rows):
            for pool, part in zip((bench.pool.keys[layer], bench.pool.values[layer]), pair, strict=True):
                pool.flatten(0, 1)[slots] = part
        got = _continued(bench, runner, kv, logits)
        wanted = _continued(bench, contiguous, twin, expected)
    assert got[0] == wanted[0]
    torch.testing.assert_close(got[1], wanted[1], rtol=0, atol=1e-3)


def _continued(bench, runner, kv, logits, steps=20):
    """Greedy tokens behind a prompt, and the logits of every step."""
    kv.num_tokens = len(PROMPT)
    kv.reserve(len(PROMPT) + steps)
    state = runner.begin(kv, bench.rotary.table(256, len(PROMPT)))
    every, tokens = [], [int(logits.argmax())]
    for _ in range(steps):
        every.append(runner.step([state], tokens[-1:])[0].clone())
        tokens.append(int(every[-1].argmax()))
    return tokens, torch.stack(every)


@torch.inference_mode()
def test_requests_with_and_without_a_field_decode_together_as_alone(llama):
    bench = Bench(llama, blocks=96)
    strategies = [bench.blend(ratio=0.3), FullPrefill(), bench.blend(ratio=0.1, selector=RandomTokens())]
    alone = [bench.decode(strategy, DecodeRunner(llama, bench.pool)) for strategy in strategies]
    runner = DecodeRunner(llama, bench.pool)
    for order in ([0, 1, 2], [1, 2, 0]):  # where a request with a field was, one without comes next
        begun = [bench.begin(strategies[index]) for index in order]
        for _, kv in begun:
            kv.reserve(len(PROMPT) + 6)
        states = [runner.begin(kv, bench.rotary.table(256, len(PROMPT))) for _, kv in begun]
        tokens = [[int(result.logits.argmax())] for result, _ in begun]
        for step in range(6):
            logits = runner.step(states, [own[-1] for own in tokens])
            for place, own in enumerate(tokens):
                expected = alone[order[place]][1][step + 1]
                torch.testing.assert_close(logits[place], expected, rtol=0, atol=1e-3)
                own.append(int(logits[place].argmax()))
        for _, kv in begun:
            kv.release()
        assert tokens == [alone[index][0] for index in order]


@torch.inference_mode()
def test_ordinary_requests_pay_for_no_field(llama):
    bench = Bench(llama)
    runner = DecodeRunner(llama, bench.pool)
    bench.decode(bench.blend(BlendRows.PRIVATE), runner)
    bench.decode(bench.blend(ratio=0.0), runner)
    bench.decode(bench.blend(propagation=CHOOSE_ONLY), runner)
    assert {key[2] for key in runner._buckets} == {False}
    bench.decode(bench.blend(), runner)
    assert {key[2] for key in runner._buckets} == {False, True}


@torch.inference_mode()
def test_a_request_holds_what_it_recomputes_and_a_sixteenth_of_the_rest(llama):
    bench = Bench(llama)
    bench.run(bench.blend())
    free, block_bytes = bench.pool.num_free, BLOCK_SIZE * bench.pool.layout.bytes_per_token
    result, kv = bench.begin(bench.blend(ratio=0.3))
    chosen = result.recomputed - len(ENDING)
    assert chosen == 39
    # The prefix's block, whose last rows serve four recomputed tokens; the ending's; and those of the other 35.
    private = 1 + 1 + 3
    entries = private + sum(-(-length // BLOCK_SIZE) for length in LENGTHS)
    assert free - bench.pool.num_free == private
    assert len(kv.block_ids) == entries
    assert kv.private_bytes == private * block_bytes + entries * block_bytes // FIELD_ROWS * 2 // 3  # of 3 layers
    _, other = bench.begin(bench.blend(BlendRows.PRIVATE, ratio=0.3))
    assert free - bench.pool.num_free == private + 10
    assert other.private_bytes == 10 * block_bytes
    for request in (kv, other):
        request.release()
    assert bench.pool.num_free == free


@torch.inference_mode()
def test_requests_over_the_same_chunks_share_their_blocks_and_answer_as_alone(llama):
    bench = Bench(llama)
    turned = Prompt((PROMPT.segments[0], CHUNKS[2], CHUNKS[0], Segment(_ids(7, 5))))
    blend = bench.blend(ratio=0.2)
    prompts = (PROMPT, turned, PROMPT)
    alone = [bench.run(blend, prompt) for prompt in prompts]
    free = bench.pool.num_free
    begun = [bench.begin(blend, prompt) for prompt in prompts]
    shared = [set(kv.block_ids) for _, kv in begun]
    pins = bench.tier.pin_all([bench.chunks.ref(one) for one in CHUNKS])
    of_chunks = {block for pin in pins for block in pin.block_ids}
    bench.tier.release_all(pins)
    assert shared[0] & shared[1] < shared[0] & shared[2] == of_chunks
    # Of three requests and the tier, or of two of them and the tier.
    assert {bench.pool.references(block) for block in shared[0] & shared[1]} == {4}
    assert {bench.pool.references(block) for block in of_chunks - shared[1]} == {3}
    for (result, kv), (expected, rows), prompt in zip(begun, alone, prompts, strict=True):
        assert torch.equal(result.logits, expected.logits)
        packed = pack_rows([kv]).to(DEVICE)
        _close([kv.rows(layer, packed) for layer in range(3)], rows, 0)
        assert len(packed.slots) == len(prompt)
    for _, kv in begun:
        kv.release()
    assert bench.pool.num_free == free


@torch.inference_mode()
def test_many_threads_ask_at_once(llama):
    bench = Bench(llama, blocks=128)
    blend = bench.blend(ratio=0.2)
    expected, _ = bench.run(blend)
    free = bench.pool.num_free
    with ThreadPoolExecutor(4) as threads:
        results = list(threads.map(lambda _: bench.run(blend)[0], range(12)))
    assert all(torch.equal(result.logits, expected.logits) for result in results)
    assert all(result.warnings == () for result in results)
    assert bench.pool.num_free == free


@pytest.mark.parametrize("how", ["discarded", "given back", "closed"])
@torch.inference_mode()
def test_a_chunk_that_leaves_the_tier_stays_with_the_request_that_lists_it(llama, how):
    bench = Bench(llama)
    blend = bench.blend(ratio=0.2)
    expected = bench.decode(blend, ContiguousDecodeRunner(llama))
    result, kv = bench.begin(blend)
    if how == "discarded":
        bench.store.discard([bench.chunks.ref(one).key for one in CHUNKS])
    elif how == "given back":
        bench.tier.give_back(bench.pool.num_blocks)
    else:
        bench.tier.close()
    assert bench.tier.refs() == []
    filler = RequestKV(bench.pool)  # writes over every block that is free now
    filler.reserve((bench.pool.num_free - 1) * BLOCK_SIZE)
    slots = filler.slots(0, filler.num_reserved).to(DEVICE)
    for layer in (*bench.pool.keys, *bench.pool.values):
        layer.flatten(0, 1)[slots] = torch.nan
    kv.reserve(len(PROMPT) + 6)
    state = ContiguousDecodeRunner(llama).begin(kv, bench.rotary.table(256, len(PROMPT)))
    tokens = [int(result.logits.argmax())]
    for _ in range(6):
        tokens.append(int(ContiguousDecodeRunner(llama).step([state], tokens[-1:])[0].argmax()))
    assert tokens == expected[0]
    filler.release()
    kv.release()
    assert bench.pool.num_free == bench.pool.num_blocks


@pytest.mark.parametrize("tier_blocks", [0, 5])
def test_without_room_in_the_pool_rows_are_private_and_the_result_says_so(llama, tier_blocks, caplog):
    bench = Bench(llama, tier_blocks=tier_blocks)
    expected, rows = bench.run(bench.blend(BlendRows.PRIVATE))
    blend = bench.blend()
    reason = "2 of 3 chunks found no room in the tier gpu, which keeps 5 blocks" if tier_blocks else "no tier"
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            result, private = bench.run(blend)
            assert torch.equal(result.logits, expected.logits)
            _close(private, rows, 0)
            (warning,) = result.warnings
            assert warning.startswith("rows are private, not shared: ")
            assert reason in warning
    assert sum("rows are private" in record.message for record in caplog.records) == 1
    if tier_blocks:
        bench.tier.give_back(bench.pool.num_blocks)
    assert bench.pool.num_free == bench.pool.num_blocks


@pytest.mark.parametrize(("ratio", "answer"), [(0.9, 0), (0.1, 60)], ids=["recomputed rows", "the answer"])
@torch.inference_mode()
def test_where_the_pool_holds_the_chunks_and_no_rows_beside_them_rows_are_private(llama, ratio, answer):
    expected, rows = Bench(llama).run(Bench(llama).blend(BlendRows.PRIVATE, ratio=ratio))
    bench = Bench(llama, blocks=16)
    with RequestKV(bench.pool) as kv:
        request = PrefillRequest(PROMPT, kv, bench.rotary.table(256, len(PROMPT)), answer_tokens=answer)
        result = bench.blend(ratio=ratio).prefill(llama, request)
        kv.reserve(len(PROMPT) + answer)
        slots = kv.slots(0, len(PROMPT)).to(DEVICE)
        assert kv.field is None
        assert torch.equal(result.logits, expected.logits)
        _close([bench.pool.rows(layer, slots) for layer in range(3)], rows, 0)
    (warning,) = result.warnings
    assert re.search(r"private, not shared: asked for \d KV blocks of 16 tokens, \d of 16 are free", warning)
    bench.tier.give_back(16)
    assert bench.pool.num_free == 16


def test_pooled_chunks_become_private_after_they_were_listed_where_the_field_has_no_memory(llama, monkeypatch):
    def refused(*_):
        raise torch.OutOfMemoryError("no memory for a field")

    bench = Bench(llama)
    lower = QuestionAttention(layers=LayerRange(0, 0.3))  # the shared prefix is written in these layers alone
    bench.run(bench.blend(selector=lower))  # brings the chunks into the pool
    expected, rows = bench.run(bench.blend(BlendRows.PRIVATE, selector=lower))
    monkeypatch.setattr("ragkit.generation.shared_rows.RequestField", refused)
    result, private = bench.run(bench.blend(selector=lower))
    assert set(result.kv.bytes_by_tier) == {"gpu"}
    assert result.warnings == ("rows are private, not shared: no memory for a field",)
    assert torch.equal(result.logits, expected.logits)
    _close(private, rows, 0)


def test_a_request_that_fits_nowhere_leaves_nothing_behind(llama):
    bench = Bench(llama, blocks=9, tier_blocks=9)
    blend = bench.blend(ratio=0.9)
    with RequestKV(bench.pool) as kv, torch.inference_mode():
        request = PrefillRequest(PROMPT, kv, bench.rotary.table(256, len(PROMPT)))
        with pytest.raises(CacheCapacityError):
            blend.prefill(llama, request)
    bench.tier.give_back(9)
    assert bench.pool.num_free == 9


@pytest.mark.parametrize("behind", [(Segment(ENDING),), (), (Segment(()),)], ids=["question", "nothing", "empty"])
@pytest.mark.parametrize("prefix", [PREFIX, (), _ids(9, 16)], ids=["canonical", "none", "other"])
def test_chunks_that_stand_twice_or_are_empty_and_prompts_that_end_with_one(llama, prefix, behind):
    bench = Bench(llama)
    segments = (CHUNKS[1], CHUNKS[0], Segment((), "empty"), CHUNKS[1], CHUNKS[1])
    prompt = Prompt((Segment(prefix), *segments, *behind))
    for options in ({"ratio": 0.3, "propagation": CHOOSE_ONLY}, {"ratio": 1.0, "selector": Everything()}):
        private, rows = bench.run(bench.blend(BlendRows.PRIVATE, **options), prompt)
        result, shared = bench.run(bench.blend(**options), prompt)
        torch.testing.assert_close(result.logits, private.logits, rtol=0, atol=2e-4)
        _close(shared, rows, 2e-4)
        assert result.warnings == ()
    moved, _ = bench.run(bench.blend(ratio=0.3), prompt)
    assert bool(moved.logits.isfinite().all())


@pytest.mark.parametrize("codec", ["bf16", "int8", "int4+bf16", "entropy2"])
def test_every_place_that_a_chunk_is_found_in_gives_the_same_answer(llama, codec):
    bench = Bench(llama, codec)
    blend = bench.blend(ratio=0.3, selector=TwoRounds())
    computed, rows = bench.run(blend)
    pooled, again = bench.run(blend)
    assert set(pooled.kv.bytes_by_tier) == {"gpu"}
    bench.tier.give_back(bench.pool.num_blocks)
    hosted, third = bench.run(blend)
    assert set(hosted.kv.bytes_by_tier) == {"ram"}
    assert hosted.afterwards is None
    for result, found in ((pooled, again), (hosted, third)):
        assert torch.equal(result.logits, computed.logits)
        _close(found, rows, 0)


def test_more_tokens_come_nearer(llama):
    bench = Bench(llama)
    full, _ = bench.run(FullPrefill())
    gaps = []
    for ratio in (0.0, 0.5, 1.0):
        result, _ = bench.run(bench.blend(ratio=ratio))
        gaps.append(float((result.logits - full.logits).abs().mean()))
    assert gaps[0] > gaps[1] > gaps[2]
    assert gaps[2] < 1e-3


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="there is no CUDA device")
@torch.inference_mode()
def test_the_kernels_give_what_the_definitions_give(decoder):
    weights = hf_model(decoder.config.family, **FAMILIES[decoder.config.family])
    benches = [Bench(decoder, block_size=64), _on_cpu(weights)]
    found = []
    for bench in benches:
        runner = DecodeRunner(bench.decoder, bench.pool)
        found.append(bench.decode(bench.blend(ratio=0.3, selector=RandomTokens()), runner))
    assert found[0][0] == found[1][0]
    torch.testing.assert_close(found[0][1].cpu(), found[1][1], rtol=0, atol=2e-3)


def _on_cpu(model):
    return Bench(decoder_of(model), block_size=64)
