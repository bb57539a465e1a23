"""A batch and single questions on one pool: each waits for the other where there is no room, and none fails."""

from __future__ import annotations

import threading
import time

import pytest

from ragkit.config import BatchConfig
from ragkit.errors import CacheCapacityError
from ragkit.generation.admission import Admission
from ragkit.generation.batch_engine import BatchEngine
from ragkit.generation.batch_request import BatchRequest
from ragkit.generation.engine import Engine
from ragkit.generation.sampling import SamplingConfig
from ragkit.types import Prompt, Segment

BLOCKS = 6


@pytest.fixture
def engine(tiny_folder) -> Engine:
    """The tiny model with a pool that is smaller than its window."""
    return Engine.load(tiny_folder, device="cpu", dtype="float32", kv_tokens=64 * BLOCKS)


def request(number: int, prompt_tokens: int = 100, answer_tokens: int = 60) -> BatchRequest:
    prompt = Prompt((Segment((3 + number % 200, *range(5, 4 + prompt_tokens))),))
    return BatchRequest(str(number), prompt, SamplingConfig(answer_tokens, ignore_stop_tokens=True))


def ask(engine: Engine, one: BatchRequest) -> tuple[int, ...]:
    return list(engine.generate(one.prompt, one.sampling))[-1].token_ids


def test_questions_from_another_thread_are_answered_while_a_batch_fills_the_pool(engine):
    large = [request(200 + number, 190) for number in range(3)]
    expected = [ask(engine, one) for one in large]
    answers, errors, started = [], [], threading.Event()

    def questions() -> None:
        started.wait(10)
        try:
            answers.extend(ask(engine, one) for one in large)
        except CacheCapacityError as error:
            errors.append(error)

    thread = threading.Thread(target=questions)
    thread.start()
    results = []
    for result in BatchEngine(engine, BatchConfig(256, look_ahead=100)).run(request(number) for number in range(60)):
        started.set()
        results.append(result)
    thread.join(60)
    assert errors == []
    assert answers == expected
    assert [one.error for one in results] == [None] * 60
    assert engine.pool.num_free == engine.pool.num_blocks


def test_a_batch_waits_for_a_question_that_has_the_pool(engine):
    reading, go_on = threading.Event(), threading.Event()

    def question() -> None:
        for _ in engine.generate(request(1, 190).prompt, SamplingConfig(20, ignore_stop_tokens=True)):
            reading.set()
            go_on.wait(30)

    thread = threading.Thread(target=question)
    thread.start()
    assert reading.wait(30)
    threading.Timer(0.3, go_on.set).start()
    results = list(BatchEngine(engine).run([request(2, 190)]))
    thread.join(30)
    assert results[0].error is None
    assert results[0].finished.token_ids == ask(engine, request(2, 190))


def test_a_thread_may_ask_while_it_reads_the_results_of_its_batch(engine):
    results = BatchEngine(engine, BatchConfig(max_running=2)).run(request(number) for number in range(4))
    assert next(results).error is None
    started = time.monotonic()
    assert len(ask(engine, request(9))) == 60  # beside what is running
    assert time.monotonic() - started < 60
    assert len(list(results)) == 3


def test_two_batches_and_two_askers_on_a_small_pool_end_without_an_error(engine):
    errors, answered = [], []

    def batch(first: int) -> None:
        made = (request(first + one, 60 + 20 * (one % 7), 10 + 8 * (one % 6)) for one in range(25))
        for result in BatchEngine(engine, BatchConfig(128)).run(made):
            (answered if result.error is None else errors).append(result)

    def asker(first: int) -> None:
        for one in range(4):
            try:
                answered.append(ask(engine, request(first + one, 190)))
            except CacheCapacityError as error:
                errors.append(error)

    threads = [threading.Thread(target=act, args=(first,)) for act in (batch, asker) for first in (0, 100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert errors == []
    assert len(answered) == 58
    assert engine.pool.num_free == engine.pool.num_blocks


def test_a_batch_that_alone_has_no_room_is_told_at_once():
    share = Admission(10).join()
    assert not share.wait()
    share.close()


def test_a_request_waits_until_a_batch_has_given_blocks_back():
    free, log = [3], []
    admission = Admission(10, free=lambda wanted: free[0])
    share = admission.join()
    other = threading.Thread(target=lambda: enter(admission, 4, log))
    other.start()
    wait_for(lambda: share.others_wait)
    assert log == []
    free[0] = 4
    share.gave_back()
    other.join(10)
    assert log == [4]
    assert not share.others_wait


def test_a_batch_leaves_what_was_promised_and_not_taken_yet():
    admission = Admission(10, free=lambda wanted: 10)
    share = admission.join()
    with admission.admitted(4) as admitted:
        assert share.free(7, kept=0) == 6
        assert share.free(7, kept=5) == 5
        admitted.has_taken()
        assert share.free(7, kept=0) == 10
    assert share.free(7, kept=5) == 5


def test_nobody_is_promised_what_a_step_of_a_batch_is_about_to_take():
    admission, log = Admission(10, free=lambda wanted: 10), []
    share, second = admission.join(), admission.join()
    assert share.free(7, kept=0) == 10
    assert second.free(4, kept=0) == 3
    other = threading.Thread(target=lambda: enter(admission, 4, log))
    other.start()
    wait_for(lambda: share.others_wait)
    assert log == []
    share.settle()
    other.join(10)
    assert log == [4]


def test_a_batch_that_ends_lets_in_who_waits():
    admission, log = Admission(10, free=lambda wanted: 0), []
    share = admission.join()
    other = threading.Thread(target=lambda: enter(admission, 4, log))
    other.start()
    wait_for(lambda: share.others_wait)
    share.close()
    share.close()
    other.join(10)
    assert log == [4]


def enter(admission: Admission, blocks: int, log: list[int]) -> None:
    with admission.admitted(blocks):
        log.append(blocks)


def wait_for(condition) -> None:
    ends = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.01)
