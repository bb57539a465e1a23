"""Passes over drafted tokens and drafts of several steps, compared with plain steps; on a GPU they are graphs."""

import pytest
import torch
from draft_doubles import ScriptedDrafter, random_trees

from ragkit.errors import GenerationError
from ragkit.generation import request_tables
from ragkit.generation.acceptance import Acceptance
from ragkit.generation.decode_runner import DecodeRunner
from ragkit.generation.decode_state import DecodeState
from ragkit.generation.draft_costs import NominalCosts
from ragkit.generation.draft_runner import DraftRunner, DrawnSteps
from ragkit.generation.draft_tree import DraftTree
from ragkit.generation.full_prefill import FullPrefill
from ragkit.generation.rotary_cache import RotaryCache
from ragkit.generation.sampling import SamplingConfig
from ragkit.generation.speculative_decode import Drafting, SpeculativeRequest, advance
from ragkit.generation.verify_runner import MOST_NODES, VerifyRunner
from ragkit.kvcache.pool import KVPool
from ragkit.kvcache.request_kv import RequestKV
from ragkit.kvcache.rope import RotaryTable
from ragkit.types import Prompt, Segment

from .conftest import decoder_of, hf_model

TOKENS = torch.randint(3, 300, (60,), generator=torch.Generator().manual_seed(2))
LIMIT = 1e-4 if not torch.cuda.is_available() else 2e-3  # of logits that are about 10 in size
# 0 and 1 follow the last token, 2 and 3 follow 0, 4 follows 3, 5 follows 1.
TREE = DraftTree((20, 30, 21, 22, 23, 31), (-1, -1, 0, 0, 3, 1))


class Scene:
    """One model with its runners, and requests over the first tokens."""

    def __init__(self):
        model = hf_model("llama")
        torch.backends.cuda.matmul.allow_tf32 = False
        self.decoder = decoder_of(model.cuda() if torch.cuda.is_available() else model)
        self.pool = KVPool(self.decoder.layout, 60, self.decoder.device)
        self.steps = DecodeRunner(self.decoder, self.pool)
        self.verify = VerifyRunner(self.decoder, self.pool, self.steps.scratch_slot)
        self.drafts = DraftRunner(self.decoder, self.pool, self.steps.scratch_slot)
        self.rotary = RotaryCache(self.decoder).table(256, 60)

    def request(self, length, room=60):
        kv = RequestKV(self.pool)
        FullPrefill().extend(self.decoder, kv, self.rotary, TOKENS[:length].to(self.decoder.device))
        kv.reserve(length + room)
        return self.steps.begin(kv, self.rotary)

    def plain(self, length, tokens):
        """Return (tokens, vocab_size) logits after each of `tokens` behind the first `length`, by plain steps."""
        state = self.request(length)
        logits = torch.cat([self.steps.step([state], [token]) for token in tokens])
        state.kv.release()
        return logits


@pytest.fixture(scope="module")
def scene():
    return Scene()


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.inference_mode():
        yield


def _close(got, expected):
    torch.testing.assert_close(got, expected, rtol=0, atol=LIMIT)


@pytest.mark.parametrize("nodes", [0, 1, 5, 8])
def test_a_chain_gives_the_logits_of_plain_steps(nodes, scene):
    tokens = TOKENS[40 : 41 + nodes].tolist()
    state = scene.request(40)
    (got,) = scene.verify.verify([state], tokens[:1], [DraftTree.chain(tokens[1:])])
    _close(got, scene.plain(40, tokens))
    state.kv.release()


def test_every_node_of_a_tree_gets_the_logits_of_its_own_path(scene):
    state = scene.request(50)
    (got,) = scene.verify.verify([state], [7], [TREE])
    for node in range(-1, len(TREE)):
        path = [7, *(TREE.token_ids[each] for each in TREE.path(node))]
        _close(got[node + 1], scene.plain(50, path)[-1])
    state.kv.release()


