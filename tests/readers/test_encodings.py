"""Every encoding comes out as the text that went in, or says what was lost."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ragkit.errors import ReadError
from ragkit.readers.encodings import clean, decode, detect_file, guess_utf16

FRENCH = "Le café était fermé à Noël ; les élèves ont mangé des crêpes près de l’hôtel. Ça va très bien, merci.\n"
GERMAN = "Die Straße führt über die Brücke nach München. Größere Änderungen wären natürlich möglich.\r\n"
ENGLISH = "It’s a “quoted” sentence — with the usual typographic marks… and a price of £5.\n"
POLISH = "Wszyscy ludzie rodzą się wolni i równi pod względem swej godności i swych praw. Są oni obdarzeni rozumem.\n"
RUSSIAN = "Все люди рождаются свободными и равными в своем достоинстве и правах. Они наделены разумом и совестью.\n"
GREEK = "Όλοι οι άνθρωποι γεννιούνται ελεύθεροι και ίσοι στην αξιοπρέπεια και τα δικαιώματα.\n"
JAPANESE = "すべての人間は、生まれながらにして自由であり、かつ、尊厳と権利とについて平等である。\n"
CHINESE = "人人生而自由,在尊严和权利上一律平等。他们赋有理性和良心,并应以兄弟关系的精神相对待。\n"
HEBREW = "כל בני אדם נולדו בני חורין ושווים בערכם ובזכויותיהם.\n"
EMOJI = "family 👨‍👩‍👧‍👦, flag 🏴󠁧󠁢󠁥󠁮󠁧󠁿, e\u0301 combining\r\n"


@pytest.mark.parametrize("text", [FRENCH, GERMAN, RUSSIAN, JAPANESE, HEBREW, EMOJI, "plain ASCII\r\nlines\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_unicode_comes_out_unchanged_newlines_included(text, encoding):
    decoded = decode(text.encode(encoding))
    assert decoded.text == text
    assert decoded.warnings == ()


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        (ENGLISH, "cp1252"),
        (FRENCH, "cp1252"),
        (GERMAN, "cp1252"),
        (GERMAN, "latin-1"),
        (POLISH, "cp1250"),
        (RUSSIAN, "cp1251"),
        (RUSSIAN, "koi8_r"),
        (GREEK, "cp1253"),
        (JAPANESE * 3, "cp932"),
        (JAPANESE * 3, "euc_jp"),
        (CHINESE * 3, "gb18030"),
    ],
)
def test_older_encodings_are_recognised(text, encoding):
    assert decode(text.encode(encoding)).text == text


@pytest.mark.parametrize("word", ["café", "naïve", "“quoted”", "£5 — ten"])
def test_a_few_western_bytes_are_read_as_western(word):
    decoded = decode(word.encode("cp1252"))
    assert (decoded.text, decoded.encoding.name) == (word, "cp1252")


def test_the_mark_is_recorded_and_not_part_of_the_text():
    decoded = decode(b"\xef\xbb\xbfabc")
    assert decoded.text == "abc"
    assert decoded.metadata == {"encoding": "utf-8", "byte_order_mark": True}


def test_a_few_broken_bytes_in_utf8_are_counted_and_the_rest_is_kept():
    data = (FRENCH * 5).encode() + b"\xff\xfe broken \xc3\n"
    decoded = decode(data)
    assert decoded.encoding.name == "utf-8"
    assert decoded.text.startswith(FRENCH * 5)
    assert decoded.warnings == ("3 byte sequences are not valid utf-8 and became U+FFFD",)


def test_replacement_characters_of_the_file_itself_are_not_counted():
    decoded = decode((FRENCH * 5 + "\ufffd\ufffd").encode() + b"\xff")
    assert decoded.warnings == ("1 byte sequences are not valid utf-8 and became U+FFFD",)


def test_nul_becomes_a_replacement_at_the_same_place():
    decoded = decode(b"one\0two and a longer piece of text so that one NUL is nothing\0")
    assert decoded.text[3] == "\ufffd"
    assert decoded.text[4:7] == "two"
    assert decoded.warnings == ("2 NUL characters were replaced by U+FFFD",)


def test_encoded_surrogates_become_replacements_and_the_rest_stays_utf8():
    decoded = decode("a naïve text with ".encode() + b"\xed\xa0\x80 half a character")
    assert decoded.encoding.name == "utf-8"
    assert decoded.text == "a naïve text with \ufffd\ufffd\ufffd half a character"
    assert decoded.warnings == ("3 byte sequences are not valid utf-8 and became U+FFFD",)


def test_an_odd_byte_at_the_end_of_utf16_is_counted():
    decoded = decode("text in UTF-16".encode("utf-16") + b"x")
    assert decoded.text.startswith("text in UTF-16")
    assert len(decoded.warnings) == 1


def test_bytes_that_are_mostly_invalid_are_refused():
    with pytest.raises(ReadError) as caught:
        decode(b"\xff\xfe" + b"\x00\xdc" * 50)
    assert caught.value.code == "encoding"
    assert "convert" in str(caught.value)


def test_a_named_encoding_is_used_where_the_bytes_are_not_utf8():
    assert decode(GREEK[:12].encode("iso8859-7"), "iso-8859-7").text == GREEK[:12]


def test_bytes_that_are_utf8_are_read_as_utf8_whatever_they_are_named():
    assert decode(FRENCH.encode(), "iso-8859-1").text == FRENCH


@pytest.mark.parametrize("name", ["no-such-encoding", "rot13", "zlib", "undefined", "idna", ""])
def test_a_name_of_no_text_encoding_is_ignored(name):
    assert decode(FRENCH.encode("cp1252"), name).text == FRENCH


@given(st.text())
def test_any_text_in_utf8_comes_out_with_the_same_length_and_encodable(text):
    decoded = decode(b"\xef\xbb\xbf" + text.encode("utf-8", "replace"))
    assert decoded.text == text.encode("utf-8", "replace").decode().replace("\0", "\ufffd")


@given(st.text(st.characters()))
def test_cleaned_text_can_always_be_stored(text):
    cleaned, _ = clean(text)
    assert len(cleaned) == len(text)
    assert "\0" not in cleaned
    cleaned.encode("utf-8")


@given(st.binary(max_size=300))
def test_any_bytes_give_text_or_a_clear_error(data):
    code, text = "", ""
    try:
        text = decode(data).text
    except ReadError as error:
        code = error.code
    text.encode("utf-8")
    assert code in ("", "encoding")


def test_ascii_is_not_taken_for_utf16():
    assert guess_utf16(b"just some plain text, with commas. And stops.\n" * 10) is None


def test_the_encoding_of_a_large_file_is_found_at_its_end(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b"plain line\n" * 300_000 + FRENCH.encode("cp1252") * 20)
    assert detect_file(path).name == "cp1252"


def test_one_old_byte_at_the_end_of_a_very_long_line_is_found_at_once():
    decoded = decode(b"x" * (20 << 20) + "é".encode("cp1252"))
    assert decoded.text[-1] == "é"


def test_a_character_across_two_blocks_is_no_error(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b"x" * ((1 << 20) - 1) + "é".encode() * 600_000)
    assert detect_file(path).name == "utf-8"


def test_an_odd_nul_in_a_short_text_does_not_make_it_utf16():
    text = "Red \x1b[31mtext\x1b[0m and bell \a. Tab\tand \0 nul.\n"
    assert decode(text.encode()).text == text.replace("\0", "\ufffd")
    for wide in ("Привет, мир.", "Frogs live in ponds.", "مرحبا بالعالم.", "青蛙住在池塘里。它们吃苍蝇。\n" * 9):
        assert guess_utf16(wide.encode("utf-16-le")) == "utf-16-le"
