from dataclasses import replace
from threading import Event

import pytest
import torch
from page_doubles import RecordsInMemory, recipe_of

from ragkit.config import PagePositions, PageSelectorName, PageVote
from ragkit.errors import CacheCapacityError, GenerationError, KVCacheError
from ragkit.generation.full_prefill import FullPrefill
from ragkit.generation.page_decode import PageSteps
from ragkit.generation.page_options import PageOptions
from ragkit.generation.page_rows import page_source
from ragkit.generation.paged_prefill import PagedPrefill
from ragkit.generation.rotary_cache import RotaryCache
from ragkit.kvcache.kv_pages import KVPages
from ragkit.kvcache.page_cache import PageCache
from ragkit.kvcache.page_codec import PageCodec
from ragkit.kvcache.page_memory import PageMemory
from ragkit.kvcache.page_records import PageRecords, window_refs
from ragkit.kvcache.page_selector import pool_votes
from ragkit.kvcache.page_selector_low_rank import LowRank
from ragkit.kvcache.page_selector_mean_key import MeanKey
from ragkit.kvcache.page_selector_soft_vote import SoftVote
from ragkit.kvcache.page_selectors import make_page_selector
from ragkit.kvcache.pool import KVPool
from ragkit.kvcache.request_kv import RequestKV
from ragkit.kvcache.resident_pages import ResidentPages

from .conftest import decoder_of, hf_model

FAMILIES = {
    "llama": {},
    "qwen3": {"head_dim": 16},
    "qwen2": {"rope_parameters": {
        "rope_theta": 1e4, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64,
    }},
}  # fmt: skip
TOKENS = torch.randint(3, 300, (400,), generator=torch.Generator().manual_seed(2)).tolist()
QUESTION = TOKENS[:9]
SMALL = PageOptions(
    make_page_selector("mean-key"), page_size=8, sink_pages=1, local_pages=2, budget_pages=3, window_tokens=16
)


@pytest.fixture(params=FAMILIES)
def decoder(request):
    return decoder_of(hf_model(request.param, **FAMILIES[request.param]))


@pytest.fixture
def llama():
    return decoder_of(hf_model("llama"))


