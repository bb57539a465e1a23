from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ragkit.answers.citations import cite
from ragkit.config import AnswerConfig
from ragkit.types import Document


def quotes(question, hits, embedder, answer=None, **config):
    return [citation.quote for citation in cite(question, answer, hits, embedder, AnswerConfig(**config))]


def test_the_sentence_with_the_answer_is_cited_first(towers, embedder):
    _, hits = towers
    assert (
        quotes("When did the construction of the Leaning Tower begin?", hits, embedder)[0].startswith(
            "Its construction began in 1173"
        )
        or "Its construction began in 1173" in quotes("When did its construction begin?", hits, embedder)[0]
    )


def test_a_quote_is_the_text_of_its_span(towers, embedder):
    document, hits = towers
    citations = cite("Which tower leans, and why?", "It leans.", hits, embedder, AnswerConfig(citation_mass=1.0))
    assert len(citations) >= 2
    for citation in citations:
        assert document.text[citation.char_start : citation.char_stop] == citation.quote
        assert (citation.doc_id, citation.uri) == (document.doc_id, "towers.txt")


def test_citations_are_ranked_by_score(towers, embedder):
    _, hits = towers
    scores = [hit.score for hit in cite("tower", None, hits, embedder, AnswerConfig(citation_mass=1.0))]
    assert len(scores) >= 3
    assert scores == sorted(scores, reverse=True)
    assert sum(scores) <= 1 + 1e-6


def test_there_are_at_most_as_many_as_allowed(towers, embedder):
    _, hits = towers
    assert len(cite("tower", None, hits, embedder, AnswerConfig(citation_mass=1.0, max_citations=2))) == 2


def test_less_mass_cites_less(towers, embedder):
    _, hits = towers
    question = "Its height is how many metres?"
    few = cite(question, None, hits, embedder, AnswerConfig(citation_mass=0.1))
    many = cite(question, None, hits, embedder, AnswerConfig(citation_mass=0.999))
    assert len(few) == 1
    assert few[0].quote == "Its height is 330 metres."
    assert sum(len(one.quote) for one in many) > len(few[0].quote)


def test_neighbours_are_merged_where_they_fit(over, embedder):
    document = Document.from_text("Gold is here today. Gold was there too. Nothing else matters at all.")
    hits = over(document, [0, len(document.text)])
    assert quotes("gold", hits, embedder, citation_mass=0.8)[0] == "Gold is here today. Gold was there too."
    apart = quotes("gold", hits, embedder, citation_mass=0.8, max_quote_chars=25)
    assert sorted(apart[:2]) == ["Gold is here today.", "Gold was there too."]


def test_sentences_that_say_the_same_are_cited_once(over, embedder):
    text = "The gate opens at nine in May.\n\nThe gate opens at nine, in May.\n\nThe gate is iron."
    document = Document.from_text(text)
    hits = over(document, [0, 32, 65, len(text)])
    found = quotes("When does the gate open in May?", hits, embedder, citation_mass=1.0)
    assert sum("nine" in quote for quote in found) == 1


def test_a_long_sentence_is_narrowed_around_its_support(over, embedder):
    text = "The list has " + "plain words, " * 60 + "one gold ring of the king, " + "more words, " * 60 + "and it ends."
    document = Document.from_text(text)
    (quote,) = quotes("Who has the gold ring?", over(document, [0, len(text)]), embedder)
    assert "gold ring" in quote
    assert 200 < len(quote) <= 300


def test_a_citation_stands_on_the_page_of_its_first_character(towers, embedder):
    document, hits = towers
    question = "How high is the Eiffel Tower, what is its height in metres?"
    config = AnswerConfig(citation_mass=0.3)
    (by_chunk, *_) = cite(question, None, hits, embedder, config)
    (exact, *_) = cite(question, None, hits, embedder, config, page_at=lambda doc_id, at: document.page_at(at))
    assert exact.quote == by_chunk.quote == "Its height is 330 metres."
    assert (by_chunk.page, exact.page) == (1, 2)


def test_no_hits_give_no_citations(embedder):
    assert cite("Anything?", None, [], embedder, AnswerConfig()) == ()


def test_hits_without_any_score_of_similarity_are_cited_by_words(towers, embedder):
    _, hits = towers
    sparse = [replace(hit, dense=None, bm25=hit.score) for hit in hits]
    assert "330 metres" in quotes("What is its height in metres?", sparse, embedder)[0]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.sampled_from(["Gold is old. ", "The king sat.\n\n", "x" * 90 + " ", "東京塔は高い。", "\r\n", "# A\n"]),
        min_size=1,
    ),
    st.integers(20, 120),
    st.integers(1, 5),
)
def test_any_text_gives_few_short_exact_quotes(over, embedder, parts, limit, count):
    document = Document.from_text("".join(parts))
    middle = max(1, len(document.text) // 2)
    hits = over(document, sorted({0, middle, len(document.text)}))
    config = AnswerConfig(max_citations=count, max_quote_chars=limit, citation_mass=1.0)
    citations = cite("What did the gold king do in 東京?", "gold", hits, embedder, config)
    assert len(citations) <= count
    for citation in citations:
        assert 0 < len(citation.quote) <= limit
        assert document.text[citation.char_start : citation.char_stop] == citation.quote
    spans = sorted((citation.char_start, citation.char_stop) for citation in citations)
    assert all(first[1] <= second[0] for first, second in pairwise(spans))


@pytest.mark.parametrize("question", ["?", "the of and", "\x00", "🙂"])
def test_a_question_of_no_words_is_no_failure(towers, embedder, question):
    _, hits = towers
    assert len(cite(question, "", hits, embedder, AnswerConfig())) >= 1