@pytest.mark.parametrize("accepted", [(), (0,), (1, 5), (0, 3, 4), (0, 2)])
def test_what_is_committed_goes_on_as_if_plain_steps_had_written_it(accepted, scene):
    state = scene.request(50)
    scene.verify.verify([state], [7], [TREE])
    scene.verify.commit(state, accepted)
    assert state.kv.num_tokens == 51 + len(accepted)
    tokens = [7, *(TREE.token_ids[node] for node in accepted), 90]
    _close(scene.steps.step([state], [90])[0], scene.plain(50, tokens)[-1])
    (got,) = scene.verify.verify([state], [91], [DraftTree.chain([92])])
    _close(got, scene.plain(50, [*tokens, 91, 92])[-2:])
    state.kv.release()


def test_requests_of_different_trees_do_not_disturb_each_other(scene):
    lengths, trees = (40, 23, 57), (TREE, DraftTree(), DraftTree.chain([5, 6]))
    states = [scene.request(length) for length in lengths]
    together = scene.verify.verify(states, [7, 8, 9], trees)
    for length, token, tree, got in zip(lengths, (7, 8, 9), trees, together, strict=True):
        alone = scene.request(length)
        _close(got, scene.verify.verify([alone], [token], [tree])[0])
        alone.kv.release()
    for state in states:
        state.kv.release()


def test_the_logits_of_a_pass_outlast_the_next(scene):
    states = [scene.request(length) for length in (40, 23)]
    (first,) = scene.verify.verify(states[:1], [5], [DraftTree.chain([6])])
    kept = first.clone()
    scene.verify.verify(states[1:], [7], [DraftTree.chain([8])])
    assert torch.equal(first, kept)
    for state in states:
        state.kv.release()


def test_passes_of_all_sizes_share_the_tables_of_a_request_until_a_longer_rotary_table_comes(scene, monkeypatch):
    scene.plain(40, [7])  # plain steps have tables of their own, which other tests may not have made yet
    verify, made = VerifyRunner(scene.decoder, scene.pool, scene.steps.scratch_slot), []
    of_tables = request_tables.RequestTables.__init__
    monkeypatch.setattr(
        request_tables.RequestTables, "__init__", lambda self, *args: made.append(args[1:4]) or of_tables(self, *args)
    )
    state = scene.request(40)
    for nodes in (0, 1, 3, 9):
        verify.verify([state], [7], [DraftTree.chain(range(20, 20 + nodes))])
    assert made == [(1, 256, False)]
    longer = DecodeState(state.kv, RotaryTable.build(scene.decoder.config.rope, 8, 300, scene.pool.device, 0))
    for nodes in (3, 1):
        tokens = [7, *range(20, 20 + nodes)]
        (got,) = verify.verify([longer], tokens[:1], [DraftTree.chain(tokens[1:])])
        _close(got, scene.plain(40, tokens))
    assert made == [(1, 256, False)] * 2
    state.kv.release()


def test_rows_are_moved_once_though_the_first_recording_failed(scene, monkeypatch):
    verify = VerifyRunner(scene.decoder, scene.pool, scene.steps.scratch_slot)
    moves, runs = verify._moves, []
    record = moves._recorded.record

    def noted(recording):
        runs.append(moves._inputs.device.clone())
        return recording() if len(runs) > 1 else 1 / 0

    monkeypatch.setattr(moves._recorded, "record", lambda: noted(record))
    run = moves._recorded.run
    monkeypatch.setattr(moves._recorded, "run", lambda: noted(run))
    for _ in range(2):
        try:
            moves.run([(5, 6)])
        except ZeroDivisionError:
            assert len(runs) == 1
    unused = [scene.steps.scratch_slot] * 2
    assert [run[:, 0].tolist() for run in runs] == [unused, unused, [5, 6]]


@pytest.fixture
def recordings(monkeypatch):
    """Return what was recorded since, by the name of its class."""
    made, record = [], request_tables.RecordedForward.record
    monkeypatch.setattr(
        request_tables.RecordedForward,
        "record",
        lambda self: made.append(self._forward.__self__.__class__.__module__) or record(self),
    )
    return made


