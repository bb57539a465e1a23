"""Models that draft: another engine, and the target over a shorter prompt."""

import math
import threading
from collections import Counter
from dataclasses import replace

import pytest
import torch

from ragkit.errors import CacheCapacityError, ConfigError
from ragkit.generation import drafter_model, request_tables
from ragkit.generation.acceptance import Transfer
from ragkit.generation.decode_runner import DecodeRunner
from ragkit.generation.draft_control import DraftLimits
from ragkit.generation.draft_model import DraftModel, graph_runner
from ragkit.generation.draft_tree import DraftTree
from ragkit.generation.drafter import DraftBudget, DraftContext
from ragkit.generation.drafter_model import ModelDrafter, model_drafter
from ragkit.generation.drafter_self import (
    AttentionDroppingDecoder,
    redundant_attention,
    self_drafter,
    short_prompts,
)
from ragkit.generation.engine import Engine
from ragkit.generation.known_ids import KnownIdsDecoder
from ragkit.generation.sampling import SamplingConfig, distribution
from ragkit.generation.speculative_decode import Drafting
from ragkit.types import Prompt, Segment

from .conftest import hf_model, write_tokenizer

PADDED = {"more ids": 320, "fewer ids": 280}  # than the target, which has 300
FIXED = DraftLimits(depth=5, nodes=20, length=5)
PROMPT = Prompt(
    (
        Segment((1, 40)),
        Segment((60, 70, 80), "worst"),
        Segment((61, 71, 81, 91), "middle"),
        Segment((62, 72), "best"),
        Segment((90, 2)),
    )
)


def sampling(tokens=24, **changes):
    return SamplingConfig(**{"max_new_tokens": tokens, "ignore_stop_tokens": True, **changes})


def run(engine, config, drafting=None, prompt=PROMPT):
    return list(engine.generate(prompt, config, drafting=drafting))[-1]


@pytest.fixture(scope="module")
def smaller(tmp_path_factory):
    """A pair's drafter: another model with the same tokenizer, and fewer layers."""
    folder = tmp_path_factory.mktemp("smaller")
    hf_model("llama", num_hidden_layers=2, vocab_size=290).save_pretrained(folder)
    write_tokenizer(folder)
    return Engine.load(folder, device="cpu", dtype="float32")


