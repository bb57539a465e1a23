import math
from itertools import pairwise

import pytest
import torch

from ragkit.errors import ConfigError
from ragkit.generation.attention import StandaloneAttention
from ragkit.generation.blend_pass import BlendInputs, Propagation
from ragkit.generation.blend_prefill import BlendOptions, BlendPrefill, BlendScene
from ragkit.generation.chunk_prefill import ChunkPrefill
from ragkit.generation.full_prefill import FullPrefill
from ragkit.generation.private_rows import RowSink
from ragkit.generation.question_pass import question_mass
from ragkit.generation.reused_rows import BlendLayout, ReusedRows
from ragkit.generation.rotary_cache import RotaryCache
from ragkit.generation.strategy import PrefillRequest
from ragkit.kvcache.codecs import make_codec
from ragkit.kvcache.coverage import Coverage
from ragkit.kvcache.eviction import make_policy
from ragkit.kvcache.kv_key import ContextKind, KVRecipe
from ragkit.kvcache.kv_store import KVStore
from ragkit.kvcache.memory_tier import MemoryTier
from ragkit.kvcache.pool import KVPool
from ragkit.kvcache.request_kv import RequestKV
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
CHOOSE_ONLY = Propagation(key_strength=0.0, value_strength=0.0)
SELECTORS = {
    "question": QuestionAttention(),
    "two rounds": TwoRounds(),
    "first": FirstTokens(),
    "random": RandomTokens(),
    "values": DeviationAtOneLayer(DeviationOf.VALUES),
    "keys": DeviationAtOneLayer(DeviationOf.KEYS),
    "gradual": GradualFiltering(3, layers=2),
    "cache-craft": CacheCraft(),
}


def _ids(seed, count):
    return tuple(torch.randint(3, 300, (count,), generator=torch.Generator().manual_seed(seed)).tolist())


PREFIX, ENDING = _ids(0, 12), _ids(1, 9)
CHUNKS = [Segment(_ids(seed, count), f"chunk-{seed}") for seed, count in ((2, 40), (3, 33), (4, 57))]
PROMPT = Prompt((Segment(PREFIX), *CHUNKS, Segment(ENDING)))


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
    """One model with a chunk store in memory."""

    def __init__(self, decoder, codec="fp32", context=ContextKind.PREFIX, neighbours=None):
        self.decoder = decoder
        self.rotary = RotaryCache(decoder)
        self.pool = KVPool(decoder.layout, 24, decoder.device)
        recipe = KVRecipe("0" * 64, decoder.config, "tokens", decoder.dtype, codec)
        self.chunks = ChunkPrefill(decoder, self.rotary, recipe, PREFIX, context, neighbours)
        self.store = KVStore(make_codec(codec, decoder.layout), MemoryTier("ram", 1 << 30, make_policy("cost")))

    @torch.inference_mode()
    def run(self, strategy, prompt=PROMPT, ratio=None):
        """Return the result and the rows of all positions, layer by layer."""
        with RequestKV(self.pool) as kv:
            request = PrefillRequest(prompt, kv, self.rotary.table(256, len(prompt)), ratio)
            result = strategy.prefill(self.decoder, request)
            assert kv.num_tokens == len(prompt)
            slots = kv.slots(0, len(prompt))
            return result, [self.pool.rows(layer, slots) for layer in range(3)]

    def blend(self, prompt=PROMPT, **options):
        return self.run(BlendPrefill(self.store, self.chunks, BlendOptions(**options)), prompt)

    @torch.inference_mode()
    def scene(self, kv, prompt=PROMPT, ratio=0.3, propagation=CHOOSE_ONLY, first_is_exact=True):
        layout = BlendLayout(prompt)
        refs = [self.chunks.ref(segment) for segment in layout.chunks]
        with self.store.fetch(refs, self.chunks.compute) as fetched:
            prefix = self.chunks.prefix_kv(layout.prefix)
            rows = ReusedRows.gather(self.decoder, layout, prefix, fetched.chunks, self.store.codec)
        request = PrefillRequest(prompt, kv, self.rotary.table(256, len(prompt)))
        spans = layout.spans(first_is_exact)
        kv.reserve(len(prompt))
        inputs = BlendInputs.of(request, spans, propagation.sigma, kv.slots(0, len(prompt)))
        return BlendScene(self.decoder, request.rotary, inputs, rows, spans, ratio, propagation), rows


