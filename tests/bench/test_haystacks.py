"""Where needles go in a text, and how documents come to a length."""

from __future__ import annotations

import pytest
from doubles import WordTokenizer

from ragkit.bench.haystacks import Draft, Needle, NoiseLines, Pieces, TooShortError, fitted, insert

PIECES = Pieces([" One.", " Two.", " Three.", " Four."], [2, 2, 2, 2])


@pytest.mark.parametrize(
    ("depth", "text"),
    [
        (0.0, "N. One. Two. Three. Four."),
        (0.1, "N. One. Two. Three. Four."),
        (0.2, "One. N. Two. Three. Four."),
        (0.5, "One. Two. N. Three. Four."),
        (1.0, "One. Two. Three. Four. N."),
    ],
)
def test_a_needle_goes_to_the_nearest_edge_of_two_pieces(depth, text):
    draft = insert(PIECES, [Needle("N.", depth)], before=" ", after="")
    assert draft == Draft(text, (text.index("N."),))


def test_depths_count_tokens_not_pieces():
    uneven = Pieces([" a", " b", " c"], [10, 1, 1])
    assert insert(uneven, [Needle("N", 0.4)], before=" ", after="").text == "N a b c"
    assert insert(uneven, [Needle("N", 0.8)], before=" ", after="").text == "a N b c"


def test_needles_keep_the_order_they_were_given_in_whatever_their_depths():
    draft = insert(PIECES, [Needle("last", 1.0), Needle("first", 0.0), Needle("second", 0.0)], before=" ", after="")
    assert draft.text == "first second One. Two. Three. Four. last"
    assert [draft.text[start:].split()[0] for start in draft.starts] == ["last", "first", "second"]


def test_lines_stay_lines():
    draft = insert(Pieces(["a\n", "b\n"], [2, 2]), [Needle("N", 0.5)], before="", after="\n")
    assert draft.text == "a\nN\nb\n"


def test_a_draft_whose_estimate_was_wrong_is_made_again_to_fit():
    asked: list[float] = []

    def assemble(wanted: float) -> Draft:
        asked.append(wanted)
        return Draft("word " * round(wanted), ())  # twice as many tokens as was thought

    draft, tokens = fitted(assemble, 1000, WordTokenizer())
    assert (len(asked), tokens) == (2, len(draft.text.split()) * 2)
    assert 993 <= tokens <= 1000


def test_large_pieces_stay_below_the_length():
    _, tokens = fitted(lambda wanted: Draft("a b c d e " * round(wanted / 10), ()), 1005, WordTokenizer())
    assert tokens == 1000
    _, tokens = fitted(lambda wanted: Draft("a b c d e " * (int(wanted / 40) * 4 + 2), ()), 1005, WordTokenizer())
    assert tokens == 980


def test_what_never_fits_is_refused():
    with pytest.raises(TooShortError, match="a document of 10 tokens has no room for what the task puts into it"):
        fitted(lambda wanted: Draft("word " * 20, ()), 10, WordTokenizer())


def test_noise_is_as_long_as_it_should_be():
    found = NoiseLines(25.0).take(260)
    assert (len(found.texts), sum(found.counts)) == (10, 250)