def pages_of(
    decoder, tokens, options, codec="fp32", *, tier=None, cache_pages=64, memory=1 << 30, received=False, resident=False
):
    codec = PageCodec(codec, decoder.layout, options.page_size, with_received=received)
    refs = window_refs(recipe_of(decoder, codec.codec_id), options.reading_id, tokens, options.window_tokens, "c" * 32)
    cache = PageCache(decoder.layout, options.page_size, cache_pages, 0, decoder.device)
    records = PageRecords(tier, codec.codec_id, decoder.config.num_layers)
    num_pages = -(-len(tokens) // options.page_size)
    room = ResidentPages(codec, num_pages, decoder.device) if resident else None
    return KVPages(codec, refs, options.window_tokens, cache, PageMemory(memory), records, room)


def read(decoder, tokens, options=SMALL, **arguments):
    pages = pages_of(decoder, tokens, options, **arguments)
    prefill = PagedPrefill(decoder, RotaryCache(decoder), options)
    assert prefill.read(pages)
    return pages, prefill


@torch.inference_mode()
def logits_over(decoder, pages, prefill, question=QUESTION, then=(5, 6, 7)):
    """Return (1 + then, vocab): after the question, and after each further token."""
    attend = prefill.attention(pages, len(question) + len(then))
    out = []
    for tokens in (list(question), *([token] for token in then)):
        attend.begin(len(tokens), choose=True)
        out.append(decoder.logits(decoder.run(tokens, attend))[-1])
    return torch.stack(out)


@torch.inference_mode()
def full_logits(decoder, tokens, question=QUESTION, then=(5, 6, 7)):
    out = []
    for count in range(len(then) + 1):
        ids = torch.tensor([*tokens, *question, *then[:count]])
        kv = RequestKV(KVPool(decoder.layout, 12, decoder.device))
        rotary = RotaryCache(decoder).table(len(ids), len(ids))
        out.append(FullPrefill().extend(decoder, kv, rotary, ids))
    return torch.stack(out)


@pytest.mark.parametrize("length", [5, 16, 80, 163])
def test_with_every_page_chosen_the_logits_are_those_of_full_prefill_at_every_step(decoder, length):
    options = replace(SMALL, selector=make_page_selector("everything"))
    pages, prefill = read(decoder, TOKENS[:length], options)
    mine = logits_over(decoder, pages, prefill)
    torch.testing.assert_close(mine, full_logits(decoder, TOKENS[:length]), rtol=0, atol=1e-3)


def test_a_budget_that_holds_the_document_gives_full_prefill_with_any_selector(llama):
    options = replace(SMALL, budget_pages=20)
    pages, prefill = read(llama, TOKENS[:163], options)
    torch.testing.assert_close(logits_over(llama, pages, prefill), full_logits(llama, TOKENS[:163]), rtol=0, atol=1e-3)


@pytest.mark.parametrize("positions", [PagePositions.REINDEXED, PagePositions.CLAMPED])
def test_a_document_longer_than_the_window_is_read_and_answered(llama, positions):
    pages, prefill = read(llama, TOKENS, replace(SMALL, positions=positions))
    assert llama.config.max_context == 256
    assert (pages.num_tokens, pages.num_pages) == (400, 50)
    assert bool(logits_over(llama, pages, prefill).isfinite().all())


def test_true_positions_are_refused_beyond_the_window(llama):
    pages = pages_of(llama, TOKENS, SMALL)
    with pytest.raises(GenerationError, match=r"400 positions would be in use at once .* the model's window has 256"):
        PagedPrefill(llama, RotaryCache(llama), replace(SMALL, positions=PagePositions.TRUE)).read(pages)


def test_true_positions_are_those_of_the_document(llama):
    options = replace(SMALL, budget_pages=30, positions=PagePositions.TRUE)
    pages, prefill = read(llama, TOKENS[:163], options)
    torch.testing.assert_close(logits_over(llama, pages, prefill), full_logits(llama, TOKENS[:163]), rtol=0, atol=1e-3)


def test_every_page_of_a_document_beyond_the_window_is_refused_with_the_numbers(llama):
    options = replace(SMALL, selector=make_page_selector("everything"))
    with pytest.raises(GenerationError, match="400 positions would be in use"):
        read(llama, TOKENS, options)


def test_a_cache_smaller_than_what_is_attended_to_is_refused(llama):
    with pytest.raises(CacheCapacityError, match="6 pages are attended to at once, and each layer keeps 5 decoded"):
        read(llama, TOKENS, cache_pages=5)


def test_the_pages_whose_rows_weigh_most_are_chosen(llama):
    options = replace(SMALL, budget_pages=4)
    pages, prefill = read(llama, TOKENS[:300], options)
    attend = prefill.attention(pages, 20)
    queries = torch.randn(1, 6, 8, generator=torch.Generator().manual_seed(4))
    attend.choices.choose(0, queries)
    distance = torch.tensor([options.local_tokens])
    turned = RotaryCache(llama).table(300, 300).rotate(queries, distance)[0]
    keys = pages.cache.pool.keys[0][pages.bring(0, range(38))].mean(dim=1)  # (pages, kv_heads, head_dim)
    logits = torch.einsum("hgd,phd->hgp", turned.unflatten(0, (2, 3)), keys) * llama.scale
    # The heads' weights are those of all pages, although the first and the last two cannot be chosen.
    votes = logits.softmax(-1).sum((0, 1))[1:36]
    votes[1:] += 0.5 * votes[:-1].clone()
    best = votes.topk(4).indices.sort().values + 1
    assert attend.choices.chosen(0).tolist() == [best.tolist()]


def test_a_head_that_looks_at_the_sinks_has_no_say_among_other_pages(llama):
    class TwoKindsOfHeads(MeanKey):
        def score(self, queries, summary, first, stop, election):
            logits = torch.zeros(1, 6, stop - first)
            logits[:, :5, 0] = 20.0  # five heads look at page 0, and at page 9 a little more than at others
            logits[:, :5, 9] = 2.0
            logits[:, 5, 20] = 3.0  # one looks at page 20
            return pool_votes(logits, election)

    pages, _ = read(llama, TOKENS[:300])
    options = replace(SMALL, budget_pages=1, selector=TwoKindsOfHeads())
    attend = PagedPrefill(llama, RotaryCache(llama), options).attention(pages, 4)
    with torch.inference_mode():
        attend.begin(2, choose=True)
        llama.run([5, 6], attend)
    assert [attend.choices.chosen(layer).tolist() for layer in range(3)] == [[[20]]] * 3


@pytest.mark.parametrize("resident", [False, True])
@pytest.mark.parametrize("per_key_head", [False, True])
def test_of_the_pages_found_those_stay_that_would_be_attended_to_most(llama, per_key_head, resident):
    options = replace(WIDE, per_key_head=per_key_head, found_times=3)
    pages, _ = read(llama, TOKENS[:297], WIDE, resident=resident)
    queries = torch.randn(1, 6, 8, generator=torch.Generator().manual_seed(4))
    chosen = []
    for selector, times in (("min-max", 1), ("min-max", 20), ("soft-vote", 1)):
        exact = replace(SoftVote(), bits=8) if selector == "soft-vote" else make_page_selector(selector)
        changed = replace(options, selector=exact, found_times=times)
        attend = PagedPrefill(llama, RotaryCache(llama), changed).attention(pages, 4)
        attend.choices.choose(0, queries)
        chosen.append(attend.choices.chosen(0).tolist())
    assert chosen[1] == chosen[2]
    assert chosen[0] != chosen[2]


@pytest.mark.parametrize("vote", PageVote)
def test_key_heads_that_choose_for_themselves_attend_to_pages_of_their_own(llama, vote):
    options = replace(SMALL, per_key_head=True, vote=vote)
    pages, prefill = read(llama, TOKENS[:300], options)
    attend = prefill.attention(pages, 20)
    with torch.inference_mode():
        attend.begin(9, choose=True)
        llama.run(QUESTION, attend)
    chosen = [attend.choices.chosen(layer) for layer in range(3)]
    assert all(one.shape == (2, 3) for one in chosen)
    assert any(not torch.equal(*one) for one in chosen)


def test_key_heads_with_pages_of_their_own_equal_full_prefill_where_all_fit(llama):
    options = replace(SMALL, per_key_head=True, budget_pages=18)
    pages, prefill = read(llama, TOKENS[:163], options)
    torch.testing.assert_close(logits_over(llama, pages, prefill), full_logits(llama, TOKENS[:163]), rtol=0, atol=1e-3)


def test_one_choice_for_all_heads_is_that_of_each_head_where_they_agree(llama):
    pages, prefill = read(llama, TOKENS[:300])
    attend = prefill.attention(pages, 20)
    for positions in (PagePositions.REINDEXED, PagePositions.CLAMPED):
        source = page_source(
            pages, attend.layout, replace(SMALL, positions=positions), RotaryCache(llama).table(99, 99)
        )
        rows = []
        for chosen in (torch.tensor([[3, 8, 20]]), torch.tensor([[3, 8, 20], [3, 8, 20]])):
            rows.append(torch.zeros(2, attend.layout.num_rows, 2, 8).unbind())
            source.load(1, attend.layout.listed(chosen).int(), *rows[-1])
        for mine, others in zip(*rows, strict=True):
            torch.testing.assert_close(mine, others)


def test_layers_between_share_the_choice_of_the_layer_before(llama):
    options = replace(SMALL, layer_interval=2)
    pages, prefill = read(llama, TOKENS[:300], options)
    attend = prefill.attention(pages, 20)
    with torch.inference_mode():
        attend.begin(9, choose=True)
        llama.run(QUESTION, attend)
    chosen = [attend.choices.chosen(layer) for layer in range(3)]
    assert torch.equal(chosen[0], chosen[1])
    assert not torch.equal(chosen[1], chosen[2])


def test_a_pass_that_keeps_its_pages_sees_the_rows_of_the_passes_before(llama):
    options = replace(SMALL, budget_pages=30)  # all of them, so that both are full prefill
    pages, prefill = read(llama, TOKENS[:163], options)
    attend = prefill.attention(pages, 12)
    with torch.inference_mode():
        attend.begin(9, choose=True)
        llama.run(QUESTION, attend)
        for token in (5, 6, 7):
            attend.begin(1, choose=False)
            last = llama.logits(llama.run([token], attend))[-1]
    torch.testing.assert_close(last, full_logits(llama, TOKENS[:163])[-1], rtol=0, atol=1e-3)


def test_a_choice_stays_while_queries_are_alike(llama):
    pages, _ = read(llama, TOKENS[:300])
    choices = []
    for similarity in (1.0, 0.0):
        options = replace(SMALL, keep_similarity=similarity)
        attend = PagedPrefill(llama, RotaryCache(llama), options).attention(pages, 20)
        with torch.inference_mode():
            for token in (5, 5, 5):
                attend.begin(1, choose=True)
                llama.run([token], attend)
        choices.append(int(attend.choices.times_chosen.sum()) // 3)
    assert choices[0] == 9
    assert choices[1] < 9


def test_a_choice_that_stays_is_kept_exactly_where_the_cosine_says_so(llama):
    pages, _ = read(llama, TOKENS[:300])
    options = replace(SMALL, keep_similarity=0.9)
    attend = PagedPrefill(llama, RotaryCache(llama), options).attention(pages, 20)
    queries = torch.randn(1, 6, 8, generator=torch.Generator().manual_seed(1))
    other = torch.randn(1, 6, 8, generator=torch.Generator().manual_seed(2))
    assert [attend._stays(0, one) for one in (queries, queries + 0.1 * other, other, queries)] == [
        False, True, False, False,
    ]  # fmt: skip


@pytest.mark.parametrize("selector", [name for name in PageSelectorName if name not in ("everything", "window")])
def test_every_selector_reads_and_answers_beyond_the_window(llama, selector):
    options = replace(SMALL, selector=make_page_selector(selector))
    pages, prefill = read(llama, TOKENS, options, codec="int8", received=selector == "representative")
    assert bool(logits_over(llama, pages, prefill).isfinite().all())


@pytest.mark.parametrize("selector", ["min-max", "low-rank", "centroids-2", "soft-vote", "representative"])
def test_another_selector_answers_from_the_pages_that_one_has_read(llama, selector):
    tier = RecordsInMemory()
    read(llama, TOKENS, tier=tier, received=True)
    pages = pages_of(llama, TOKENS, SMALL, tier=tier, received=True)
    other = PagedPrefill(llama, RotaryCache(llama), replace(SMALL, selector=make_page_selector(selector)))
    logits = logits_over(llama, pages, other)
    first, prefill = read(llama, TOKENS, received=True)
    assert bool(logits.isfinite().all())
    assert not torch.allclose(logits, logits_over(llama, first, prefill))
    torch.testing.assert_close(logits, logits_over(llama, first, other), rtol=0, atol=1e-4)


WIDE = PageOptions(
    make_page_selector("min-max"), page_size=16, sink_pages=1, local_pages=1, budget_pages=2, window_tokens=32
)


@pytest.mark.parametrize("positions", [PagePositions.REINDEXED, PagePositions.CLAMPED])
@pytest.mark.parametrize("per_key_head", [False, True])
@pytest.mark.parametrize("codec", ["fp32", "int8", "int4"])
def test_pages_that_all_lie_on_the_device_answer_as_those_of_the_cache_do(llama, codec, per_key_head, positions):
    options = replace(WIDE, per_key_head=per_key_head, positions=positions)
    logits = []
    for resident in (False, True):
        pages, prefill = read(llama, TOKENS[:297], options, codec=codec, resident=resident)
        logits.append(logits_over(llama, pages, prefill))
        assert (pages.cache.hits + pages.cache.misses == 0) is resident
    torch.testing.assert_close(*logits, rtol=0, atol=2e-3)


def test_pages_without_a_disk_are_kept_on_the_device_alone(llama):
    pages, _ = read(llama, TOKENS[:297], WIDE, codec="int8", resident=True)
    assert pages.memory.bytes_used == 0
    cached, _ = read(llama, TOKENS[:297], WIDE, codec="int8")
    for name in ("mean-key", "min-max"):
        selector = make_page_selector(name)
        for mine, other in zip(pages.summaries(selector).of(1), cached.summaries(selector).of(1), strict=True):
            torch.testing.assert_close(mine, other)


def test_what_a_selector_keeps_never_leaves_the_device_where_nobody_stores_it(llama, monkeypatch):
    def save(_):
        raise AssertionError("it was brought to the host")

    monkeypatch.setattr("ragkit.kvcache.page_summary_records.save", save)
    pages, _ = read(llama, TOKENS[:297], WIDE, codec="int8", resident=True)
    assert pages.summaries(make_page_selector("low-rank")).num_pages == [19, 19, 19]


def test_resident_pages_are_brought_from_disk_and_mended(llama):
    tier = RecordsInMemory()
    first, prefill = read(llama, TOKENS[:297], WIDE, codec="int8", tier=tier)
    key = first.refs[3].key
    tier.records[key] = tier.records[key][:-5000] + bytes(5000)
    again = pages_of(llama, TOKENS[:297], WIDE, codec="int8", tier=tier, resident=True)
    torch.testing.assert_close(
        logits_over(llama, again, prefill), logits_over(llama, first, prefill), rtol=0, atol=2e-3
    )
    assert again.repaired == 1


class Replays:
    """A recorder that does the work again, and counts."""

    def __init__(self):
        self.log = []

    def begin(self):
        self.log.append("begin")

    def record(self, work):
        self.log.append("record")
        work()
        return lambda: (self.log.append("replay"), work())

    def end(self):
        self.log.append("end")

    def wait(self):
        pass


@pytest.mark.parametrize("resident", [False, True])
def test_recorded_steps_give_the_logits_of_passes(llama, resident):
    pages, prefill = read(llama, TOKENS[:297], WIDE, codec="int8", resident=resident)
    tokens = (5, 6, 7, 8, 9)
    logits = []
    for recorder in (None, Replays()):
        attend = prefill.attention(pages, len(QUESTION) + len(tokens))
        with torch.inference_mode():
            attend.begin(len(QUESTION), choose=True)
            llama.run(QUESTION, attend)
            steps = PageSteps(llama, [attend], [len(QUESTION)], recorder)
            logits.append([steps.step([token], [at % 2 == 0]).clone()[0] for at, token in enumerate(tokens)])
    assert [entry for entry in recorder.log if entry in ("record", "replay")] == [
        "record", "record", "replay", "replay", "replay",
    ]  # fmt: skip
    torch.testing.assert_close(torch.stack(logits[0]), torch.stack(logits[1]), rtol=0, atol=1e-5)
    attend = prefill.attention(pages, len(QUESTION) + len(tokens))
    with torch.inference_mode():
        attend.begin(len(QUESTION), choose=True)
        llama.run(QUESTION, attend)
        for number, token in enumerate(tokens):
            attend.begin(1, choose=number % 2 == 0)
            last = llama.logits(llama.run([token], attend))[-1]
    torch.testing.assert_close(logits[0][-1], last, rtol=0, atol=1e-4)


@pytest.mark.parametrize("codec", ["fp32", "int8", "int4"])
def test_a_second_reader_finds_all_pages_and_answers_the_same_without_reading(llama, codec):
    tier = RecordsInMemory()
    first, prefill = read(llama, TOKENS[:300], codec=codec, tier=tier)
    expected = logits_over(llama, first, prefill)
    again = pages_of(llama, TOKENS[:300], SMALL, codec=codec, tier=tier)
    assert again.is_complete
    torch.testing.assert_close(logits_over(llama, again, prefill), expected, rtol=0, atol=1e-5)
    assert again.use().bytes_by_tier["disk"] > 0


@pytest.mark.parametrize("selector", ["mean-key", "min-max", "low-rank", "centroids", "centroids-2"])
def test_what_a_selector_keeps_is_stored_and_no_key_is_read_for_it_again(llama, monkeypatch, selector):
    monkeypatch.setattr("ragkit.kvcache.page_summary_records.SECTION_WINDOWS", 4)
    tier, options = RecordsInMemory(), replace(SMALL, selector=make_page_selector(selector))
    first, prefill = read(llama, TOKENS[:300], options, tier=tier)
    assert len(tier.records) == 19 + 5
    again = pages_of(llama, TOKENS[:300], options, tier=tier)
    restored = again.summaries(options.selector)
    assert again.use().bytes_by_tier == {"ram": 0, "disk": 0}
    for layer in range(3):
        for mine, other in zip(restored.of(layer), first.summaries(options.selector).of(layer), strict=True):
            assert torch.equal(mine, other)
    torch.testing.assert_close(
        logits_over(llama, again, prefill), logits_over(llama, first, prefill), rtol=0, atol=1e-5
    )


def test_sections_that_were_fitted_otherwise_are_made_again(llama, monkeypatch):
    monkeypatch.setattr("ragkit.kvcache.page_summary_records.SECTION_WINDOWS", 4)
    tier, options = RecordsInMemory(), replace(SMALL, selector=make_page_selector("low-rank"))
    first, _ = read(llama, TOKENS[:300], options, tier=tier)
    sections = [key for key in tier.records if key not in {ref.key for ref in first.refs}]
    of_first = {key: tier.records.pop(key) for key in sections}
    fit = LowRank.fit
    with monkeypatch.context() as patch:
        patch.setattr(LowRank, "fit", lambda self, rows: tuple(-part for part in fit(self, rows)))
        pages_of(llama, TOKENS[:300], options, tier=tier).summaries(options.selector)
    assert set(of_first) <= set(tier.records)
    tier.records[sections[0]] = of_first[sections[0]]
    mixed = pages_of(llama, TOKENS[:300], options, tier=tier).summaries(options.selector)
    for layer in range(3):
        for mine, other in zip(mixed.of(layer), first.summaries(options.selector).of(layer), strict=True):
            assert torch.equal(mine, other)
    assert tier.records == {**tier.records, **of_first}


@pytest.mark.parametrize("is_gone", [True, False])
def test_a_damaged_summary_is_made_again_from_the_pages(llama, is_gone):
    tier = RecordsInMemory()
    first, _ = read(llama, TOKENS[:300], tier=tier)
    windows = {ref.key for ref in first.refs}
    (key,) = tier.records.keys() - windows
    record = tier.records[key]
    if is_gone:
        del tier.records[key]
    else:
        tier.records[key] = record[:-4200] + bytes(100) + record[-4100:]
    again = pages_of(llama, TOKENS[:300], SMALL, tier=tier)
    made = again.summaries(SMALL.selector)
    torch.testing.assert_close(made.of(1), first.summaries(SMALL.selector).of(1))
    assert tier.records[key] == record
    assert again.use().bytes_by_tier["disk"] > 0


def test_a_selector_that_did_not_read_stores_what_it_keeps_when_it_is_first_used(llama):
    tier, bounds = RecordsInMemory(), make_page_selector("min-max")
    read(llama, TOKENS[:300], tier=tier)
    pages_of(llama, TOKENS[:300], SMALL, tier=tier).summaries(bounds)
    again = pages_of(llama, TOKENS[:300], SMALL, tier=tier)
    again.summaries(bounds)
    assert again.use().bytes_by_tier["disk"] == 0


def test_stopped_reading_goes_on_behind_the_last_window(llama):
    tier, stop = RecordsInMemory(), Event()
    pages = pages_of(llama, TOKENS[:300], SMALL, tier=tier)

    class StopAfterFive:
        windows = 0

        def start(self, *_):
            pass

        def advance(self, documents=0, bytes=0, tokens=0):
            self.windows += documents
            if self.windows == 5:
                stop.set()

    prefill = PagedPrefill(llama, RotaryCache(llama), SMALL)
    assert not prefill.read(pages, StopAfterFive(), stop)
    assert (pages.num_windows, len(tier.records)) == (5, 5)
    with pytest.raises(KVCacheError, match="5 of 19 windows of the document were read"):
        prefill.attention(pages, 10)
    again = pages_of(llama, TOKENS[:300], SMALL, tier=tier)
    assert again.num_windows == 5
    counter = StopAfterFive()
    assert prefill.read(again, counter)
    assert counter.windows == 14
    whole, _ = read(llama, TOKENS[:300])
    torch.testing.assert_close(
        logits_over(llama, again, prefill), logits_over(llama, whole, prefill), rtol=0, atol=1e-5
    )


def test_reading_that_fails_keeps_the_windows_that_were_read(llama):
    tier = RecordsInMemory()
    pages = pages_of(llama, TOKENS[:300], SMALL, tier=tier)

    class Fails:
        def start(self, *_):
            pass

        def advance(self, **_):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        PagedPrefill(llama, RotaryCache(llama), SMALL).read(pages, Fails())
    assert len(tier.records) == 1


@pytest.mark.parametrize("damage", ["flipped", "short", "gone"])
def test_a_damaged_window_is_computed_again_and_the_answer_is_the_same(llama, damage):
    tier = RecordsInMemory()
    options = replace(SMALL, budget_pages=30)  # every page is asked for
    first, prefill = read(llama, TOKENS[:200], options, tier=tier)
    expected = logits_over(llama, first, prefill)
    again = pages_of(llama, TOKENS[:200], options, tier=tier)
    key = again.refs[7].key
    record = bytearray(tier.records[key])
    record[-5000] ^= 1
    changed = {"flipped": bytes(record), "short": bytes(record[: len(record) // 2]), "gone": None}[damage]
    if changed is None:
        del tier.records[key]
    else:
        tier.records[key] = changed
    again.num_windows = len(again.refs)  # it was there when the document was opened
    torch.testing.assert_close(logits_over(llama, again, prefill), expected, rtol=0, atol=1e-5)
    assert again.repaired == 1
    assert pages_of(llama, TOKENS[:200], options, tier=tier).is_complete


@pytest.mark.parametrize("is_damaged", [False, True])
def test_windows_behind_a_gap_are_not_read_again(llama, is_damaged):
    tier = RecordsInMemory()
    first, prefill = read(llama, TOKENS[:300], tier=tier)
    del tier.records[first.refs[2].key]
    if is_damaged:
        tier.records[first.refs[9].key] = b"no record"
    tier.saved = 0
    again = pages_of(llama, TOKENS[:300], SMALL, tier=tier)
    assert again.num_windows == 2
    assert prefill.read(again)
    assert tier.saved == 1 + is_damaged
    torch.testing.assert_close(
        logits_over(llama, again, prefill), logits_over(llama, first, prefill), rtol=0, atol=1e-5
    )


def test_a_document_that_begins_like_another_shares_its_windows(llama):
    tier = RecordsInMemory()
    read(llama, TOKENS[:300], tier=tier)
    longer = pages_of(llama, [*TOKENS[:300], 9, 9, 9], SMALL, tier=tier)
    other = pages_of(llama, [4, *TOKENS[:300]], SMALL, tier=tier)
    assert (longer.num_windows, other.num_windows) == (18, 0)  # the last window was not full


@pytest.mark.parametrize("change", [{"budget_pages": 4}, {"sink_pages": 2}, {"vote": PageVote.MAX}, {"local_pages": 3}])
def test_another_way_of_reading_never_finds_the_pages_of_this_one(llama, change):
    tier = RecordsInMemory()
    read(llama, TOKENS[:100], tier=tier)
    assert pages_of(llama, TOKENS[:100], replace(SMALL, **change), tier=tier).num_windows == 0


def test_pages_beyond_the_memory_budget_are_read_from_disk_again(llama):
    tier = RecordsInMemory()
    pages, prefill = read(llama, TOKENS[:300], tier=tier, memory=20_000, cache_pages=6)
    whole, _ = read(llama, TOKENS[:300])
    assert pages.memory.bytes_used <= 20_000
    torch.testing.assert_close(
        logits_over(llama, pages, prefill), logits_over(llama, whole, prefill), rtol=0, atol=1e-5
    )
    assert pages.use().bytes_by_tier["disk"] > 0


def test_pages_are_read_ahead_into_memory(llama):
    tier = RecordsInMemory()
    read(llama, TOKENS[:300], tier=tier)
    pages = pages_of(llama, TOKENS[:300], SMALL, tier=tier)
    assert not pages.memory.holds(1, 5)
    pages.prefetch(1, [10, 11, 20]).result(timeout=60)
    assert [pages.memory.holds(1, window) for window in (5, 10, 6)] == [True, True, False]
    assert pages.prefetch(1, [10, 20]) is None
    pages.bring(1, [10, 11, 20])
    assert pages.records._open._records.keys() == {pages.refs[5], pages.refs[10]}
    pages.close()


def test_an_empty_document_is_the_question_alone(llama):
    pages, prefill = read(llama, [])
    torch.testing.assert_close(logits_over(llama, pages, prefill), full_logits(llama, []), rtol=0, atol=1e-3)


def test_what_rows_received_is_the_mean_weight_of_the_queries_that_see_them(llama):
    from ragkit.generation.attention import causal_attention
    from ragkit.generation.page_attention import attention_and_received

    random = torch.Generator().manual_seed(3)
    queries = torch.randn(5, 6, 8, generator=random)
    keys, values = torch.randn(2, 9, 2, 8, generator=random)
    out, received = attention_and_received(queries, keys, values, 0.4)
    torch.testing.assert_close(out, causal_attention(queries, keys, values, 0.4), rtol=0, atol=1e-5)
    scores = torch.einsum("gd,rd->gr", queries[4, 3:], keys[:, 1]) * 0.4
    assert received[4, 1].item() == pytest.approx(scores.softmax(-1)[:, 8].mean().item(), abs=1e-5)