def padded_pair(folder, vocab_size, noise=0.0):
    """Return the target's model with another number of ids, those that the target lacks the likeliest by far."""
    model, other = hf_model("llama"), hf_model("llama", vocab_size=vocab_size)
    state, shared = other.state_dict(), min(vocab_size, 300)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.shape == state[name].shape:
                state[name].copy_(tensor + torch.randn_like(tensor) * noise)
            else:  # one row an id
                state[name][:shared].copy_(tensor[:shared] + torch.randn_like(tensor[:shared]) * noise)
                state[name][shared:].mul_(8)
    other.load_state_dict(state)
    other.save_pretrained(folder)
    write_tokenizer(folder)
    return Engine.load(folder, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def wider(tmp_path_factory):
    """A pair's drafter: the target, beside whose ids it has 20 that it would rather say."""
    return padded_pair(tmp_path_factory.mktemp("wider"), 320)


def everything(engine, **options):
    return self_drafter(engine, context_tokens=1000, **options)


def test_a_model_that_drafts_for_itself_from_the_whole_prompt_is_always_right(engine):
    finished = run(engine, sampling(25), Drafting(everything(engine), limits=FIXED))
    assert finished.token_ids == run(engine, sampling(25)).token_ids
    assert finished.draft.accepted == finished.draft.drafted == 20
    assert finished.draft.steps == 4


@pytest.mark.parametrize("width", [1, 2, 3])
def test_greedy_answers_are_the_targets_whatever_a_short_prompt_drafts(engine, width):
    finished = run(engine, sampling(30), Drafting(self_drafter(engine, context_tokens=4, width=width), limits=FIXED))
    assert finished.token_ids == run(engine, sampling(30)).token_ids
    assert finished.draft.drafted > 0


def test_greedy_answers_are_the_targets_whatever_another_model_drafts(engine, smaller):
    drafter = ModelDrafter("smaller", DraftModel.of(smaller), engine)
    for tokens in range(3, 40, 4):
        prompt = Prompt((Segment(tuple(range(5, 5 + tokens))),))
        plain = run(engine, sampling(20), prompt=prompt).token_ids
        assert run(engine, sampling(20), Drafting(drafter, limits=FIXED), prompt).token_ids == plain


@pytest.mark.parametrize("width", [1, 2])
def test_drawn_drafts_have_the_distributions_that_they_were_drawn_from(engine, smaller, width):
    model = DraftModel.of(smaller)
    drafter = ModelDrafter("smaller", model, engine, lambda prompt: short_prompts(prompt, 5, width), width)
    config = sampling(temperature=0.7, seed=3)
    session = drafter.begin(DraftContext(PROMPT, config))
    session.accept([33, 44])
    (tree,) = drafter.propose([session], [DraftBudget(4, 20)])
    assert tree.probabilities.shape == (4 * width, 300)
    for branch, prompt in enumerate(short_prompts(PROMPT, 5, width)):
        tokens = [*prompt.token_ids, 33, 44]
        for node in range(4 * branch, 4 * branch + 4):
            expected = (smaller.forward(tokens).logits / 0.7).softmax(-1)
            torch.testing.assert_close(tree.probabilities[node, :290], expected, rtol=0, atol=1e-5)
            assert not tree.probabilities[node, 290:].any()
            tokens.append(tree.token_ids[node])
    session.close()


def test_ids_that_the_target_lacks_are_left_out_of_what_is_drafted_and_of_its_distribution(engine, wider):
    drafter, said = model_drafter("wider", wider, engine), []
    for temperature in (0.0, 0.7):
        session = drafter.begin(DraftContext(PROMPT, sampling(temperature=temperature, seed=3)))
        session.accept([33, 44])
        (tree,) = drafter.propose([session], [DraftBudget(5, 20)])
        session.close()
        tokens = [*PROMPT.token_ids, 33, 44]
        for node, token in enumerate(tree.token_ids):
            logits = wider.forward(tokens).logits
            said.append(int(logits.argmax()))
            if temperature == 0:
                assert token == logits[:300].argmax()
            else:
                shares = (logits / 0.7).softmax(-1)[:300]
                torch.testing.assert_close(tree.probabilities[node], shares / shares.sum(), rtol=0, atol=1e-5)
                assert token < 300
            tokens.append(token)
    assert len(said) == 10
    assert max(said) >= 300  # it would have


@pytest.mark.parametrize("on_graphs", [False, True])
def test_greedy_answers_are_the_targets_whatever_a_model_with_more_ids_drafts(engine, wider, on_graphs):
    drafter = model_drafter("wider", wider, engine)
    if on_graphs:
        wider._runner = DecodeRunner(wider.decoder, wider.pool)  # as on a GPU
        model = DraftModel.of(wider, KnownIdsDecoder(wider.decoder, 300))
        drafter = ModelDrafter("wider", replace(model, runner=graph_runner(wider, model.decoder)), engine)
    for tokens in range(3, 40, 9):
        prompt = Prompt((Segment(tuple(range(5, 5 + tokens))),))
        for temperature in (0.0, 0.7):  # which is seen to go through; its distribution is tested below
            finished = run(engine, sampling(20, temperature=temperature), Drafting(drafter, limits=FIXED), prompt)
            if temperature == 0:
                assert finished.token_ids == run(engine, sampling(20), prompt=prompt).token_ids
                assert finished.draft.accepted == finished.draft.drafted > 10  # but for those ids it is the target
            else:
                assert finished.draft.accepted > 10


def test_rows_of_drafts_that_stood_are_not_computed_again(smaller, engine):
    drafter = ModelDrafter("smaller", DraftModel.of(smaller), engine)
    session = drafter.begin(DraftContext(PROMPT, sampling()))
    session.accept([33])
    (first,) = drafter.propose([session], [DraftBudget(4, 20)])
    (path,) = session.paths
    before = path.state.kv.num_tokens
    session.accept([*first.token_ids[:2], 250])  # two stood, and the target said something else then
    assert path.state.kv.num_tokens == before + 2
    assert path.pending == [250]
    (second,) = drafter.propose([session], [DraftBudget(3, 20)])
    fresh = drafter.begin(DraftContext(PROMPT, sampling()))
    fresh.accept([33, *first.token_ids[:2], 250])
    assert drafter.propose([fresh], [DraftBudget(3, 20)])[0].token_ids == second.token_ids
    session.close()
    fresh.close()


def test_a_draft_that_stood_whole_leaves_its_last_token_and_the_next_to_be_computed(smaller, engine):
    drafter = ModelDrafter("smaller", DraftModel.of(smaller), engine)
    session = drafter.begin(DraftContext(PROMPT, sampling()))
    session.accept([33])
    (tree,) = drafter.propose([session], [DraftBudget(3, 20)])
    session.accept([*tree.token_ids, 77])
    assert session.paths[0].pending == [tree.token_ids[-1], 77]
    session.close()


def test_requests_are_drafted_in_common_steps(smaller, engine, monkeypatch):
    model = DraftModel.of(smaller)
    drafter, calls = ModelDrafter("smaller", model, engine), []
    draft = type(model.runner).draft
    monkeypatch.setattr(
        type(model.runner), "draft", lambda self, states, *rest: calls.append(len(states)) or draft(self, states, *rest)
    )
    sessions = [drafter.begin(DraftContext(PROMPT, sampling())) for _ in range(3)]
    alone = []
    for token, session in enumerate(sessions, start=50):
        session.accept([token])
    together = drafter.propose(sessions, [DraftBudget(4, 9), DraftBudget(2, 9), DraftBudget(0, 0)])
    assert calls == [2]
    assert [len(tree) for tree in together] == [4, 2, 0]
    for token, tree in zip((50, 51), together, strict=False):
        session = drafter.begin(DraftContext(PROMPT, sampling()))
        session.accept([token])
        alone.append(drafter.propose([session], [DraftBudget(4, 9)])[0].token_ids[: len(tree)])
        session.close()
    assert [tree.token_ids for tree in together[:2]] == alone
    for session in sessions:
        session.close()


def test_all_blocks_are_free_after_an_answer(engine, smaller):
    free = engine.pool.num_free, smaller.pool.num_free
    run(engine, sampling(20), Drafting(everything(engine), limits=FIXED))
    run(engine, sampling(20), Drafting(ModelDrafter("smaller", DraftModel.of(smaller), engine), limits=FIXED))
    assert (engine.pool.num_free, smaller.pool.num_free) == free


def test_equal_seeds_give_equal_answers_though_lengths_adapt(engine):
    def tokens(seed):
        drafting = Drafting(self_drafter(engine, context_tokens=6))
        return run(engine, sampling(40, temperature=1.0, seed=seed), drafting).token_ids

    assert tokens(3) == tokens(3)
    assert tokens(3) != tokens(4)


@pytest.mark.parametrize(
    ("drafter", "top_p"),
    [("another model", 0.8), ("two prompts of its own", 1.0), ("more ids", 1.0), ("fewer ids", 0.9)],
)
def test_sampled_answers_that_a_model_drafts_have_the_distribution_of_the_target(engine, tmp_path, drafter, top_p):
    """Chi-square over the first two tokens, of which the second is drafted: by a pair of models, and as a tree."""
    config, runs, accepted = sampling(3, temperature=0.4, top_p=top_p), 300, 0
    chosen = self_drafter(engine, context_tokens=4, width=2)
    if drafter == "another model":
        other = hf_model("llama")  # the target, and noise
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.02)
        other.save_pretrained(tmp_path)
        write_tokenizer(tmp_path)
        chosen = ModelDrafter("other", DraftModel.of(Engine.load(tmp_path, device="cpu", dtype="float32")), engine)
    elif drafter in PADDED:
        chosen = model_drafter("other", padded_pair(tmp_path, PADDED[drafter], 0.02), engine)
    law, seen, ids = {}, Counter(), PROMPT.token_ids
    first = distribution(engine.forward(ids).logits, config)
    for token in first.topk(6).indices.tolist():
        second = distribution(engine.forward([*ids, token]).logits, config)
        law |= {(token, last): float(first[token] * second[last]) for last in second.topk(6).indices.tolist()}
    for seed in range(runs):
        finished = run(engine, replace(config, seed=seed), Drafting(chosen, limits=FIXED))
        seen[finished.token_ids[:2]] += 1
        accepted += finished.draft.accepted
    cells = [cell for cell in law if law[cell] * runs >= 5]
    rest = 1 - sum(law[cell] for cell in cells)
    expected = [*(law[cell] * runs for cell in cells), rest * runs]
    observed = [*(seen[cell] for cell in cells), runs - sum(seen[cell] for cell in cells)]
    freedom = len(cells)
    assert accepted > 5
    assert freedom >= 4
    assert rest * runs >= 5
    statistic = sum((count - want) ** 2 / want for count, want in zip(observed, expected, strict=True))
    score = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    assert 0.5 * math.erfc(score / math.sqrt(2)) > 1e-3