def _reference(bench, rows, chosen, propagation):
    """The blend by its definition: dense masks, explicit softmax, loops over pairs of rows. Returns logits and rows."""
    decoder, table = bench.decoder, bench.rotary.table(256, len(PROMPT))
    ids, stop = torch.tensor(PROMPT.token_ids, device=DEVICE), len(PROMPT) - len(ENDING)
    positions = torch.arange(len(ids), device=DEVICE)
    active = torch.cat((chosen, positions[stop:]))
    owner = torch.cat([torch.full((len(one.token_ids),), index) for index, one in enumerate(PROMPT.segments)])
    stands_for = [0.0] * len(chosen)  # each row speaks for the recomputed one that is nearest, or half for each of two
    for t in range(len(PREFIX), stop):
        gaps = {index: abs(t - j) for index, j in enumerate(chosen.tolist()) if owner[j] == owner[t]}
        nearest = [index for index, gap in gaps.items() if gap == min(gaps.values())]
        for index in nearest:
            stands_for[index] += 1 / len(nearest)
    activations, out = decoder.embed(ids[active]), []
    for layer in range(3):
        queries, keys, values, residual = decoder.project(layer, activations)
        blended = []
        for old, fresh, strength in zip(
            rows.layers[layer], (keys, values), (propagation.key_strength, propagation.value_strength), strict=True
        ):
            new = old.clone()
            for t in range(len(PREFIX), stop):
                near = [index for index, j in enumerate(chosen.tolist()) if owner[j] == owner[t]]
                weights = [
                    math.exp(-((t - int(chosen[index])) ** 2) / (2 * propagation.sigma**2))
                    if abs(t - int(chosen[index])) <= 4 * propagation.sigma
                    else 0.0
                    for index in near
                ]
                if layer and strength and sum(weights):
                    voices = [weight * stands_for[index] for weight, index in zip(weights, near, strict=True)]
                    change = sum(
                        voice * (fresh[index] - old[chosen[index]]) for voice, index in zip(voices, near, strict=True)
                    )
                    new[t] += strength * min(1.0, sum(weights)) * change / sum(voices)
            new[active] = fresh
            blended.append(new)
        out.append(tuple(blended))
        group = queries.shape[1] // keys.shape[1]
        turned = table.rotate(blended[0], positions).repeat_interleave(group, 1)
        scores = torch.einsum("qhd,khd->hqk", table.rotate(queries, active), turned) * decoder.scale
        scores = scores.masked_fill(positions > active[:, None], -torch.inf)
        attended = torch.einsum("hqk,khd->qhd", scores.softmax(-1), blended[1].repeat_interleave(group, 1))
        activations = decoder.complete(layer, attended, residual)
    return decoder.logits(activations.rows(slice(-1, None)))[0], out


