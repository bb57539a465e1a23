from __future__ import annotations

import pytest
from doubles import HashEmbedder
from filled_store import fill
from hypothesis import given
from hypothesis import strategies as st

from ragkit.retrieval.bm25 import TermSelection, full_text_query, query_terms, search_bm25, select_terms
from ragkit.store.fulltext import FtsTokenizer
from ragkit.store.store import Store

TOKENIZER = FtsTokenizer("unicode61")
TEXTS = st.text(st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from("\u0301_-'. aZ")))


@given(TEXTS)
def test_no_word_that_the_index_knows_is_lost_from_a_question(question: str) -> None:
    whole, *alone = TOKENIZER.tokens([question, *query_terms(question)])
    assert {token for tokens in alone for token in tokens} == set(whole)


def test_a_question_is_cut_only_where_the_index_cuts() -> None:
    codes = [code for code in range(0x3100) if query_terms(f"a{chr(code)}b") == ["a", "b"]]
    assert len(codes) > 200
    assert all(tokens == ["a", "b"] for tokens in TOKENIZER.tokens([f"a{chr(code)}b" for code in codes]))


def test_words_are_kept_once_whatever_their_case() -> None:
    assert query_terms("The CAT, the cat's snake_case re\u0301sume\u0301!") == [
        "The",
        "CAT",
        "s",
        "snake",
        "case",
        "re\u0301sume\u0301",
    ]


@pytest.mark.parametrize(
    "question",
    ['"', 'a" OR "b', "NEAR(cat dog)", "text:cat", "cat*", "^cat", "cat AND NOT dog", "-cat", "(", "{}", "'; --"],
)
def test_nothing_in_a_question_is_obeyed_as_syntax(store: Store, question: str) -> None:
    fill(store, HashEmbedder(), {"a": ["cat ", "dog "], "b": ["near bird "]})
    scores, _ = search_bm25(store, question, 10, 3)
    assert len(scores) == len({"cat", "dog", "near"} & {word.casefold() for word in query_terms(question)})


def test_hits_come_best_first_and_more_matching_words_count_more(store: Store) -> None:
    fill(store, HashEmbedder(), {"a": ["red fox ", "red hen ", "blue hen ", "owl ", "elk ", "yak "]})
    scores, row_ids = search_bm25(store, "red hen", 10, 6, selection=TermSelection(common_share=1))
    assert store.chunks(row_ids)[0].chunk.text == "red hen "
    assert len(row_ids) == 3
    assert list(scores) == sorted(scores, reverse=True)


def test_words_in_over_a_tenth_of_the_chunks_are_left_out_where_others_remain() -> None:
    counts = {"the": 900, "index": 100, "vacuum": 3, "unseen": 0}
    assert select_terms(counts, 1000, TermSelection()) == ["vacuum", "index"]
    assert select_terms(counts, 1000, TermSelection(common_share=0.05)) == ["vacuum"]
    assert select_terms(counts, 1000, TermSelection(common_share=1)) == ["vacuum", "index", "the"]


def test_where_every_word_is_common_the_rarest_three_are_searched_for() -> None:
    counts = {"to": 900, "be": 500, "or": 800, "not": 400}
    assert select_terms(counts, 1000, TermSelection()) == ["not", "be", "or"]


def test_no_more_words_than_allowed_and_the_rarest_stay() -> None:
    counts = {f"w{number:02}": number for number in range(1, 60)}
    assert select_terms(counts, 10_000, TermSelection(max_terms=5)) == ["w01", "w02", "w03", "w04", "w05"]


def test_words_are_taken_rarest_first_while_their_postings_are_affordable() -> None:
    counts = {"a": 10_000, "b": 9_000, "c": 8_000, "d": 7_000, "e": 6_000}
    assert select_terms(counts, 100_000, TermSelection()) == ["e", "d", "c", "b"]
    assert select_terms(counts, 1_000_000, TermSelection()) == ["e", "d", "c", "b", "a"]
    assert select_terms({"to": 90_000, "be": 25_000, "or": 20_000}, 100_000, TermSelection()) == ["or"]
    assert select_terms({"only": 90_000}, 1_000_000, TermSelection(postings_share=0)) == ["only"]


def test_only_allowed_rows_are_found(store: Store) -> None:
    fill(store, HashEmbedder(), {"a": ["cat one "], "b": ["cat two "]})
    allowed = store.rows_where({"uri": "b"})
    assert search_bm25(store, "cat", 10, 2, allowed)[1].tolist() == allowed.tolist()
    assert len(search_bm25(store, "cat", 10, 2, allowed[:0])[1]) == 0


@pytest.mark.parametrize("question", ["", "?!", "unheardof"])
def test_a_question_without_known_words_finds_nothing(store: Store, question: str) -> None:
    fill(store, HashEmbedder(), {"a": ["cat "]})
    assert len(search_bm25(store, question, 10, 1)[0]) == 0


def test_quotes_are_doubled() -> None:
    assert full_text_query(['a"b', "c"]) == '"a""b" OR "c"'