def test_transfer_without_strength_is_the_target_and_with_strength_follows_the_drafter(engine, smaller):
    drafter = ModelDrafter("smaller", DraftModel.of(smaller), engine)
    plain = run(engine, sampling(30)).token_ids
    assert run(engine, sampling(30), Drafting(drafter, Transfer(0.0), FIXED)).token_ids == plain
    moved = run(engine, sampling(30), Drafting(drafter, Transfer(1e4), FIXED))
    assert moved.token_ids != plain
    assert moved.draft.mode == "transfer"


def test_a_token_that_the_model_does_not_know_ends_its_drafts(smaller, engine):
    drafter, free = ModelDrafter("smaller", DraftModel.of(smaller), engine), smaller.pool.num_free
    session = drafter.begin(DraftContext(PROMPT, sampling()))
    session.accept([33, 295])
    assert drafter.propose([session], [DraftBudget(5, 20)]) == [DraftTree()]
    assert smaller.pool.num_free == free


def test_a_prompt_with_tokens_that_the_model_does_not_know_is_not_drafted(smaller, engine):
    prompt = Prompt((Segment((5, 6, 295, 7)),))
    finished = run(engine, sampling(12), Drafting(ModelDrafter("smaller", DraftModel.of(smaller), engine)), prompt)
    assert finished.token_ids == run(engine, sampling(12), prompt=prompt).token_ids
    assert finished.draft.drafted == 0


