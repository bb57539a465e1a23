"""The path of a GPU, its kernels interpreted: what a decoding step launches, and that it never asks the device."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ragkit.config import PagePositions
from ragkit.errors import KVCacheError
from ragkit.generation.page_decode import PageSteps
from ragkit.generation.page_options import PageOptions
from ragkit.generation.paged_prefill import PagedPrefill
from ragkit.generation.rotary_cache import RotaryCache
from ragkit.kernels.launched import LaunchedKernel
from ragkit.kvcache.page_selectors import make_page_selector
from ragkit.kvcache.page_window import WindowRows

from .conftest import decoder_of, hf_model
from .test_paged_prefill import QUESTION, TOKENS, logits_over, pages_of, read

OPTIONS = PageOptions(
    make_page_selector("min-max"), page_size=16, sink_pages=1, local_pages=1, budget_pages=2, found_times=2,
    window_tokens=32,
)  # fmt: skip
SELECTORS = ["mean-key", "min-max", "low-rank", "soft-vote", "centroids", "centroids-2"]
ASKS_THE_DEVICE = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal", "is_nonzero")


@pytest.fixture(scope="module")
def llama():
    return decoder_of(hf_model("llama", num_hidden_layers=2))


@pytest.fixture
def launches(monkeypatch):
    """The names of all kernels of ours that are launched."""
    names = []
    launch = LaunchedKernel._launch

    def noted(self, grid, *arguments, **constants):
        names.append(self.source.fn.__name__ if hasattr(self.source, "fn") else self.source.__name__)
        launch(self, grid, *arguments, **constants)

    monkeypatch.setattr(LaunchedKernel, "_launch", noted)
    return names


class Watched(TorchDispatchMode):
    """Counts torch's operations that launch something, and refuses those that wait for the device."""

    def __init__(self):
        super().__init__()
        self.launched = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().split("::")[1].split(".")[0]
        assert name not in ASKS_THE_DEVICE, f"{name} waits for the device"
        if name == "index" or name == "index_put_":
            assert all(index is None or index.dtype != torch.bool for index in args[1]), "a mask waits for the device"
        if not function.is_view and name not in ("empty", "new_empty", "empty_like", "detach"):
            self.launched[name] += 1
        return function(*args, **(kwargs or {}))


def steps_over(decoder, pages, prefill, tokens=3):
    attend = prefill.attention(pages, len(QUESTION) + tokens)
    attend.begin(len(QUESTION), choose=True)
    decoder.run(torch.tensor(QUESTION), attend)
    return attend, PageSteps(decoder, [attend], [len(QUESTION)], None)