def test_what_was_prepared_records_nothing_while_it_answers(scene, recordings):
    steps = DecodeRunner(scene.decoder, scene.pool)
    verify = VerifyRunner(scene.decoder, scene.pool, steps.scratch_slot)
    drafts = DraftRunner(scene.decoder, scene.pool, steps.scratch_slot)
    rows = scene.request(40)
    for _ in range(2):
        steps.prepare([rows])
        verify.prepare([rows])
        drafts.prepare([rows])
    # Of passes five sizes and the moves, of a draft four sizes, the moves, and a step drawn and not.
    assert len(recordings) == 1 + 6 + 7
    state = scene.request(40)
    steps.step([state], [7])
    for nodes in (1, 3, 6, 15, 31):
        tree = DraftTree((*range(20, 20 + nodes), 9), (*range(-1, nodes - 1), -1)) if nodes < 31 else DraftTree.chain(
            range(20, 51)
        )  # fmt: skip
        verify.verify([state], [7], [tree])
        verify.commit(state, [nodes] if nodes < 31 else [])
    for pending in ([7], [7, 8], [*range(10, 22)], [*range(10, 40)], [*range(10, 50)]):
        state.kv.num_tokens = 50
        drafts.draft([state], [pending], 4)
        state.kv.num_tokens = 50
        drafts.draft([state], [pending], 2, DrawnSteps(1.0, torch.full((1, 2), 0.5)))
    assert len(recordings) == 14
    for one in (rows, state):
        one.kv.release()


def test_preparing_writes_no_row_of_a_request(scene, monkeypatch):
    monkeypatch.setattr(request_tables.RecordedForward, "record", lambda self: self._forward())  # as on a GPU
    state = scene.request(40)
    slots = [state.kv.slot(at) for at in range(100)]
    for pool in (*scene.pool.keys, *scene.pool.values):
        pool.flatten(0, 1)[slots] = 3.0
    verify = VerifyRunner(scene.decoder, scene.pool, scene.steps.scratch_slot)
    DecodeRunner(scene.decoder, scene.pool).prepare([state])
    verify.prepare([state])
    DraftRunner(scene.decoder, scene.pool, scene.steps.scratch_slot).prepare([state])
    for pool in (*scene.pool.keys, *scene.pool.values):
        assert (pool.flatten(0, 1)[slots] == 3.0).all()
    state.kv.release()


@pytest.mark.parametrize(
    ("pending", "by_reader", "by_drafter"),
    [
        (1, [], [1]), (2, [], [2]), (3, [3], []), (17, [17], []), (32, [32], []), (34, [32], [2]), (45, [32, 13], []),
        (129, [128], [1]),
    ],
)  # fmt: skip
def test_what_a_draft_is_behind_by_more_than_two_tokens_is_read_by_the_reader(
    pending, by_reader, by_drafter, scene, monkeypatch
):
    reader, read = decoder_of(hf_model("llama")), []
    reader.weights = scene.decoder.weights
    verify, extend = VerifyRunner.verify, FullPrefill.extend

    def verified(self, states, tokens, trees):
        read.append((self._decoder, 1 + len(trees[0])))
        return verify(self, states, tokens, trees)

    def extended(self, decoder, kv, rotary, ids):
        read.append((decoder, len(ids)))
        return extend(self, decoder, kv, rotary, ids)

    drafts = DraftRunner(scene.decoder, scene.pool, scene.steps.scratch_slot, reader)
    state = scene.request(20, room=140)
    monkeypatch.setattr(VerifyRunner, "verify", verified)
    monkeypatch.setattr(FullPrefill, "extend", extended)
    drafts.draft([state], [[*range(10, 10 + pending)]], 3)
    assert read == [(reader, count) for count in by_reader] + [(scene.decoder, count) for count in by_drafter]
    state.kv.release()


def test_more_drafted_tokens_than_a_pass_takes_are_refused(scene):
    state = scene.request(20)
    with pytest.raises(GenerationError, match=f"at most {MOST_NODES} drafted tokens of a request, got 32"):
        scene.verify.verify([state], [7], [DraftTree.chain([5] * 32)])
    state.kv.release()


@pytest.mark.parametrize("pending", [[7], [7, 8], [7, 8, 9], [*range(10, 50)]])
def test_drafted_tokens_are_those_of_greedy_steps(pending, scene):
    state, tokens = scene.request(40), list(pending)
    (chain,) = scene.drafts.draft([state], [pending], 5)
    assert state.kv.num_tokens == 40 + len(pending)
    expected = []
    for _ in range(5):
        expected.append(int(scene.plain(40, tokens)[-1].argmax()))
        tokens.append(expected[-1])
    assert list(chain.token_ids) == expected
    assert chain.is_chain
    assert chain.probabilities is None
    state.kv.release()