def _close(mine, theirs, atol=2e-4):
    for one, other in zip(mine, theirs, strict=True):
        for part, expected in zip(one, other, strict=True):
            torch.testing.assert_close(part, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("name", SELECTORS)
def test_with_every_token_chosen_logits_and_rows_are_those_of_full_prefill(decoder, name):
    bench = Bench(decoder)
    full, rows = bench.run(FullPrefill())
    result, blended = bench.blend(ratio=1.0, selector=SELECTORS[name])
    torch.testing.assert_close(result.logits, full.logits, rtol=0, atol=1e-3)
    _close(blended, rows, 1e-3)


def test_everything_equals_full_prefill_through_a_lossy_codec_at_any_ratio(llama):
    bench = Bench(llama, codec="int4")
    result, blended = bench.blend(ratio=0.0, selector=Everything())
    full, rows = bench.run(FullPrefill())
    torch.testing.assert_close(result.logits, full.logits, rtol=0, atol=1e-3)
    # The prefix is not stored, so that only the chunks went through the codec, and all of them were computed anew.
    _close(blended, rows, 1e-3)
    assert result.recomputed == len(PROMPT) - len(PREFIX)


@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_beyond_the_window_of_dynamic_frequencies_a_blend_is_full_prefill_and_says_so(ratio):
    rope = {"rope_theta": 1e4, "rope_type": "dynamic", "factor": 2.0}
    model = hf_model("llama", rope_parameters=rope, max_position_embeddings=100).to(DEVICE)
    bench = Bench(decoder_of(model))
    full, rows = bench.run(FullPrefill())
    result, blended = bench.blend(ratio=ratio)
    torch.testing.assert_close(result.logits, full.logits, rtol=0, atol=1e-3)
    _close(blended, rows, 1e-3)
    assert (result.reused, result.recomputed) == (0, len(PROMPT))
    assert "nothing was reused" in result.warnings[0]
    within = Prompt((Segment(PREFIX), CHUNKS[0], Segment(ENDING)))
    assert bench.blend(within, ratio=0.0)[0].reused > 0


@torch.inference_mode()
def test_with_no_token_chosen_the_question_stands_behind_the_reused_rows(decoder):
    bench = Bench(decoder)
    result, rows = bench.blend(ratio=0.0, selector=NoTokens())
    table = bench.rotary.table(256, len(PROMPT))
    prefix = StandaloneAttention(table, decoder.scale)
    decoder.run(list(PREFIX), prefix)
    parts = [prefix.kept]
    for segment in CHUNKS:
        attend = StandaloneAttention(table, decoder.scale, prefix.kept)
        decoder.run(list(segment.token_ids), attend)
        parts.append(attend.kept)
    past = [tuple(torch.cat([part[layer][side] for part in parts]) for side in (0, 1)) for layer in range(3)]
    attend = StandaloneAttention(table, decoder.scale, past)
    expected = decoder.logits(decoder.run(list(ENDING), attend).rows(slice(-1, None)))[0]
    torch.testing.assert_close(result.logits, expected, rtol=0, atol=2e-4)
    _close(
        rows, [tuple(torch.cat(pair) for pair in zip(*two, strict=True)) for two in zip(past, attend.kept, strict=True)]
    )
    assert (result.reused, result.recomputed) == (len(PROMPT) - len(ENDING), len(ENDING))


@pytest.mark.parametrize("propagation", [CHOOSE_ONLY, Propagation(7.0, 1.0, 0.5), Propagation(2.0, 0.0, 1.0)])
@torch.inference_mode()
def test_the_blend_is_its_definition(decoder, propagation):
    bench = Bench(decoder)
    chosen = torch.tensor([13, 14, 30, 52, 60, 61, 62, 84, 100, 141], device=DEVICE)
    with RequestKV(bench.pool) as kv:
        scene, rows = bench.scene(kv, propagation=propagation)
        blended = ReusedRows.unwritten(decoder, rows.num_tokens)
        logits = scene.blend_pass().run(chosen, RowSink.over(blended))
        expected, expected_rows = _reference(bench, rows, chosen, propagation)
    torch.testing.assert_close(logits, expected, rtol=0, atol=2e-4)
    _close(blended.layers, expected_rows)


@pytest.mark.parametrize("name", SELECTORS)
def test_a_recomputed_token_never_sees_a_later_one(llama, name):
    bench = Bench(llama)
    other = Prompt((*PROMPT.segments[:3], Segment(_ids(9, 57), "chunk-9"), PROMPT.segments[-1]))
    selector = SELECTORS[name] if name in ("first", "random") else RandomTokens(len(name))
    _, rows = bench.blend(ratio=0.4, selector=selector)
    _, others = bench.blend(other, ratio=0.4, selector=selector)
    before = len(PREFIX) + 40 + 33
    _close(
        [[part[:before] for part in pair] for pair in rows], [[part[:before] for part in pair] for pair in others], 1e-5
    )
    assert not torch.allclose(rows[1][0][before : before + 57], others[1][0][before : before + 57])


@torch.inference_mode()
def test_the_questions_mass_is_the_sum_of_its_attention_weights(decoder):
    bench = Bench(decoder)
    with RequestKV(bench.pool) as kv:
        _, rows = bench.scene(kv)
    ids, stop = torch.tensor(PROMPT.token_ids, device=DEVICE), len(PROMPT) - len(ENDING)
    table = bench.rotary.table(256, len(ids))
    mass = question_mass(decoder, table, rows, ids[stop:], LayerRange(1 / 3, 1))
    positions = torch.arange(len(ids), device=DEVICE)
    expected = torch.zeros(len(ids), device=DEVICE)
    activations = decoder.embed(ids[stop:])
    for layer in range(3):
        queries, keys, values, residual = decoder.project(layer, activations)
        all_keys = torch.cat((rows.layers[layer][0][:stop], keys))
        all_values = torch.cat((rows.layers[layer][1][:stop], values))
        group = queries.shape[1] // keys.shape[1]
        at = positions[stop:]
        scores = torch.einsum(
            "qhd,khd->hqk",
            table.rotate(queries, at),
            table.rotate(all_keys, positions).repeat_interleave(group, 1),
        )
        weights = (scores * decoder.scale).masked_fill(positions > at[:, None], -torch.inf).softmax(-1)
        if layer >= 1:
            expected += weights.sum((0, 1))
        attended = torch.einsum("hqk,khd->qhd", weights, all_values.repeat_interleave(group, 1))
        activations = decoder.complete(layer, attended, residual)
    torch.testing.assert_close(mass, expected, rtol=0, atol=1e-4)


class Watching(CacheCraft):
    """Cache-Craft's selector, with what it measured and kept."""

    def narrow(self, scene, layer, chosen, fresh):
        if layer == 1:
            self.measured = fresh.chunk_attention()
        kept = super().narrow(scene, layer, chosen, fresh)
        if kept is not None:
            self.kept = chosen[kept]
        return kept


def _attention_of_full_prefill(decoder, table, ids):
    """The weights of layer 1 of full prefill, summed over heads: the whole matrix, (tokens, tokens)."""
    positions, found = torch.arange(len(ids), device=DEVICE), []

    def attend(layer, queries, keys, values):
        group = queries.shape[1] // keys.shape[1]
        turned = table.rotate(keys, positions).repeat_interleave(group, 1)
        scores = torch.einsum("qhd,khd->hqk", table.rotate(queries, positions), turned) * decoder.scale
        weights = scores.masked_fill(positions > positions[:, None], -torch.inf).softmax(-1)
        found.append(weights.sum(0))
        return torch.einsum("hqk,khd->qhd", weights, values.repeat_interleave(group, 1))

    decoder.run(list(ids), attend)
    return found[1]


@torch.inference_mode()
def test_the_attention_among_chunks_is_that_of_full_prefill_at_the_check_layer(decoder):
    bench = Bench(decoder)
    selector = Watching()
    result, _ = bench.blend(ratio=0.2, selector=selector, propagation=CHOOSE_ONLY)
    weights = _attention_of_full_prefill(decoder, bench.rotary.table(256, len(PROMPT)), PROMPT.token_ids)
    stop, bounds = len(PROMPT) - len(ENDING), (12, 52, 85, 142)
    inter, density, intra = torch.zeros((3, stop - 12), device=DEVICE)
    for own, (start, end) in enumerate(pairwise(bounds)):
        rows = slice(start - 12, end - 12)
        intra[rows] = weights[start:end, start:end].sum(1)
        for earlier, behind in tuple(pairwise(bounds))[:own]:
            inter[rows] += weights[start:end, earlier:behind].sum(1)
            density[rows] += weights[start:end, earlier:behind].mean(1)
    for got, expected in zip(selector.measured, (inter, density, intra), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)
    # And the second and third chunk get their parts of the budget, spent where that attention is highest.
    impacts = [
        1 / (1 + math.exp(-float(density[a - 12 : b - 12].mean() * (b - a) ** 2 / intra[a - 12 : b - 12].sum())))
        for a, b in pairwise(bounds[1:])
    ]
    second = round(26 * 33 * impacts[0] / (33 * impacts[0] + 57 * impacts[1]))
    best = (40 + inter[40:73].topk(second).indices, 73 + inter[73:].topk(26 - second).indices)
    assert selector.kept.tolist() == (12 + torch.cat(best).sort().values).tolist()
    assert result.recomputed == len(ENDING) + round((130 + 130 + 26) / 3)


class Measuring(RandomTokens):
    """Tokens by chance, with what can be measured of them in the second layer."""

    def narrow(self, scene, layer, chosen, fresh):
        if layer == 1:
            self.chosen, self.deviation, self.attention = chosen, fresh.deviation(), fresh.chunk_attention()


@torch.inference_mode()
def test_what_is_measured_of_some_tokens_is_theirs(llama):
    bench, selector = Bench(llama), Measuring()
    _, blended = bench.blend(ratio=0.3, selector=selector, propagation=CHOOSE_ONLY)
    _, reused = bench.blend(ratio=0.0, selector=NoTokens())
    for got, fresh, old in zip(selector.deviation, blended[1], reused[1], strict=True):
        expected = (fresh - old)[selector.chosen].square().sum((1, 2))
        assert float(expected.max()) > 0.01
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-6)
    assert [part.shape for part in selector.attention] == [(39,)] * 3
    whole = selector.attention.inter + selector.attention.intra
    assert 0 < float(whole.min()) < float(whole.max()) < llama.config.num_q_heads  # the prefix has the rest


