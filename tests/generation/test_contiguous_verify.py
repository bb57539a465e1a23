"""One pass over drafted tokens gives the logits, and leaves the rows, of plain steps."""

import pytest
import torch

from ragkit.generation import contiguous_decode, contiguous_verify
from ragkit.generation.contiguous_decode import ContiguousDecodeRunner
from ragkit.generation.contiguous_verify import ContiguousVerifier
from ragkit.generation.draft_tree import ROOT, DraftTree
from ragkit.generation.full_prefill import FullPrefill
from ragkit.generation.rotary_cache import RotaryCache
from ragkit.kvcache.pool import KVPool
from ragkit.kvcache.request_kv import RequestKV, pack_rows

from .conftest import decoder_of, hf_model

TOKENS = torch.randint(3, 300, (90,), generator=torch.Generator().manual_seed(2))
#       5 - 8 - 3
#  last <   \ 9 - 4
#       6 - 7
TREE = DraftTree((5, 6, 8, 9, 7, 3, 4), (ROOT, ROOT, 0, 0, 1, 2, 3))


@pytest.fixture(params=["llama", "qwen3"])
def decoder(request):
    return decoder_of(hf_model(request.param))


@pytest.fixture(params=["few rows", "many rows"], autouse=True)
def attention(request, monkeypatch):
    """Behind many rows a CPU attends in bf16 by other products; here both in fp32."""
    for module in (contiguous_decode, contiguous_verify):
        monkeypatch.setattr(module, "takes_few_tokens", lambda rows, count: request.param == "many rows")


def begun(decoder, pool, length):
    kv, rotary = RequestKV(pool), RotaryCache(decoder).table(256, 90)
    FullPrefill().extend(decoder, kv, rotary, TOKENS[:length])
    kv.reserve(length + 20)
    return ContiguousDecodeRunner(decoder).begin(kv, rotary)


def stepped(decoder, pool, length, tokens):
    """Return the state after plain steps, and the logits of each."""
    state, runner = begun(decoder, pool, length), ContiguousDecodeRunner(decoder)
    return state, [runner.step([state], [token])[0] for token in tokens]


def rows_of(state):
    packed = pack_rows([state.kv])
    return [state.kv.rows(layer, packed) for layer in range(state.kv.pool.layout.num_layers)], packed.positions


def assert_same_rows(state, wanted):
    (rows, positions), (expected, places) = rows_of(state), rows_of(wanted)
    assert torch.equal(positions, places)
    count = len(positions)
    for own, theirs in zip(rows, expected, strict=True):
        for one, other in zip(own, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=2e-4)
    for own, theirs in zip(state.private, wanted.private, strict=True):
        for one, other in zip(own, theirs, strict=True):
            torch.testing.assert_close(one[:, :count], other[:, :count], rtol=0, atol=2e-4)


@torch.inference_mode()
def test_the_logits_behind_every_node_are_those_of_steps_along_its_path(decoder):
    pool = KVPool(decoder.layout, 40, decoder.device)
    (logits,) = ContiguousVerifier(decoder).verify([begun(decoder, pool, 40)], [77], [TREE])
    assert logits.shape == (8, 300)
    for node in range(ROOT, len(TREE)):
        path = [TREE.token_ids[at] for at in TREE.path(node)]
        _, expected = stepped(decoder, pool, 40, [77, *path])
        torch.testing.assert_close(logits[node + 1], expected[-1], rtol=0, atol=2e-4)


@torch.inference_mode()
@pytest.mark.parametrize("accepted", [(), (0,), (1, 4), (0, 3, 6), (0, 2, 5)])
def test_committed_rows_are_those_that_plain_steps_write(decoder, accepted):
    pool = KVPool(decoder.layout, 40, decoder.device)
    state, verifier = begun(decoder, pool, 50), ContiguousVerifier(decoder)
    verifier.verify([state], [77], [TREE])
    verifier.commit(state, accepted)
    wanted, _ = stepped(decoder, pool, 50, [77, *(TREE.token_ids[node] for node in accepted)])
    assert state.kv.num_tokens == 51 + len(accepted)
    assert_same_rows(state, wanted)


@torch.inference_mode()
def test_rows_that_nothing_was_written_to_are_numbers(decoder, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda own, shape: own.new_full(shape, torch.nan))
    state = begun(decoder, KVPool(decoder.layout, 40, decoder.device), 40)
    (logits,) = ContiguousVerifier(decoder).verify([state], [77], [TREE])
    assert logits.isfinite().all()


@torch.inference_mode()
def test_requests_of_one_pass_get_what_they_get_alone(decoder):
    pool, verifier = KVPool(decoder.layout, 40, decoder.device), ContiguousVerifier(decoder)
    trees, lengths = [DraftTree.chain([4, 5]), DraftTree(), TREE], [23, 90, 64]
    alone = [
        verifier.verify([begun(decoder, pool, length)], [9], [tree])[0]
        for length, tree in zip(lengths, trees, strict=True)
    ]
    together = verifier.verify([begun(decoder, pool, length) for length in lengths], [9, 9, 9], trees)
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-4)


@torch.inference_mode()
def test_passes_may_follow_each_other_and_steps(decoder):
    pool, verifier = KVPool(decoder.layout, 40, decoder.device), ContiguousVerifier(decoder)
    state = begun(decoder, pool, 30)
    verifier.verify([state], [11], [TREE])
    verifier.commit(state, (1, 4))
    ContiguousDecodeRunner(decoder).step([state], [12])
    (logits,) = verifier.verify([state], [13], [DraftTree.chain([14])])
    verifier.commit(state, (0,))
    wanted, steps = stepped(decoder, pool, 30, [11, 6, 7, 12, 13, 14])
    torch.testing.assert_close(logits, torch.stack(steps[-2:]), rtol=0, atol=2e-4)
    assert_same_rows(state, wanted)
