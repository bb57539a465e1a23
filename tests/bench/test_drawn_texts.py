"""Texts that threads draw from one source: everybody has the same ones."""

from __future__ import annotations

import itertools
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from ragkit.bench.drawn_texts import DrawnTexts


def numbered():
    return (f"text {number}" for number in itertools.count())


def lengths(texts):
    time.sleep(0.001)  # others run while texts are counted
    return [float(len(text)) for text in texts]


def test_threads_draw_the_source_once_in_its_order():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        drawn = DrawnTexts(["own"], numbered(), lengths, 16)
        with ThreadPoolExecutor(8) as threads:
            list(threads.map(drawn.draw, [1 + 50 * (number % 9) for number in range(64)]))
    finally:
        sys.setswitchinterval(before)
    expected = ["own", *itertools.islice(numbered(), len(drawn.texts) - 1)]
    assert drawn.texts == expected
    assert drawn.counts == [float(len(text)) for text in expected]
    assert 401 <= len(drawn.texts) <= 401 + 16


def test_a_draw_that_fails_leaves_nothing_out():
    failures = [MemoryError("no room")]

    def count(texts):
        if failures:
            raise failures.pop()
        return lengths(texts)

    drawn = DrawnTexts((), numbered(), count, 16)
    with pytest.raises(MemoryError):
        drawn.draw(1)
    assert (drawn.texts, drawn.counts) == ([], [])
    drawn.draw(20)
    assert drawn.texts == [*itertools.islice(numbered(), 32)]
    assert len(drawn.counts) == 32


def test_what_is_there_is_not_drawn_again():
    drawn = DrawnTexts(["one", "two"], iter(()), lengths, 16)
    drawn.draw(2)
    assert (drawn.texts, drawn.counts) == (["one", "two"], [3.0, 3.0])