def test_cache_craft_without_a_budget_is_plain_reuse(llama):
    bench = Bench(llama)
    result, rows = bench.blend(ratio=0.0, selector=CacheCraft())
    plain, expected = bench.blend(ratio=0.0, selector=NoTokens())
    assert torch.equal(result.logits, plain.logits)
    assert result.recomputed == len(ENDING)
    _close(rows, expected, 0)


def test_cache_craft_measures_the_chunks_of_any_context(llama):
    bench = Bench(llama, context=ContextKind.ISOLATED)
    selector = Watching()
    bench.blend(ratio=0.2, selector=selector)
    first = selector.kept[selector.kept < 52].tolist()
    # The first chunk is not exact; it has no chunk before it, so its tokens are taken from the start.
    assert first == list(range(12, 12 + len(first)))
    assert first


def test_found_and_computed_kv_give_the_same_logits(llama):
    bench = Bench(llama, codec="int8")
    cold, _ = bench.blend(ratio=0.2)
    warm, _ = bench.blend(ratio=0.2)
    assert torch.equal(cold.logits, warm.logits)
    assert (cold.kv.hits, cold.kv.misses, warm.kv.hits, warm.kv.misses) == (0, 3, 3, 0)
    assert warm.kv.bytes_by_tier["ram"] > 0


