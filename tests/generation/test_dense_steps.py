"""Recorded steps against plain ones. Without a GPU a recorder stands in that does the work again at each replay."""

import logging

import pytest
import torch

from ragkit.generation.dense_steps import MOST_ROWS, DenseSteps, PlainSteps
from ragkit.generation.question_pass import question_mass
from ragkit.generation.reused_rows import ReusedRows
from ragkit.generation.rotary_cache import RotaryCache
from ragkit.kvcache.token_selection import LayerRange

from .conftest import decoder_of, hf_model

FAMILIES = {"llama": {}, "qwen3": {"head_dim": 32}, "qwen2": {}}
BEFORE = 90  # rows before the question
ALL_LAYERS = LayerRange(0, 1)


class FakeRecorder:
    def __init__(self, log):
        self.log = log

    def begin(self):
        self.log.append("begin")

    def record(self, work):
        self.log.append("record")
        work()

        def replay():
            self.log.append("replay")
            work()

        return replay

    def end(self):
        self.log.append("end")

    def wait(self):
        self.log.append("wait")


@pytest.fixture(params=FAMILIES)
def decoder(request):
    return decoder_of(hf_model(request.param, **FAMILIES[request.param]))


@pytest.fixture
def llama():
    return decoder_of(hf_model("llama"))


def _log_of(decoder, **settings):
    log = []
    decoder.dense_steps = DenseSteps(lambda: FakeRecorder(log), **settings)
    return log


@torch.inference_mode()
def _mass(decoder, tokens, seed=0):
    draw = torch.Generator().manual_seed(seed)
    rows = ReusedRows.unwritten(decoder, BEFORE + tokens)
    for layer in rows.layers:
        for part in layer:
            part.copy_(torch.randn(part.shape, generator=draw))
    ids = torch.randint(3, 300, (tokens,), generator=draw).to(decoder.device)
    rotary = RotaryCache(decoder).table(BEFORE + tokens, BEFORE + tokens)
    return question_mass(decoder, rotary, rows, ids, ALL_LAYERS), rows


def _same(got, expected, **limits):
    torch.testing.assert_close(got[0], expected[0], **limits)
    for mine, other in zip(got[1].layers, expected[1].layers, strict=True):
        torch.testing.assert_close(mine, other, **limits)


def test_recorded_steps_give_the_numbers_of_plain_ones_whatever_other_questions_left_in_the_buffers(decoder):
    expected = [_mass(decoder, tokens, seed) for seed, tokens in enumerate((20, 32, 17, 20))]
    _log_of(decoder)
    for tokens in (25, 25):
        _mass(decoder, tokens, 9)
    got = [_mass(decoder, tokens, seed) for seed, tokens in enumerate((20, 32, 17, 20))]
    for one, other in zip(got, expected, strict=True):
        _same(one, other, rtol=0, atol=1e-4)


def test_a_bucket_is_recorded_when_it_is_asked_for_again_and_replayed_from_then_on(llama):
    log = _log_of(llama)
    _mass(llama, 20)
    assert log == []
    _mass(llama, 31)  # 32 rows as well
    assert log == ["begin", *["record"] * 3, "end"]
    log.clear()
    _mass(llama, 17)
    assert log == ["begin", *["replay"] * 3, "end"]


def test_layers_that_no_pass_came_to_before_are_recorded_when_one_does(llama):
    log = _log_of(llama)
    llama_ids = torch.arange(3, 13)

    def pass_over(layers):
        with torch.inference_mode(), llama.dense_steps.of(llama, 10) as steps:
            queries = steps.first(llama_ids).queries
            for layer in range(layers - 1):
                queries = steps.following(layer, queries).queries

    pass_over(1)
    pass_over(1)
    pass_over(3)
    assert log == ["begin", "record", "end", "begin", "replay", "record", "record", "end"]