def test_rows_of_kept_drafts_need_not_be_written_again(scene):
    state = scene.request(40)
    (chain,) = scene.drafts.draft([state], [[7]], 4)
    state.kv.num_tokens += 3  # all stand, and the row of the last is not written
    (further,) = scene.drafts.draft([state], [[chain.token_ids[3], 90]], 2)
    fresh = scene.request(40)
    (expected,) = scene.drafts.draft([fresh], [[7, *chain.token_ids, 90]], 2)
    assert further.token_ids == expected.token_ids
    for each in (state, fresh):
        each.kv.release()


def test_several_requests_draft_as_each_alone(scene):
    lengths, pending = (40, 23, 57), [[7], [8, 9], [10]]
    states = [scene.request(length) for length in lengths]
    together = scene.drafts.draft(states, pending, 4)
    for length, tokens, chain in zip(lengths, pending, together, strict=True):
        alone = scene.request(length)
        assert scene.drafts.draft([alone], [tokens], 4)[0].token_ids == chain.token_ids
        alone.kv.release()
    for state in states:
        state.kv.release()


def test_drawn_tokens_come_with_the_distribution_that_they_were_drawn_from(scene):
    state = scene.request(40)
    uniforms = torch.tensor([[0.1, 0.9, 0.5]])
    (chain,) = scene.drafts.draft([state], [[7]], 3, DrawnSteps(2.0, uniforms))
    tokens = [7, *chain.token_ids]
    expected = (scene.plain(40, tokens[:3]).double() / 2).softmax(-1)
    torch.testing.assert_close(chain.probabilities.double(), expected, rtol=0, atol=1e-4)
    reached = expected.cumsum(-1).cpu()
    for step, token in enumerate(chain.token_ids):
        below = float(reached[step, token - 1]) if token else 0.0
        assert below - 1e-4 <= float(uniforms[0, step]) <= float(reached[step, token]) + 1e-4
    state.kv.release()


def test_nothing_pending_or_too_many_steps_are_refused(scene):
    state = scene.request(20)
    for pending, steps in (([[]], 2), ([[7]], 0), ([[7]], 33)):
        with pytest.raises(GenerationError, match="steps behind at least one token"):
            scene.drafts.draft([state], pending, steps)
    state.kv.release()


@pytest.mark.parametrize("seed", range(4))
def test_drafted_greedy_answers_are_those_of_plain_steps(seed, scene):
    plain = [int(scene.plain(40, [7])[-1].argmax())]
    while len(plain) < 24:
        plain.append(int(scene.plain(40, [7, *plain])[-1].argmax()))
    state = scene.request(40)
    first = scene.steps.step([state], [7])[0]
    drafting = Drafting(ScriptedDrafter(random_trees(seed, 300, plain)))
    request = SpeculativeRequest(
        drafting, Prompt((Segment((1,)),)), SamplingConfig(max_new_tokens=24), frozenset(), NominalCosts()
    )
    request.state = state
    request.first(first)
    while request.reason is None:
        advance([request], scene.steps, scene.verify)
    assert request.token_ids == plain
    assert request.use().accepted > 0
    state.kv.release()


def test_drafts_of_the_model_itself_all_stand(scene):
    state, drafter = scene.request(40), scene.request(40)
    token, pending, answer = 7, [7], []
    for _ in range(3):
        (chain,) = scene.drafts.draft([drafter], [pending], 4)
        (logits,) = scene.verify.verify([state], [token], [chain])
        nodes, token = Acceptance(SamplingConfig(temperature=0)).accept(logits, chain)
        assert nodes == (0, 1, 2, 3)
        scene.verify.commit(state, nodes)
        drafter.kv.num_tokens += 3  # the row of the last draft is not written
        pending = [chain.token_ids[3], token]
        answer += [*chain.token_ids, token]
    expected = scene.plain(40, [7, *answer[:-1]]).argmax(-1).tolist()
    assert answer == expected
    for each in (state, drafter):
        each.kv.release()