def test_a_chunk_is_computed_once_wherever_it_stands(llama):
    bench = Bench(llama)
    bench.blend(ratio=0.1)
    turned = Prompt((PROMPT.segments[0], CHUNKS[2], CHUNKS[0], CHUNKS[1], CHUNKS[0], PROMPT.segments[-1]))
    result, _ = bench.blend(turned, ratio=0.1)
    assert (result.kv.misses, bench.store.stats.computed) == (0, 3)
    everything, rows = bench.blend(turned, ratio=1.0)
    full, exact = bench.run(FullPrefill(), turned)
    torch.testing.assert_close(everything.logits, full.logits, rtol=0, atol=1e-3)
    _close(rows, exact, 1e-3)


def test_a_missing_chunk_between_found_ones_is_a_hole(llama):
    bench = Bench(llama)
    without = Prompt((PROMPT.segments[0], CHUNKS[0], CHUNKS[2], PROMPT.segments[-1]))
    bench.blend(without)
    result, _ = bench.blend()
    assert (result.kv.hits, result.kv.misses, result.kv.holes) == (2, 1, 1)


@pytest.mark.parametrize(
    ("name", "ratio"),
    [
        *((name, ratio) for name in SELECTORS for ratio in (0.0, 0.3)),
        *((name, Coverage(0.7, 0.05, 0.3)) for name, selector in SELECTORS.items() if selector.meets_coverage),
    ],
)
def test_a_prompt_whose_only_chunk_is_exact_is_answered_exactly_with_nothing_recomputed(llama, name, ratio):
    selector = SELECTORS[name]
    bench, alone = Bench(llama), Prompt((Segment(PREFIX), CHUNKS[0], Segment(ENDING)))
    full, rows = bench.run(FullPrefill(), alone)
    result, blended = bench.blend(alone, ratio=ratio, selector=selector)
    assert result.recomputed == len(ENDING)
    torch.testing.assert_close(result.logits, full.logits, rtol=0, atol=2e-4)
    _close(blended, rows)