def test_a_pass_beside_another_one_launches_step_by_step(llama):
    log = _log_of(llama)
    _mass(llama, 20)
    expected = _mass(llama, 20)
    log.clear()
    with llama.dense_steps.of(llama, 20):
        _same(_mass(llama, 20), expected, rtol=0, atol=1e-4)
        assert log == ["begin"]
    _mass(llama, 20)
    assert log == ["begin", "end", "begin", *["replay"] * 3, "end"]


def test_after_an_error_in_a_pass_the_next_one_has_the_buffers(llama):
    log = _log_of(llama)
    _mass(llama, 20)
    with pytest.raises(ZeroDivisionError), llama.dense_steps.of(llama, 20):
        raise ZeroDivisionError
    assert log == ["begin", "end"]
    _mass(llama, 20)
    assert log[2:] == ["begin", *["record"] * 3, "end"]


def test_long_questions_are_never_recorded_and_never_padded(llama):
    log = _log_of(llama)
    for _ in range(3):
        with llama.dense_steps.of(llama, MOST_ROWS + 1) as steps:
            assert isinstance(steps, PlainSteps)
            assert len(steps._padded(torch.empty(MOST_ROWS + 1))) == MOST_ROWS + 1
    assert log == []


def test_the_bucket_that_was_not_used_for_longest_goes_once_the_device_is_done_with_it(llama):
    log = _log_of(llama, most_buckets=2)
    for tokens in (10, 20, 40):
        _mass(llama, tokens)  # seen once
    for tokens in (10, 20, 10):
        _mass(llama, tokens)
    log.clear()
    _mass(llama, 40)
    assert log[:2] == ["wait", "begin"]
    log.clear()
    _mass(llama, 10)
    assert "record" not in log
    _mass(llama, 20)
    assert log.count("record") == 3


def test_on_a_cpu_nothing_is_padded_or_recorded(llama):
    for _ in range(3):
        with llama.dense_steps.of(llama, 13) as steps:
            assert isinstance(steps, PlainSteps)
            assert len(steps._padded(torch.empty(13))) == 13


def _cuda(decoder_of_family, dtype):
    return decoder_of(hf_model(decoder_of_family, **FAMILIES[decoder_of_family]).to("cuda", dtype))


on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_graphs_give_the_bits_of_plain_launches(family, dtype, caplog):
    decoder = _cuda(family, dtype)
    settings = [(20, 0), (31, 1), (17, 2), (32, 3), (20, 0)]
    with caplog.at_level(logging.WARNING):
        for tokens, seed in settings:
            decoder.dense_steps = DenseSteps.on(decoder.device)
            expected = _mass(decoder, tokens, seed)  # the first of its bucket: plain
            for other in (1, 2, 3):
                _mass(decoder, 32 - other, 10 + other)
            _same(_mass(decoder, tokens, seed), expected, rtol=0, atol=0)
    assert not caplog.records


@pytest.mark.gpu
@on_gpu
def test_rows_that_another_question_left_as_nan_do_not_matter():
    decoder = _cuda("llama", torch.bfloat16)
    expected = _mass(decoder, 20)
    _mass(decoder, 20)
    bucket = next(iter(decoder.dense_steps._buckets._made.values()))
    for buffer in (bucket._attended, bucket._residual, bucket._heads):
        buffer.fill_(float("nan"))
    _same(_mass(decoder, 20), expected, rtol=0, atol=0)


@pytest.mark.gpu
@on_gpu
def test_passes_of_two_streams_in_turns_keep_their_numbers():
    decoder = _cuda("llama", torch.bfloat16)
    expected = [_mass(decoder, 20, seed)[0] for seed in range(2)]
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    got = []
    for turn in range(20):
        with torch.cuda.stream(streams[turn % 2]):
            got.append(_mass(decoder, 20, turn % 2)[0])
    torch.cuda.synchronize()
    for turn, mass in enumerate(got):
        torch.testing.assert_close(mass, expected[turn % 2], rtol=0, atol=0)
