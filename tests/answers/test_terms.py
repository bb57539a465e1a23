from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ragkit.answers.terms import stem, terms


@pytest.mark.parametrize(
    "words",
    [
        ["city", "cities", "Cities"],
        ["stop", "stops", "stopped", "stopping"],
        ["glass", "glasses"],
        ["watch", "watches", "watched", "watching"],
        ["open", "opens", "opened", "opening"],
        ["quick", "quickly"],
        ["café", "cafe", "CAFÉS"],
        ["index", "indexes", "indexed", "indexing"],
        ["create", "creates", "created", "creating"],
        ["call", "called", "calling"],
    ],
    ids=lambda words: words[0],
)
def test_forms_of_one_word_have_one_stem(words):
    assert len({stem(word) for word in words}) == 1


@pytest.mark.parametrize("pair", [("bus", "bu"), ("ring", "r"), ("1990s", "1990"), ("news", "newton")])
def test_different_words_keep_different_stems(pair):
    assert stem(pair[0]) != stem(pair[1])


@pytest.mark.parametrize("word", ["the", "The", "how", "what", "between", "does"])
def test_words_of_no_content_have_no_stem(word):
    assert stem(word) == ""


def test_terms_have_the_places_of_their_words():
    text = "How tall is the Eiffel Tower (in metres)?"
    assert [(term.stem, text[term.start : term.stop]) for term in terms(text)] == [
        ("tall", "tall"),
        ("eiffel", "Eiffel"),
        ("tower", "Tower"),
        ("metr", "metres"),
    ]


def test_scripts_without_spaces_give_pairs_of_characters():
    assert [term.stem for term in terms("東京塔は")] == ["東京", "京塔", "塔は"]


@given(st.text(max_size=200))
def test_terms_lie_in_the_text_in_order(text):
    found = terms(text)
    assert all(0 <= term.start < term.stop <= len(text) and term.stem for term in found)
    assert [term.start for term in found] == sorted({term.start for term in found})