@pytest.mark.parametrize("name", ["question", "two rounds", "first", "random"])
def test_an_exact_chunk_is_recomputed_only_where_everything_is(llama, name):
    bench, short = Bench(llama), Segment(CHUNKS[1].token_ids[:5], "short")
    prompt = Prompt((Segment(PREFIX), CHUNKS[0], short, Segment(ENDING)))
    for ratio, expected in ((0.5, 5), (0.95, 5), (1.0, 45)):
        result, _ = bench.blend(prompt, ratio=ratio, selector=SELECTORS[name])
        assert result.recomputed == len(ENDING) + expected


def test_the_first_chunk_is_left_alone_where_it_is_exact_and_not_behind_another_prefix(llama):
    bench = Bench(llama)
    _, rows = bench.run(FullPrefill())
    chunk = slice(len(PREFIX), len(PREFIX) + 40)
    result, blended = bench.blend(ratio=0.3)
    assert result.recomputed == len(ENDING) + math.floor(0.3 * 130)
    _close([[part[chunk] for part in pair] for pair in blended], [[part[chunk] for part in pair] for pair in rows])
    other = Prompt((Segment(_ids(7, 12)), *PROMPT.segments[1:]))
    _, exact = bench.run(FullPrefill(), other)
    _, blended = bench.blend(other, ratio=0.3)
    gap = (blended[2][0][chunk] - exact[2][0][chunk]).abs().amax((1, 2))
    assert gap.max() > 0.01
    assert gap.min() < gap.max() / 5  # those that were chosen


def test_more_tokens_come_nearer(llama):
    bench = Bench(llama)
    full, _ = bench.run(FullPrefill())
    gaps = []
    for ratio in (0.0, 0.5, 1.0):
        result, _ = bench.blend(ratio=ratio)
        gaps.append(float((result.logits - full.logits).abs().mean()))
    assert gaps[0] > gaps[1] > gaps[2]
    assert gaps[2] < 1e-3


def test_filtering_layer_by_layer_counts_what_each_layer_computed(llama):
    bench = Bench(llama)
    with RequestKV(bench.pool) as kv:
        scene, rows = bench.scene(kv, ratio=0.2)
        blend = scene.blend_pass()
        selector = DeviationAtOneLayer(DeviationOf.BOTH)
        with torch.inference_mode():
            blend.run(selector.choose(scene), RowSink.over(ReusedRows.unwritten(llama, rows.num_tokens)), selector)
    assert blend.row_layers == 130 + 130 + 26