def test_drafts_end_where_the_window_of_the_model_ends(engine, tmp_path):
    hf_model("llama", max_position_embeddings=100).save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    shorter = Engine.load(tmp_path, device="cpu", dtype="float32")  # the same weights: all drafts stand
    drafter = ModelDrafter("shorter", DraftModel.of(shorter), engine)
    prompt = Prompt((Segment(tuple(range(5, 65))),))
    finished = run(engine, sampling(90), Drafting(drafter, limits=FIXED), prompt)
    assert finished.token_ids == run(engine, sampling(90), prompt=prompt).token_ids
    assert 32 <= finished.draft.accepted <= 40


def test_a_request_at_the_end_of_the_drafters_window_ends_no_other_drafts(engine, tmp_path):
    hf_model("llama", num_hidden_layers=2, max_position_embeddings=40).save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    short = Engine.load(tmp_path, device="cpu", dtype="float32", kv_tokens=64 * 8)
    drafter = ModelDrafter("short", DraftModel.of(short), engine)
    prompts = [PROMPT, Prompt((Segment(tuple(range(50, 88)), "long"),))]
    sessions = [drafter.begin(DraftContext(prompt, sampling())) for prompt in prompts]
    for session in sessions:
        session.accept([5, 6, 7, 8])
    trees = drafter.propose(sessions, [DraftBudget(3, 3)] * 2)
    for session in sessions:
        session.close()
    assert [len(tree) for tree in trees] == [3, 0]


