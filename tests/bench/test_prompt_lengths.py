"""Which lengths are timed."""

from __future__ import annotations

import pytest

from ragkit.bench.prompt_lengths import choose_lengths
from ragkit.errors import GenerationError, UsageError


def test_the_defaults_follow_the_device():
    assert choose_lengths((), False, 8192, 10**6) == ((1024, 2048, 4096), ())
    assert choose_lengths((), True, 131072, 10**6) == ((4096, 8192, 16384, 32768), ())


def test_a_default_beyond_window_or_memory_is_left_out_and_said():
    lengths, notes = choose_lengths((), True, 16384, 10000)
    assert lengths == (4096, 8192)
    assert notes == (
        "prompts of 16,384 tokens are left out: free memory holds the KV of 10,000",
        "prompts of 32,768 tokens are left out: the model's window is 16,384",
    )


def test_a_small_window_is_timed_whole():
    assert choose_lengths((), False, 512, 10**6)[0] == (512,)


def test_lengths_that_were_asked_for_are_sorted_and_taken_once():
    assert choose_lengths((300, 100, 300), True, 8192, 10**6) == ((100, 300), ())


@pytest.mark.parametrize(("asked", "got"), [((1024, 9000), "9,000"), ((0,), "0")])
def test_an_impossible_length_is_wrong_usage(asked, got):
    with pytest.raises(UsageError, match=f"a length of {got} tokens is impossible: the model takes 1 to 8,192"):
        choose_lengths(asked, False, 8192, 10**6)


def test_a_length_that_memory_does_not_hold_is_a_failure():
    with pytest.raises(GenerationError, match="take at most 2,000"):
        choose_lengths((4096,), False, 8192, 2000)