def test_the_rows_of_a_chunk_take_one_layer_less_than_the_model_has(llama, monkeypatch):
    bench = Bench(llama)
    ref = bench.chunks.ref(CHUNKS[0])
    completed = []
    complete = llama.complete
    monkeypatch.setattr(llama, "complete", lambda layer, *rest: completed.append(layer) or complete(layer, *rest))
    (computed,) = bench.chunks.compute([ref])
    assert len(computed.layers) == 3
    assert sorted(set(completed)) == [0, 1]


@pytest.mark.parametrize("kind", [ContextKind.ISOLATED, ContextKind.NEIGHBOURS])
@torch.inference_mode()
def test_chunks_are_computed_behind_what_their_context_says(llama, kind):
    bench = Bench(llama, context=kind, neighbours=lambda chunk_id: CHUNKS[:2])
    (got,) = bench.chunks.compute([bench.chunks.ref(CHUNKS[2])])
    before = () if kind is ContextKind.ISOLATED else (*PREFIX, *CHUNKS[0].token_ids, *CHUNKS[1].token_ids)
    attend = StandaloneAttention(bench.rotary.table(256, 200), llama.scale)
    llama.run([*before, *CHUNKS[2].token_ids], attend)
    _close(got.layers, [[part[len(before) :] for part in pair] for pair in attend.kept])
    full, _ = bench.run(FullPrefill())
    result, _ = bench.blend(ratio=1.0)
    torch.testing.assert_close(result.logits, full.logits, rtol=0, atol=1e-3)


def test_kv_of_different_contexts_has_different_keys(llama):
    kinds = [Bench(llama, context=kind, neighbours=lambda chunk_id: CHUNKS[:1]) for kind in ContextKind]
    keys = {bench.chunks.ref(CHUNKS[1]).key for bench in kinds}
    assert len(keys) == 3


def test_a_prompt_without_chunks_is_computed(llama):
    bench = Bench(llama)
    plain = Prompt((Segment(PREFIX), Segment(ENDING)))
    result, _ = bench.blend(plain)
    full, _ = bench.run(FullPrefill(), plain)
    assert torch.equal(result.logits, full.logits)
    assert result.reused == 0


@pytest.mark.parametrize("ratio", [-0.1, 1.1, math.nan])
def test_an_impossible_ratio_is_refused(llama, ratio):
    with pytest.raises(ConfigError, match=r"must lie in \[0, 1\]"):
        BlendOptions(ratio=ratio)
    bench = Bench(llama)
    with pytest.raises(ConfigError, match=r"must lie in \[0, 1\]"):
        bench.run(BlendPrefill(bench.store, bench.chunks), ratio=ratio)


@torch.inference_mode()
@pytest.mark.parametrize("selector", [QuestionAttention(), TwoRounds()], ids=["question", "two rounds"])
def test_a_coverage_gives_what_the_ratio_of_as_many_tokens_does(llama, selector):
    bench, shares = Bench(llama), (0.3, 0.6, 0.9)
    found = [bench.blend(ratio=Coverage(share, 0.05, 0.8), selector=selector) for share in shares]
    counts = [result.recomputed - len(ENDING) for result, _ in found]
    assert 6 <= counts[0] < counts[1] < counts[2] <= 104
    for count, (result, rows) in zip(counts, found, strict=True):
        fixed, expected = bench.blend(ratio=count / 130, selector=selector)
        assert torch.equal(result.logits, fixed.logits)
        assert result.recomputed == fixed.recomputed
        _close(rows, expected, 0)


@torch.inference_mode()
def test_a_coverage_leaves_no_more_of_the_questions_attention_than_it_says(llama):
    bench = Bench(llama)
    with RequestKV(bench.pool) as kv:
        scene, _ = bench.scene(kv, ratio=Coverage(0.75, 0.0, 1.0))
        chosen = QuestionAttention().choose(scene)
        mass = scene.question_mass(QuestionAttention().layers)
    worth = mass[52:142]  # the first chunk is exact
    assert int(chosen.min()) >= 52
    assert float(worth.sum() - mass[chosen].sum()) <= 0.25 * float(worth.sum())
    assert float(worth.sum() - mass[chosen].sum() + mass[chosen].min()) > 0.2 * float(worth.sum())