def test_a_step_is_timed_over_all_requests_and_without_the_first_draft(smaller, engine, monkeypatch):
    took = iter([9000.0, 2.0, 3.0, 500.0])  # the first records graphs
    clock = [0.0]
    monkeypatch.setattr(drafter_model.time, "perf_counter", lambda: clock[0] / 1e3)
    model = DraftModel.of(smaller)
    draft = type(model.runner).draft

    def timed(self, states, pending, steps, drawn=None):
        clock[0] += next(took) * steps
        return draft(self, states, pending, steps, drawn)

    monkeypatch.setattr(type(model.runner), "draft", timed)
    drafter, known = ModelDrafter("smaller", model, engine), []
    sessions = [drafter.begin(DraftContext(PROMPT, sampling())) for _ in range(2)]
    for at in range(4):
        session = sessions[at % 2]
        session.accept([33])
        drafter.propose([session], [DraftBudget(3, 20)])
        known.append(session.step_ms)
    assert known == pytest.approx([0.0, 2.0, 2.3, 2.3 + 0.3 * 2 * 2.3])
    for session in sessions:
        session.close()


def test_what_drafts_by_graphs_takes_no_block_for_itself(tiny_folder):
    engine = Engine.load(tiny_folder, device="cpu", dtype="float32", kv_tokens=256)
    engine._runner = DecodeRunner(engine.decoder, engine.pool)  # as on a GPU
    free = engine.pool.num_free
    graph_runner(engine, engine.decoder)
    assert engine.pool.num_free == free


def test_drafted_answers_record_nothing_once_their_first_token_is_out(tiny_folder, monkeypatch):
    engine = Engine.load(tiny_folder, device="cpu", dtype="float32")
    engine._runner = DecodeRunner(engine.decoder, engine.pool)  # as on a GPU
    recorded, record = [], request_tables.RecordedForward.record
    monkeypatch.setattr(request_tables.RecordedForward, "record", lambda self: recorded.append(1) or record(self))
    model = replace(DraftModel.of(engine), runner=graph_runner(engine, engine.decoder))
    drafter = ModelDrafter("self", model, engine, lambda prompt: short_prompts(prompt, 6))
    of_the_drafter = len(recorded)
    assert of_the_drafter == 7  # four sizes of what it reads, moves, and a step drawn and not
    engine.prepare_drafting()
    assert len(recorded) == of_the_drafter + 7  # a plain step, five sizes of passes, and moves
    for temperature in (0.0, 1.0):
        for limits in (FIXED, DraftLimits(depth=5, nodes=20)):
            run(engine, sampling(40, temperature=temperature), Drafting(drafter, limits=limits))
    assert len(recorded) == of_the_drafter + 7


def test_what_is_recorded_ahead_leaves_all_blocks_and_waits_for_none(tiny_folder):
    engine = Engine.load(tiny_folder, device="cpu", dtype="float32", kv_tokens=256)
    engine._runner = DecodeRunner(engine.decoder, engine.pool)
    free = engine.pool.num_free
    engine.prepare_drafting()
    assert engine.pool.num_free == free
    with engine.admission.admitted(4):  # all there are
        asked = []
        engine.record_ahead(asked.append)
    assert asked == []


def test_the_prompt_of_a_4_bit_copy_is_read_by_the_true_weights(engine, tmp_path, monkeypatch):
    read = []
    for decoder, name in ((other := AttentionDroppingDecoder(engine.decoder, [1]), "copy"), (engine.decoder, "true")):
        of = decoder.run
        monkeypatch.setattr(
            decoder, "run", lambda ids, attend, of=of, name=name: read.append((name, len(ids))) or of(ids, attend)
        )
    drafter = self_drafter(engine, context_tokens=6, decoder=other, reader=engine.decoder)
    session = drafter.begin(DraftContext(PROMPT, sampling()))
    session.accept([33])
    drafter.propose([session], [DraftBudget(3, 20)])
    session.close()
    assert read == [("true", 10), ("copy", 1), ("copy", 1), ("copy", 1)]