@pytest.mark.parametrize(
    ("codec", "per_key_head", "positions"),
    [
        ("fp32", False, PagePositions.REINDEXED), ("int8", True, PagePositions.REINDEXED),
        ("int4", False, PagePositions.CLAMPED), ("int4", True, PagePositions.TRUE),
    ],
)  # fmt: skip
def test_the_kernels_answer_as_the_cpu_does(llama, be_a_gpu, codec, per_key_head, positions):
    options = replace(OPTIONS, per_key_head=per_key_head, positions=positions)
    pages, prefill = read(llama, TOKENS[:137], options, codec=codec, resident=True)
    expected = logits_over(llama, pages, prefill, then=(5,))
    be_a_gpu()
    torch.testing.assert_close(logits_over(llama, pages, prefill, then=(5,)), expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize("selector", SELECTORS)
def test_every_selector_answers_by_its_kernels_as_on_the_cpu(llama, be_a_gpu, selector):
    options = replace(OPTIONS, selector=make_page_selector(selector))
    pages, prefill = read(llama, TOKENS[:137], options, codec="int8", resident=True)
    expected = logits_over(llama, pages, prefill, then=())
    be_a_gpu()
    torch.testing.assert_close(logits_over(llama, pages, prefill, then=()), expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize("selector", SELECTORS)
def test_a_step_that_chooses_never_waits_for_the_device(llama, be_a_gpu, selector):
    options = replace(OPTIONS, selector=make_page_selector(selector))
    pages, prefill = read(llama, TOKENS[:137], options, codec="int8", resident=True)
    be_a_gpu()
    with torch.inference_mode():
        _, steps = steps_over(llama, pages, prefill)
        with Watched():
            steps.step([5], [True])
            steps.step([6], [False])


def test_a_step_that_keeps_its_pages_launches_the_rotation_and_attention_alone(llama, be_a_gpu, launches):
    pages, prefill = read(llama, TOKENS[:137], OPTIONS, codec="int8", resident=True)
    be_a_gpu()
    with torch.inference_mode():
        attend, steps = steps_over(llama, pages, prefill)
        steps.step([5], [True])
        launches.clear()
        with Watched() as watched:
            steps.step([6], [False])
    assert attend.stays_on_device
    of_pages = [name for name in launches if name not in ("_add_rms_norm_kernel", "_silu_mul_kernel")]
    assert Counter(of_pages) == {"_rope_write_kv_kernel": 2, "_few_queries_kernel": 2, "_merge_splits_kernel": 2}
    assert watched.launched["index_copy_"] == 2


def steps_of_three(decoder, pages, prefill):
    questions = (QUESTION, TOKENS[40:45], TOKENS[60:72])
    attends = [prefill.attention(pages, len(question) + 3) for question in questions]
    for question, attend in zip(questions, attends, strict=True):
        attend.begin(len(question), choose=True)
        decoder.run(torch.tensor(question), attend)
    return PageSteps(decoder, attends, [len(question) for question in questions], None)


@pytest.mark.parametrize("per_key_head", [False, True])
def test_a_step_of_several_questions_answers_by_its_kernels_as_on_the_cpu(llama, be_a_gpu, per_key_head):
    pages, prefill = read(llama, TOKENS[:137], replace(OPTIONS, per_key_head=per_key_head), codec="int8", resident=True)
    logits = []
    for kernels in (False, True):
        if kernels:
            be_a_gpu()
        with torch.inference_mode():
            steps = steps_of_three(llama, pages, prefill)
            logits.append(steps.step([5, 6, 7], [True, False, True]).clone())
            logits.append(steps.step([8, 9, 10], [False, True, False]).clone())
    torch.testing.assert_close(logits[2:], logits[:2], rtol=0, atol=2e-3)
    assert not torch.allclose(logits[0], logits[1], atol=0.1)


def test_a_step_of_several_turns_all_rows_in_one_launch_and_never_waits(llama, be_a_gpu, launches):
    pages, prefill = read(llama, TOKENS[:137], OPTIONS, codec="int8", resident=True)
    be_a_gpu()
    with torch.inference_mode():
        steps = steps_of_three(llama, pages, prefill)
        with Watched():
            steps.step([5, 6, 7], [True, True, False])
        launches.clear()
        steps.step([5, 6, 7], [False, False, False])
    of_pages = [name for name in launches if name not in ("_add_rms_norm_kernel", "_silu_mul_kernel")]
    assert Counter(of_pages) == {"_rope_write_kv_kernel": 2, "_few_queries_kernel": 6, "_merge_splits_kernel": 6}


def test_a_step_that_chooses_launches_six_more_kernels_a_layer(llama, be_a_gpu, launches):
    pages, prefill = read(llama, TOKENS[:137], OPTIONS, codec="int8", resident=True)
    be_a_gpu()
    with torch.inference_mode():
        _, steps = steps_over(llama, pages, prefill)
        launches.clear()
        steps.step([5], [True])
        choosing = Counter(launches)
        launches.clear()
        steps.step([5], [False])
        choosing -= Counter(launches)
    assert choosing == {
        "_voter_scores_kernel": 2, "_page_votes_kernel": 2, "_page_top_k_kernel": 4, "_page_log_sums_kernel": 2,
        "_gather_pages_kernel": 2,
    }  # fmt: skip


def test_layers_that_share_a_choice_score_no_page(llama, be_a_gpu, launches):
    options = replace(OPTIONS, layer_interval=2)
    pages, prefill = read(llama, TOKENS[:137], options, codec="int8", resident=True)
    be_a_gpu()
    with torch.inference_mode():
        _, steps = steps_over(llama, pages, prefill)
        launches.clear()
        steps.step([5], [True])
    count = Counter(launches)
    assert (count["_voter_scores_kernel"], count["_gather_pages_kernel"]) == (1, 2)


def test_reading_a_window_never_waits_for_the_device(llama, be_a_gpu):
    pages = pages_of(llama, TOKENS[:136], OPTIONS, codec="int4", resident=True)
    prefill = PagedPrefill(llama, RotaryCache(llama), OPTIONS)
    with torch.inference_mode():
        for window in range(3):
            pages.append(prefill._rows(pages, window))
        be_a_gpu()
        with Watched():
            pages.append(prefill._rows(pages, 3))
        pages.append(prefill._rows(pages, 4))
        pages.flush()
    assert pages.is_complete


def test_what_cannot_be_encoded_on_the_device_is_noticed_before_reading_ends(llama):
    pages = pages_of(llama, TOKENS[:64], OPTIONS, codec="int8", resident=True)
    rows = [WindowRows(torch.full((32, 2, 8), torch.nan), torch.full((32, 2, 8), torch.nan)) for _ in range(2)]
    pages.append(rows)
    with pytest.raises(KVCacheError, match="not finite or too large"):
        pages.flush()
    assert pages.num_windows == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("interval", [1, 2, 4])
def test_steps_of_several_questions_that_are_recorded_on_a_gpu_say_what_each_alone_says(interval):
    decoder = decoder_of(hf_model("llama", num_hidden_layers=2).to("cuda"))
    pages, prefill = read(decoder, TOKENS[:137], OPTIONS, codec="int8", resident=True)
    questions = (QUESTION, TOKENS[40:45], TOKENS[60:72])
    tokens = torch.randint(3, 300, (16, 3), generator=torch.Generator().manual_seed(1)).tolist()
    logits = {}
    with torch.inference_mode():
        for some in ((0,), (1,), (2,), (0, 1, 2)):
            attends = [prefill.attention(pages, len(questions[one]) + 16) for one in some]
            for one, attend in zip(some, attends, strict=True):
                attend.begin(len(questions[one]), choose=True)
                decoder.run(torch.tensor(questions[one], device="cuda"), attend)
            steps = PageSteps.of(decoder, attends, [len(questions[one]) for one in some])
            # Their choices fall on steps of their own, as those of questions that begin one after another do.
            logits[some] = torch.stack([
                steps.step([row[one] for one in some], [(at + one) % interval == 0 for one in some]).clone()
                for at, row in enumerate(tokens)
            ])  # fmt: skip
            assert not steps._recorder._failed
            assert len(steps._replays) == min(2, interval) if len(some) == 1 else len(steps._replays) == interval
    single = torch.cat([logits[(one,)] for one in range(3)], dim=1)
    torch.testing.assert_close(logits[(0, 1, 2)], single, rtol=0, atol=1e-2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("selector", SELECTORS)
def test_steps_that_are_recorded_on_a_gpu_say_what_a_cpu_says(selector):
    options = replace(OPTIONS, selector=make_page_selector(selector))
    logits = []
    for device in ("cpu", "cuda"):
        decoder = decoder_of(hf_model("llama", num_hidden_layers=2).to(device))
        pages, prefill = read(decoder, TOKENS[:137], options, codec="int8", resident=True)
        with torch.inference_mode():
            attend = prefill.attention(pages, len(QUESTION) + 6)
            attend.begin(len(QUESTION), choose=True)
            decoder.run(torch.tensor(QUESTION, device=device), attend)
            steps = PageSteps.of(decoder, [attend], [len(QUESTION)])
            # Each step writes where the one before did.
            asked = enumerate((5, 6, 7, 8, 9, 10))
            logits.append(torch.cat([steps.step([token], [at % 2 == 0]).clone() for at, token in asked]).cpu())
        assert device == "cpu" or not steps._recorder._failed
    torch.testing.assert_close(logits[1], logits[0], rtol=0, atol=1e-2)
