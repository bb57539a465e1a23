"""Questions over one document that are answered together have the answers of questions asked alone."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Event

import pytest
import torch
from page_doubles import RecordsInMemory

from ragkit.config import PagePositions
from ragkit.errors import GenerationError, KVCacheError
from ragkit.generation import page_batch
from ragkit.generation.decoder import Decoder
from ragkit.generation.page_attention import PageAttention
from ragkit.generation.page_batch import PageBatch
from ragkit.generation.page_decode import PageSteps
from ragkit.generation.page_request import PageRequest
from ragkit.generation.page_rows import CachedRows
from ragkit.generation.paged_answer import PagedAnswer
from ragkit.generation.paged_prefill import PagedPrefill
from ragkit.generation.paged_question import PagedQuestion
from ragkit.generation.sampling import SamplingConfig
from ragkit.generation.steps import Finished, FinishReason
from ragkit.kvcache.page_selectors import make_page_selector

from .test_paged_faults import damage
from .test_paged_prefill import SMALL, TOKENS, WIDE, Replays, pages_of

DOCUMENT = TOKENS[:300]
OPTIONS = replace(SMALL, selector=make_page_selector("min-max"), found_times=2)
LENGTHS = (9, 20, 3, 14, 40)  # of questions, some longer than a window
ANSWERS = (7, 12, 5, 1, 9)


def opened(engine, options=OPTIONS, **arguments):
    """Return a document that was read, and how it is asked about."""
    pages = pages_of(engine.decoder, DOCUMENT, options, **arguments)
    prefill = PagedPrefill(engine.decoder, engine.rotary, options)
    assert prefill.read(pages)
    return pages, prefill


def requests(count=5, **sampling):
    return [
        PageRequest(name, tuple(TOKENS[11 * name : 11 * name + LENGTHS[name]]), SamplingConfig(
            ANSWERS[name], ignore_stop_tokens=True, **{"seed": name, **sampling},
        ))
        for name in range(count)
    ]  # fmt: skip


def alone(engine, pages, prefill, request):
    """Return the finished answer of a question asked alone, its text, and how often each page was chosen."""
    answer = PagedAnswer(engine, prefill, pages, request.token_ids, request.sampling)
    steps = list(answer.steps())
    return essence(steps[-1], "".join(step.piece for step in steps), answer)


def essence(finished: Finished, text: str, question: PagedQuestion):
    return finished.token_ids, finished.reason, text, finished.usage, question.times_chosen, question.choices


def batch_of(engine, pages, prefill, asked, max_running=8, **arguments):
    return PageBatch(engine, prefill, pages, asked, max_running=max_running, **arguments)


def together(batch):
    """Return the same as `alone` of all results by their names; the error of one that has none."""
    return {one.name: one.error or essence(one.finished, one.text, one.question) for one in batch.run()}


SETTINGS = {
    "the default": {},
    "every step": {"interval": 1},
    "an odd interval": {"interval": 3},
    "keys choose": {"per_key_head": True},
    "layers share": {"layer_interval": 2},
    "alike choices stay": {"keep_similarity": 0.9},
    "clamped": {"positions": PagePositions.CLAMPED},
    **{
        name: {"selector": make_page_selector(name)}
        for name in ("mean-key", "low-rank", "soft-vote", "centroids-2", "window")
    },
    "everything": {"selector": make_page_selector("everything"), "positions": PagePositions.CLAMPED},
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_answers_are_those_of_questions_asked_alone(engine, setting):
    pages, prefill = opened(engine, replace(OPTIONS, **SETTINGS[setting]))
    batch = batch_of(engine, pages, prefill, requests())
    expected = {one.name: alone(engine, pages, prefill, one) for one in requests()}
    assert together(batch) == expected
    assert len({tokens[:3] for tokens, *_ in expected.values()}) > 2  # questions matter
    assert batch.stats.running_peak == 4  # one has a single token


@torch.inference_mode()
def test_a_question_chooses_pages_for_its_first_token_and_after_each_interval(engine):
    pages, prefill = opened(engine, replace(OPTIONS, interval=3))
    question = PagedQuestion(engine, prefill, pages, TOKENS[:9], SamplingConfig(8, ignore_stop_tokens=True))
    logits = question.read()
    chosen = []
    for _ in range(7):
        question.take(logits)
        chosen.append((question.next_row, question.chooses))
    assert chosen == [(9, True), (10, False), (11, False), (12, True), (13, False), (14, False), (15, True)]


@pytest.mark.parametrize("codec", ["fp32", "int8"])
@pytest.mark.parametrize("max_running", [1, 2, 3])
def test_questions_begin_as_others_end_and_no_answer_changes(engine, max_running, codec):
    pages, prefill = opened(engine, WIDE, codec=codec, resident=codec == "int8")
    batch = batch_of(engine, pages, prefill, requests(), max_running)
    assert together(batch) == {one.name: alone(engine, pages, prefill, one) for one in requests()}
    assert batch.stats.running_peak == max_running


def test_drawn_answers_follow_from_their_seeds(engine):
    pages, prefill = opened(engine)
    asked = [replace(one, token_ids=requests()[0].token_ids) for one in requests(temperature=1.5, top_p=0.95)]
    asked[1] = replace(asked[1], sampling=replace(asked[1].sampling, seed=0))
    found = together(batch_of(engine, pages, prefill, asked, 3))
    assert found == {one.name: alone(engine, pages, prefill, one) for one in asked}
    assert found[1][0][:7] == found[0][0]  # one seed
    assert found[2][0] != found[0][0][:5]


def test_a_step_is_one_pass_of_the_model_however_many_questions_run(engine, monkeypatch):
    pages, prefill = opened(engine)
    passes, run = [], Decoder.run
    monkeypatch.setattr(
        Decoder, "run", lambda self, tokens, attend: passes.append(len(tokens)) or run(self, tokens, attend)
    )
    asked = [replace(one, sampling=SamplingConfig(6, ignore_stop_tokens=True)) for one in requests(3)]
    batch = batch_of(engine, pages, prefill, asked)
    together(batch)
    assert passes == [9, 16, 4, 3] + 5 * [3]  # the questions, one of them in two windows; then a token of each
    assert (batch.stats.steps, batch.stats.tokens) == (5, 15)


def test_a_token_that_stops_ends_one_answer_alone(engine):
    pages, prefill = opened(engine)
    asked = requests()
    tokens = alone(engine, pages, prefill, asked[1])[0]
    stop = next(token for token in tokens[3:] if token not in tokens[:3])
    asked[1] = replace(asked[1], sampling=SamplingConfig(12, stop_token_ids=(stop,)))
    found = together(batch_of(engine, pages, prefill, asked))
    assert found == {one.name: alone(engine, pages, prefill, one) for one in asked}
    assert found[1][:2] == (tokens[: tokens.index(stop)], FinishReason.STOP_TOKEN)


def test_answers_end_where_the_window_does_and_longer_questions_are_refused(engine):
    pages, prefill = opened(engine)
    room = engine.max_context - OPTIONS.positions_before(len(DOCUMENT))
    asked = requests(3)
    asked[1] = PageRequest(1, tuple(TOKENS[: room - 3]), SamplingConfig(12, ignore_stop_tokens=True))
    asked[2] = PageRequest(2, tuple(TOKENS[:room]))
    found = together(batch_of(engine, pages, prefill, asked))
    assert len(found[1][0]) == 3
    assert isinstance(found[2], GenerationError)
    assert "positions would be in use at once" in str(found[2])
    assert found[0] == alone(engine, pages, prefill, asked[0])


@pytest.mark.parametrize("at_once", [2, 8])
def test_a_page_that_one_question_cannot_have_ends_no_other(engine, monkeypatch, at_once):
    pages, prefill = opened(engine)
    expected = {one.name: alone(engine, pages, prefill, one) for one in requests()}
    find, asked_for = PageAttention.find, []

    def failing(self, layer, queries, keys):
        # The second question is the only one with so many own rows; its third step fails in a layer of the middle.
        if self._rows_taken == longest and layer == 1 and len(queries) == 1:
            asked_for.append(layer)
            if len(asked_for) == 3:
                raise KVCacheError("a page is gone")
        return find(self, layer, queries, keys)

    wide = [replace(one, sampling=replace(one.sampling, max_new_tokens=90)) if one.name == 1 else one
            for one in requests()]  # fmt: skip
    longest = PagedPrefill.attention(prefill, pages, 20 + 90)._rows_taken
    monkeypatch.setattr(PageAttention, "find", failing)
    found = together(batch_of(engine, pages, prefill, wide, at_once))
    assert str(found.pop(1)) == "a page is gone"
    expected.pop(1)
    assert found == expected


def test_a_damaged_page_is_computed_again_for_all(engine):
    tier = RecordsInMemory()
    pages, prefill = opened(engine, tier=tier)
    expected = {one.name: alone(engine, pages, prefill, one) for one in requests()}
    for ref in pages.refs[3:12]:
        damage(tier, ref)
    again = pages_of(engine.decoder, DOCUMENT, OPTIONS, tier=tier, memory=1)
    found = together(batch_of(engine, again, prefill, requests()))
    assert again.repaired > 0
    assert found == expected


def test_what_is_used_of_the_document_is_counted_for_each_question(engine):
    tier = RecordsInMemory()
    opened(engine, tier=tier)
    prefill = PagedPrefill(engine.decoder, engine.rotary, OPTIONS)
    again = pages_of(engine.decoder, DOCUMENT, OPTIONS, tier=tier, memory=1)
    before = again.use()
    uses = [one.finished.kv for one in batch_of(engine, again, prefill, requests()).run()]
    whole = again.use(before)
    assert sum(use.hits for use in uses) == whole.hits
    assert sum(use.bytes_by_tier.get("disk", 0) for use in uses) <= whole.bytes_by_tier["disk"]
    assert uses[0].hits > 0


def test_a_stop_lets_go_of_what_runs_which_begins_again_elsewhere(engine, monkeypatch):
    pages, prefill = opened(engine)
    stop, steps, step = Event(), [], PageSteps.step

    def stopping(self, *arguments):
        steps.append(1)
        if len(steps) == 6:
            stop.set()
        return step(self, *arguments)

    monkeypatch.setattr(PageSteps, "step", stopping)
    batch = batch_of(engine, pages, prefill, iter(requests()), 3, stop=stop)
    first = together(batch)
    assert len(steps) == 6
    assert set(first) == {2, 0, 3}  # those that had ended
    left = batch.let_go()
    assert [one.name for one in left] == [1, 4]
    rest = together(batch_of(engine, pages, prefill, left))
    assert first | rest == {one.name: alone(engine, pages, prefill, one) for one in requests()}


def test_where_memory_runs_out_fewer_run_and_answers_stay(engine, monkeypatch, caplog):
    pages, prefill = opened(engine)
    expected = {one.name: alone(engine, pages, prefill, one) for one in requests()}
    step, read = PageSteps.step, PagedQuestion.read
    running = []

    def narrow(self, token_ids, choose):
        if len(token_ids) > 2:
            raise torch.OutOfMemoryError("no room for three")
        running.append(len(token_ids))
        return step(self, token_ids, choose)

    def unlucky(self):
        if len(running) == 1:
            running.append(0)
            raise torch.OutOfMemoryError("no room for a question")
        return read(self)

    monkeypatch.setattr(PageSteps, "step", narrow)
    monkeypatch.setattr(PagedQuestion, "read", unlucky)
    batch = batch_of(engine, pages, prefill, requests())
    found = together(batch)
    assert {name: one[:4] for name, one in found.items()} == {name: one[:4] for name, one in expected.items()}
    assert batch.stats.given_way == 2
    assert max(running) == 2
    assert "memory ran out with 3 questions over a document's pages at once: 2 from now on" in caplog.text


def test_rows_that_were_half_replaced_when_memory_ran_out_are_not_attended_to(engine, monkeypatch):
    pages, prefill = opened(engine, replace(OPTIONS, keep_similarity=0.2, interval=2))
    expected = {one.name: alone(engine, pages, prefill, one)[:3] for one in requests()}
    load, counts = CachedRows.load, []

    def failing(self, layer, listed, keys, values, before=None):
        load(self, layer, listed, keys, values, before)
        if before is not None:  # a choice that replaces another one
            counts[-1] += 1
            if counts[-1] == len(counts) + 7:
                keys.zero_()
                raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(CachedRows, "load", failing)
    for _ in range(6):
        counts.append(0)
        batch = batch_of(engine, pages, prefill, requests())
        assert {name: one[:3] for name, one in together(batch).items()} == expected
        assert batch.stats.given_way == 1


def test_a_question_that_finds_no_memory_alone_is_told_so(engine, monkeypatch):
    pages, prefill = opened(engine)

    def full(self, *arguments):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(PageSteps, "step", full)
    found = together(batch_of(engine, pages, prefill, requests()))
    assert isinstance(found[3], tuple)  # its only token follows from the question
    failed = [str(found[name]) for name in (0, 1, 2, 4)]
    assert failed == ["the question found no memory for the rows of its pages: no room"] * 4


def test_as_many_run_as_free_memory_has_room_for(engine, monkeypatch):
    pages, prefill = opened(engine)
    asked = [replace(one, sampling=replace(one.sampling, max_new_tokens=30)) for one in requests()]
    rows = PagedQuestion(engine, prefill, pages, asked[0].token_ids, asked[0].sampling).nbytes
    assert rows == (8 * 6 - 4 + 9 + 30) * engine.decoder.layout.bytes_per_token
    most = []
    for free in (1, 4 * rows - 1, 5 * rows, 1 << 40):  # half of it is for rows
        monkeypatch.setattr(page_batch, "_free_bytes", lambda device, free=free: free)
        batch = batch_of(engine, pages, prefill, [replace(one, token_ids=asked[0].token_ids) for one in asked])
        together(batch)
        most.append(batch.stats.running_peak)
    assert most == [1, 1, 2, 5]


def test_a_bug_in_a_step_is_the_error_of_those_that_run_and_others_go_on(engine, monkeypatch):
    pages, prefill = opened(engine)
    step, steps = PageSteps.step, []

    def broken(self, *arguments):
        steps.append(1)
        if len(steps) == 1:
            raise ZeroDivisionError("a bug")
        return step(self, *arguments)

    monkeypatch.setattr(PageSteps, "step", broken)
    found = together(batch_of(engine, pages, prefill, requests(), 2))
    assert [isinstance(found[name], ZeroDivisionError) for name in range(5)] == [True, True, False, False, False]


def test_questions_of_other_threads_have_their_turns_between_the_steps(engine):
    pages, prefill = opened(engine)
    asked = [replace(one, sampling=SamplingConfig(40, ignore_stop_tokens=True)) for one in requests()]
    expected = {one.name: alone(engine, pages, prefill, one) for one in asked}
    others = asked[3:]
    barrier = threading.Barrier(3)

    def ask(request):
        barrier.wait()
        return alone(engine, pages, prefill, request)

    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(ask, one) for one in others]
        barrier.wait()
        found = together(batch_of(engine, pages, prefill, asked[:3]))
        found |= {one.name: future.result(timeout=60) for one, future in zip(others, waiting, strict=True)}
    assert found == expected


def test_no_lock_is_held_between_two_results(engine):
    pages, prefill = opened(engine)
    results = batch_of(engine, pages, prefill, requests()).run()
    next(results)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(pages.lock.acquire, timeout=10).result()
        pool.submit(pages.lock.release).result()
    assert len(list(results)) == 4


@torch.inference_mode()
def test_steps_of_several_are_recorded_when_they_come_again(engine):
    pages, prefill = opened(engine, WIDE, codec="int8", resident=True)
    logits = []
    for recorder in (None, Replays()):
        questions = [PagedQuestion(engine, prefill, pages, one.token_ids, SamplingConfig(10)) for one in requests(3)]
        for one in questions:
            one.read()
        attends = [one.attend for one in questions]
        steps = PageSteps(engine.decoder, attends, LENGTHS[:3], recorder)
        logits.append([
            steps.step([5 + at, 6 + at, 7 + at], [at % 3 == 0, at % 3 == 1, False]).clone() for at in range(10)
        ])  # fmt: skip
    assert [entry for entry in recorder.log if entry in ("record", "replay")] == ["record"] * 3 + ["replay"]
    torch.testing.assert_close(torch.stack(logits[0]), torch.stack(logits[1]), rtol=0, atol=1e-5)