def test_a_request_may_ask_for_a_coverage_and_the_bounds_hold(llama):
    bench = Bench(llama)
    strategy = BlendPrefill(bench.store, bench.chunks)
    for coverage, count in ((Coverage(0.0, 0.1, 0.5), 13), (Coverage(1.0, 0.1, 0.5), 65)):
        result, _ = bench.run(strategy, ratio=coverage)
        assert result.recomputed - len(ENDING) == count
        fixed, _ = bench.run(strategy, ratio=count / 130)
        assert torch.equal(result.logits, fixed.logits)


@pytest.mark.parametrize("name", ["first", "random", "values", "gradual", "cache-craft"])
def test_a_coverage_is_refused_where_the_selector_does_not_ask_the_question(llama, name):
    coverage, bench = Coverage(0.7, 0.05, 0.3), Bench(llama)
    with pytest.raises(ConfigError, match="can meet no coverage: give it a ratio"):
        BlendOptions(coverage, SELECTORS[name])
    with pytest.raises(ConfigError, match="can meet no coverage: give it a ratio"):
        bench.run(BlendPrefill(bench.store, bench.chunks, BlendOptions(0.2, SELECTORS[name])), ratio=coverage)


def test_strength_by_evidence_is_full_for_smooth_changes_and_none_for_noise(llama):
    from ragkit.kvcache.change_strength import ChangeStrength

    rows = torch.arange(0, 400, 4)
    strength = ChangeStrength(rows, (0, 60, 100), sigma=12.0)
    rng = torch.Generator().manual_seed(0)
    smooth = torch.sin(rows / 60)[:, None] * torch.randn(16, generator=rng)
    noise = torch.randn(100, 16, generator=rng)
    smooth_strength, noise_strength = strength.of(torch.stack((smooth, noise), dim=1)).tolist()
    assert smooth_strength > 0.95
    assert noise_strength < 0.3


def test_a_pass_holds_no_state_of_the_one_before(llama):
    bench = Bench(llama)
    first, rows = bench.blend(ratio=0.2)
    bench.blend(Prompt((PROMPT.segments[0], CHUNKS[1], PROMPT.segments[-1])), ratio=0.9)
    again, same = bench.blend(ratio=0.2)
    assert torch.equal(first.logits, again.logits)
    for one, other in zip(rows, same, strict=True):
        assert torch.equal(one[0], other[0])


@pytest.mark.parametrize("behind", [(), (Segment(()),)], ids=["nothing", "an empty segment"])
def test_logits_are_those_of_the_last_token_where_a_prompt_ends_with_a_chunk(llama, behind):
    bench = Bench(llama)
    prompt = Prompt((Segment(PREFIX), *CHUNKS, *behind))
    behind_the_prefix = Prompt((Segment(PREFIX), CHUNKS[0], *behind))
    for ratio in (0.0, 0.3, 1.0):
        result, _ = bench.blend(prompt, ratio=ratio)
        assert result.recomputed >= len(CHUNKS[-1].token_ids)
        result, _ = bench.blend(behind_the_prefix, ratio=ratio)
        torch.testing.assert_close(result.logits, bench.run(FullPrefill(), behind_the_prefix)[0].logits)
    result, _ = bench.blend(prompt, ratio=1.0)
    torch.testing.assert_close(result.logits, bench.run(FullPrefill(), prompt)[0].logits, rtol=0, atol=1e-3)


def test_chunks_without_a_token_are_prefilled_like_none(llama):
    bench = Bench(llama)
    prompt = Prompt((Segment(PREFIX), Segment((), "empty"), Segment(ENDING)))
    result, _ = bench.blend(prompt, selector=RandomTokens())
    torch.testing.assert_close(result.logits, bench.run(FullPrefill(), prompt)[0].logits)
