"""Text around needles: where it comes from, where needles go, and how it is cut to a length."""

from __future__ import annotations

import itertools

import pytest
from doubles import WordTokenizer

from ragkit.bench.haystacks import Draft, Needle, NoiseLines, Pieces, Prose, TooShortError, fitted, insert, read_prose
from ragkit.bench.made_text import made_sentences
from ragkit.errors import UsageError

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


def prose(count: int = 12) -> Prose:
    beyond = (f" Beyond {number}." for number in itertools.count())
    return Prose([f" Own {number}." for number in range(count)], beyond, WordTokenizer())


def test_text_goes_round_its_own_part_once_and_then_beyond():
    texts = prose().starting_at(0.5).take(15 * 5).texts
    numbers = [*range(6, 12), *range(6)]
    assert texts == [*(f" Own {number}." for number in numbers), *(f" Beyond {number}." for number in range(3))]


def test_no_sentence_stands_twice_however_long_the_text():
    texts = prose().starting_at(0.3).take(50_000).texts
    assert len(set(texts)) == len(texts) == 10_000


def test_the_rest_is_filled_with_the_sentence_that_fits_it_best():
    sizes = itertools.cycle([9, 3])
    beyond = (" " + "x " * (size // 2) for size in sizes)
    found = Prose([" a b c d e"], beyond, WordTokenizer()).starting_at(0).take(14)
    assert sum(found.counts) <= 14
    assert found.counts[-1] < 9


def test_what_was_read_before_changes_nothing():
    used = prose()
    used.starting_at(0.5).take(20_000)
    assert used.starting_at(0.25).take(300) == prose().starting_at(0.25).take(300)


def test_noise_is_as_long_as_it_should_be():
    found = NoiseLines(25.0).take(260)
    assert (len(found.texts), sum(found.counts)) == (10, 250)


def test_essays_come_first_sentence_by_sentence_then_other_prose_then_made_text(tmp_path):
    essays = tmp_path / "needle" / "PaulGrahamEssays"
    essays.mkdir(parents=True)
    (essays / "b.txt").write_text("Second essay.\n\nIts  second\nparagraph.")
    (essays / "a.txt").write_text("First essay. It goes on.")
    (tmp_path / "emma").mkdir()
    (tmp_path / "emma" / "Emma_Paragraph.jsonl").write_text('{"Chunk": "A novel."}\n')
    (tmp_path / "wiki2_corpus").mkdir()
    (tmp_path / "wiki2_corpus" / "corpus.json").write_text('[{"text": "A passage."}]')
    texts = read_prose(tmp_path, WordTokenizer()).starting_at(0).take(500).texts
    assert texts[:6] == [
        "\n\nFirst essay.",
        " It goes on.",
        "\n\nSecond essay.",
        "\n\nIts second paragraph.",
        "\n\nA novel.",
        "\n\nA passage.",
    ]
    assert texts[6:16] == list(itertools.islice(made_sentences(0), 10))


def test_without_essays_text_is_made_and_says_nothing_twice():
    texts = read_prose(None, WordTokenizer()).starting_at(0).take(30_000).texts
    assert len(set(texts)) == len(texts) > 500


def test_damaged_prose_is_named(tmp_path):
    essays = tmp_path / "needle" / "PaulGrahamEssays"
    essays.mkdir(parents=True)
    (essays / "a.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(UsageError, match="PaulGrahamEssays does not hold the essays as published"):
        read_prose(tmp_path, WordTokenizer())
    (essays / "a.txt").write_text("An essay.")
    (tmp_path / "wiki2_corpus").mkdir()
    (tmp_path / "wiki2_corpus" / "corpus.json").write_text('[{"title": "no text"}]')
    with pytest.raises(UsageError, match=r"corpus\.json does not hold passages as published: KeyError: 'text'"):
        read_prose(tmp_path, WordTokenizer()).starting_at(0).take(500)