def test_what_drafting_would_cost_is_told_without_a_session(engine, monkeypatch):
    long = Prompt((Segment((1,)), Segment((5,) * 180, "long"), Segment((6,) * 10, "short"), Segment((2,))))
    drafter = self_drafter(engine, context_tokens=10)
    session = drafter.begin(DraftContext(long, sampling()))
    price = drafter.price(long)
    assert price.step_share == session.step_share
    assert (price.step_ms, price.begin_ms, price.begin_tokens) == (0.0, 0.0, 12)
    session.close()

    class Blended:
        name = "blend"

    blended = self_drafter(engine, context_tokens=10, strategy=Blended())
    assert blended.price(long).begin_tokens == 3  # a quarter


def test_a_session_tells_what_it_has_not_read(engine):
    drafter = self_drafter(engine, context_tokens=6)
    session = drafter.begin(DraftContext(PROMPT, sampling(60)))
    session.accept(list(range(10, 40)))
    assert session.lag == 30
    drafter.propose([session], [DraftBudget(3, 20)])
    assert session.lag == 0
    session.accept([250])
    assert session.lag == 1
    session.close()


def test_drafting_from_other_chunks_reads_the_answer_again(engine):
    drafter = everything(engine)
    other = Prompt((Segment((1, 40)), Segment((7, 8, 9), "new"), Segment((90, 2))))
    session = drafter.begin(DraftContext(PROMPT, sampling()))
    session.accept([33, 44, 55])
    session.refresh(other)
    (tree,) = drafter.propose([session], [DraftBudget(5, 20)])
    tokens = list(run(engine, sampling(5), prompt=Prompt((*other.segments, Segment((33, 44, 55))))).token_ids)
    assert list(tree.token_ids) == tokens
    session.close()


def test_short_prompts_hold_the_best_chunks_in_their_order_and_all_that_is_no_chunk():
    (short,) = short_prompts(PROMPT, 6)
    assert [segment.chunk_id for segment in short.segments] == [None, "middle", "best", None]
    first, second = short_prompts(PROMPT, 6, width=2)
    assert [segment.chunk_id for segment in first.segments] == [None, "worst", "best", None]
    assert [segment.chunk_id for segment in second.segments] == [None, "middle", None]
    (bare,) = short_prompts(PROMPT, 1)
    assert bare.token_ids == (1, 40, 90, 2)
    assert len(short_prompts(PROMPT, 100, width=9)) == 3


@pytest.mark.parametrize(("tokens", "width"), [(0, 1), (5, 0)])
def test_short_prompts_of_nothing_are_refused(tokens, width):
    with pytest.raises(ConfigError, match="at least 1 token and 1 prompt"):
        short_prompts(PROMPT, tokens, width)


def test_a_step_of_the_short_prompt_is_priced_by_what_it_reads(engine):
    long = Prompt((Segment((1,)), Segment((5,) * 180, "long"), Segment((6,) * 10, "short"), Segment((2,))))
    drafter = self_drafter(engine, context_tokens=10)
    session = drafter.begin(DraftContext(long, sampling()))
    row, weights = engine.pool.layout.bytes_per_token, session._model.weight_bytes
    assert session.step_share == pytest.approx((weights + 12 * row) / (weights + 192 * row))
    session.close()


def test_dropped_attention_adds_nothing_and_greedy_answers_stay(engine):
    dropped = AttentionDroppingDecoder(engine.decoder, [2])
    zero = Engine.load(engine.folder, device="cpu", dtype="float32")
    ids = list(range(20, 40))
    output = zero.decoder.weights.layers[2].output

    class Nothing:
        def __call__(self, rows):
            return output(rows) * 0

    layers = list(zero.decoder.weights.layers)
    import dataclasses

    layers[2] = dataclasses.replace(layers[2], output=Nothing())
    zero.decoder.weights = dataclasses.replace(zero.decoder.weights, layers=tuple(layers))
    expected = zero.forward(ids).logits
    from ragkit.generation.attention import StandaloneAttention

    with torch.inference_mode():
        attend = StandaloneAttention(engine.rotary.table(20, 20), engine.decoder.scale)
        got = dropped.logits(dropped.run(ids, attend))[-1]
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    drafting = Drafting(self_drafter(engine, decoder=dropped), limits=FIXED)
    assert run(engine, sampling(), drafting).token_ids == run(engine, sampling()).token_ids


