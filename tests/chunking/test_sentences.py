from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ragkit.chunking.sentences import sentence_spans, sentence_starts


def split(text):
    return [text[start:stop].strip() for start, stop in sentence_spans(text)]


@given(
    st.text(max_size=200)
    | st.lists(st.sampled_from([". ", "A", "b", "\n", "”", "1.", "。", "... ", "? "])).map("".join)
)
def test_spans_tile_the_text(text):
    spans = sentence_spans(text)
    assert "".join(text[start:stop] for start, stop in spans) == text
    assert all(start < stop for start, stop in spans)


@pytest.mark.parametrize(
    "sentences",
    [
        ["The cat sat.", "The dog ran!", "Did it?", "Yes."],
        ["Dr. Adams met Mrs. Brown at St. James on Jan. 5.", "They left."],
        ["He moved to the U.S. Army in May.", "It was cold."],
        ["She lived in the U.S.", "The house was sold."],
        ["Work by J. R. Smith et al. 2019 agrees.", "Others do not."],
        ["See Fig. 3 and Eq. 4, e.g. for pp. 10 to 12.", "Then stop."],
        ["It cost $3.50 in v2.1.0 of the tool.", "Version 3 is free."],
        ["The Smith Corp. Board met.", "It agreed."],
        ["It was sold to Smith Inc.", "The price was low."],
        ["“Is it so?” he asked.", "“It is.”", "She left."],
        ["(It was late.)", "They slept."],
        ["It grew fast.[12]", "Then it fell.[citation needed]"],
        ["Wait... Really?", "Yes."],
        ["The roots are of the form n. Any other is not."],
        ["Brown v. Board of Education was decided in 1954.", "It changed schools."],
        ["It ended at 5 p.m. on Monday.", "We left at 6 a.m.", "The road was empty."],
        ["これは文です。", "次の文！", "そうですか？"],
        ["Él llegó.", "¿Quién es?", "¡Hola!"],
        ["Es gibt z.B. Nr. 5 und usw. mehr.", "Das ist gut."],
        ["Это первое.", "Это второе."],
        ["هل هذا صحيح؟", "نعم."],
    ],
    ids=lambda sentences: sentences[0][:24],
)
def test_sentences_are_found_where_a_reader_sees_them(sentences):
    text = "".join(sentences) if sentences[0].endswith("。") else " ".join(sentences)
    if sentences[0].startswith("Wait"):
        sentences = ["Wait...", "Really?", "Yes."]
    assert split(text) == sentences


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A title\n\nThe text is here. More.", ["A title", "The text is here.", "More."]),
        ("the line goes on and on until it wraps at last on\nthe next line. Done.", 2),
        ("Items:\n- one\n- two\n1. three\n2. four", ["Items:", "- one", "- two", "1. three", "2. four"]),
        ("# Heading\nText follows here.", ["# Heading", "Text follows here."]),
        ("| a | b |\n| c | d |\n", ["| a | b |", "| c | d |"]),
        ("One.\r\n\r\nTwo.\r\n", ["One.", "Two."]),
        ("He took the oxygen, and then he breathed a lot of the O\n2 and slept.", 1),
    ],
)
def test_lines_end_sentences_only_where_they_end_something(text, expected):
    found = split(text)
    assert (found if isinstance(expected, list) else len(found)) == expected


def test_no_text_has_no_sentences():
    assert sentence_spans("") == []
    assert sentence_starts("x") == [0]


@pytest.mark.parametrize("unit", [". ", "A.", "\n", "x", " ", ".", '."', "1. ", "a\n", "[1]"], ids=repr)
def test_time_grows_with_the_length_and_no_faster(unit):
    import time

    def seconds(size):
        text = unit * (size // len(unit))
        best = 9.0
        for _ in range(3):
            start = time.process_time()
            sentence_starts(text)
            best = min(best, time.process_time() - start)
        return best

    assert seconds(160_000) < 80 * max(seconds(10_000), 0.001)
