"""Requests wait for each other where they do not fit beside each other, and never for themselves."""

from __future__ import annotations

import threading
import time
from contextlib import ExitStack

import pytest

from ragkit.errors import CacheCapacityError
from ragkit.generation.admission import Admission


def enter_and_leave(admission: Admission, blocks: int, log: list[int], entered: threading.Event | None = None) -> None:
    with admission.admitted(blocks):
        log.append(blocks)
        if entered is not None:
            entered.set()


def test_what_fits_beside_the_others_does_not_wait():
    admission, log = Admission(10), []
    with admission.admitted(4):
        thread = threading.Thread(target=enter_and_leave, args=(admission, 6, log))
        thread.start()
        thread.join(5)
    assert log == [6]


def test_what_does_not_fit_waits_until_there_is_room():
    admission, log = Admission(10), []
    with ExitStack() as stack:
        stack.enter_context(admission.admitted(5))
        thread = threading.Thread(target=enter_and_leave, args=(admission, 6, log))
        thread.start()
        time.sleep(0.1)
        assert log == []
        stack.close()
        thread.join(5)
    assert log == [6]


def test_they_come_in_the_order_in_which_they_asked():
    admission, log = Admission(10), []
    with ExitStack() as stack:
        stack.enter_context(admission.admitted(5))
        threads = []
        for blocks in (10, 1):  # the second would fit at once, and the first would then wait for ever
            threads.append(threading.Thread(target=enter_and_leave, args=(admission, blocks, log)))
            threads[-1].start()
            time.sleep(0.05)
        assert log == []
        stack.close()
        for thread in threads:
            thread.join(5)
    assert log == [10, 1]


def test_a_request_larger_than_the_pool_is_let_in_alone():
    admission, log = Admission(10), []
    enter_and_leave(admission, 11, log)
    assert log == [11]


def test_a_thread_does_not_wait_for_its_own_requests():
    admission, log = Admission(10), []
    with admission.admitted(8):
        enter_and_leave(admission, 8, log)
    assert log == [8]


def test_patience_ends_where_no_request_does():
    admission, log = Admission(10, patience_s=0.05), []
    with admission.admitted(8):
        thread = threading.Thread(target=enter_and_leave, args=(admission, 8, log))
        thread.start()
        thread.join(5)
        assert log == [8]


def test_what_is_spare_is_counted_until_it_is_given_back():
    admission, log = Admission(10), []
    with admission.admitted(4), ExitStack() as stack:
        stack.enter_context(admission.spare(3))
        with pytest.raises(CacheCapacityError, match="asked for 4 KV blocks that are spare, of 10 requests have 7"):
            stack.enter_context(admission.spare(4))
        thread = threading.Thread(target=enter_and_leave, args=(admission, 5, log))
        thread.start()
        time.sleep(0.05)
        assert log == []
        with pytest.raises(CacheCapacityError, match="1 more wait"):
            stack.enter_context(admission.spare(1))
        stack.close()
        thread.join(5)
    assert log == [5]
