import random

import pytest

from ragkit.generation.text_stream import TextStream
from ragkit.models.tokenizer import ModelTokenizer

TEXTS = ["", "plain words", "naïve café", "日本語テキスト", "👩‍👩‍👧‍👦 family", "a\ud7ff\ue000b", "tab\tline\n\nend "]


@pytest.fixture(scope="module")
def tokenizer(tiny_folder) -> ModelTokenizer:
    return ModelTokenizer(tiny_folder)  # one token a byte: every longer character is cut


def _pieces(tokenizer, token_ids):
    stream = TextStream(tokenizer)
    return [*(stream.push(token) for token in token_ids), stream.close()]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_join_to_the_text_and_never_hold_half_a_character(tokenizer, text):
    pieces = _pieces(tokenizer, tokenizer.encode(text))
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces)


def test_a_character_comes_out_with_its_last_byte(tokenizer):
    assert _pieces(tokenizer, tokenizer.encode("é!")) == ["", "é", "!", ""]


def test_bytes_that_are_no_text_come_out_as_replacement_characters_at_last(tokenizer):
    first_byte = tokenizer.encode("é")[:1]
    assert _pieces(tokenizer, first_byte) == ["", "\ufffd"]


@pytest.mark.parametrize("seed", range(20))
def test_pieces_of_random_tokens_join_to_their_decoded_text(tokenizer, seed):
    token_ids = random.Random(seed).choices(range(259), k=200)
    assert "".join(_pieces(tokenizer, token_ids)) == tokenizer.decode(token_ids)