def test_the_layers_whose_attention_changes_least_are_found(engine):
    ids = list(range(20, 60))
    assert redundant_attention(engine, ids, 2) == (1, 2)
    (least,) = redundant_attention(engine, ids, 1)
    assert least in (1, 2)


@pytest.mark.parametrize("layers", [[0], [3], [1, 9]])
def test_attention_that_cannot_be_dropped_is_refused(engine, layers):
    with pytest.raises(ConfigError, match="in the layers 1 to 2"):
        AttentionDroppingDecoder(engine.decoder, layers)


def test_models_with_other_tokenizers_are_refused(engine, tmp_path):
    hf_model("llama").save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    text = (tmp_path / "tokenizer.json").read_text(encoding="utf-8")
    (tmp_path / "tokenizer.json").write_text(text.replace("<|im_end|>", "<|over|>"), encoding="utf-8")
    other = Engine.load(tmp_path, device="cpu", dtype="float32")
    with pytest.raises(ConfigError, match=r"other cannot draft for .*: their tokenizers differ"):
        ModelDrafter("other", DraftModel.of(other), engine)
    with pytest.raises(ConfigError, match=r"other cannot draft for .*: their tokenizers differ"):
        model_drafter("other", other, engine)


def test_models_that_may_draft_ids_that_the_target_lacks_are_refused(engine, wider):
    with pytest.raises(ConfigError, match=r"wider may draft 320 token ids, of which .* has 300: draft by a Known"):
        ModelDrafter("wider", DraftModel.of(wider), engine)
    for count in (0, 301):
        with pytest.raises(ConfigError, match=f"1 to 300 token ids can be left of a model's, got {count}"):
            KnownIdsDecoder(engine.decoder, count)


def test_an_answer_goes_on_without_drafts_where_there_is_no_room_for_them(engine, tiny_folder):
    small = Engine.load(tiny_folder, device="cpu", dtype="float32", kv_tokens=64)
    free = small.pool.num_free
    finished = run(small, sampling(20), Drafting(everything(small), limits=FIXED))
    assert finished.token_ids == run(engine, sampling(20)).token_ids
    assert finished.draft.drafted == 0
    assert [warning.startswith("drafting ended after 0 steps: asked for") for warning in finished.warnings] == [True]
    assert small.pool.num_free == free


def test_a_prompt_that_fills_the_drafters_window_is_refused(engine):
    drafter = everything(engine)
    with pytest.raises(CacheCapacityError, match="give fewer chunks"):
        drafter.begin(DraftContext(Prompt((Segment((5,) * 256),)), sampling(1)))


def test_a_request_beside_a_drafted_one_finds_the_blocks_that_it_was_let_in_for(engine, tiny_folder):
    small = Engine.load(tiny_folder, device="cpu", dtype="float32", kv_tokens=10 * 64)
    prompt = Prompt((Segment(tuple(range(5, 205))),))  # with its answer 5 blocks, of which 4 are used
    drafted = small.generate(prompt, sampling(50), drafting=Drafting(everything(small), limits=FIXED))
    tokens = [next(drafted).token_id for _ in range(3)]
    other = []
    thread = threading.Thread(target=lambda: other.append(run(small, sampling(50), prompt=prompt)))
    thread.start()
    thread.join(0.3)  # without drafts it would fit beside the first; with them it waits
    *rest, finished = drafted
    thread.join(60)
    plain = run(engine, sampling(50), prompt=prompt)
    assert other[0].token_ids == plain.token_ids == finished.token_ids
    assert finished.token_ids == (*tokens, *(step.token_id for step in rest))
