from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ragkit.answers.narrowing import narrowed
from ragkit.answers.terms import terms


def narrow(text, weights, limit):
    start, stop = narrowed(text, terms(text), weights, limit)
    return text[start:stop]


def test_a_short_sentence_stays_whole():
    assert narrow("A short one.", {}, 20) == "A short one."


def test_the_stretch_with_the_most_weight_is_kept():
    text = "apple " * 20 + "gold silver " + "pear " * 20
    assert "gold silver" in narrow(text, {"gold": 2.0, "silver": 1.0, "appl": 0.1}, 40)


def test_a_word_counts_once_in_a_stretch():
    text = "gold gold gold gold " + "pear " * 20 + "gold silver"
    assert narrow(text, {"gold": 1.0, "silver": 1.0}, 30).endswith("gold silver")


def test_what_is_kept_has_its_support_in_the_middle():
    kept = narrow("a" * 5 + " bbbbb" * 30 + " gold" + " ccccc" * 30, {"gold": 1.0}, 100)
    assert 35 <= kept.index("gold") <= 60


def test_text_without_support_is_kept_from_its_start():
    assert narrow("one two three four five six", {}, 14) == "one two three"


def test_a_word_over_the_limit_is_cut_between_characters():
    family = "\U0001f468\u200d\U0001f469\u200d\U0001f467"
    kept = narrow(family * 40, {}, 64)
    assert 0 < len(kept) <= 64
    assert len(kept) % len(family) == 0


@given(
    st.lists(st.sampled_from(["gold", "pear", "a", "x" * 30, "é", "東京塔"]), min_size=1, max_size=60),
    st.integers(20, 80),
)
def test_a_stretch_fits_and_cuts_no_word(words, limit):
    text = " ".join(words)
    start, stop = narrowed(text, terms(text), {"gold": 1.0, "pear": 0.5}, limit)
    assert 0 < stop - start <= limit
    assert start == 0 or text[start - 1] == " " or max(map(len, words)) > limit
    assert stop == len(text) or text[stop] == " " or max(map(len, words)) > limit
