from __future__ import annotations

import numpy as np
import pytest

from ragkit.answers.evidence import gather_evidence, lexical_scores, support_probabilities
from ragkit.types import Document


def test_sentences_are_exact_spans_without_white_space_around(towers):
    document, hits = towers
    sentences = gather_evidence("How tall is the Eiffel Tower?", None, hits).sentences
    assert len(sentences) == 9
    for sentence in sentences:
        assert document.text[sentence.char_start : sentence.char_stop] == sentence.text == sentence.text.strip()


def test_cover_is_the_share_of_the_questions_weight(towers):
    _, hits = towers
    evidence = gather_evidence("Eiffel tower height", None, hits)
    weights = evidence.weights
    total = sum(weights[stem] for stem in ("eiffel", "tower", "height"))
    assert weights["height"] > weights["eiffel"] > weights["tower"] > 0
    assert evidence.support.cover[0] == pytest.approx((weights["eiffel"] + weights["tower"]) / total)
    assert evidence.support.cover[2] == pytest.approx(weights["height"] / total)
    assert evidence.support.before[1] == evidence.support.cover[0]
    assert evidence.support.after[1] == evidence.support.cover[2]


def test_neighbours_do_not_reach_into_another_chunk(towers):
    _, hits = towers
    support = gather_evidence("Eiffel tower height", None, hits).support
    assert support.before[4] == 0
    assert support.after[3] == 0


def test_a_span_of_two_overlapping_chunks_comes_once(over):
    document = Document.from_text("One is here. Two is here. Three is here.")
    first, second = over(document, [0, 26, 40])
    (overlapping,) = over(document, [13, 40])
    sentences = gather_evidence("two", None, [first, overlapping, second]).sentences
    assert [sentence.text for sentence in sentences] == ["One is here.", "Two is here.", "Three is here."]


def test_headings_and_rules_are_no_evidence(over):
    document = Document.from_text("# The tower\n\n---\n\nThe tower is tall.\n")
    sentences = gather_evidence("tower", None, over(document, [0, len(document.text)])).sentences
    assert [sentence.text for sentence in sentences] == ["The tower is tall."]


def test_a_chunk_that_the_dense_leg_did_not_return_counts_as_the_worst_one(over):
    document = Document.from_text("One is here. Two is here. Three is here.")
    hits = over(document, [0, 13, 26, 40], dense=[0.7, None, 0.4])
    assert gather_evidence("two", None, hits).support.chunk_dense.tolist() == [0.7, 0.4, 0.4]


def test_words_of_the_answer_that_the_question_lacks_are_support(towers):
    _, hits = towers
    plain = lexical_scores(gather_evidence("Who built the tower?", None, hits).support)
    helped = lexical_scores(gather_evidence("Who built the tower?", "The tower: Gustave.", hits).support)
    assert np.argmax(helped - plain) == 1
    assert np.count_nonzero(helped - plain) == 1


def test_only_the_best_sentences_are_embedded(towers, embedder):
    _, hits = towers
    evidence = gather_evidence("How high is the Eiffel Tower?", None, hits)
    probabilities = support_probabilities("How high is the Eiffel Tower?", evidence, embedder, embedded=3)
    assert embedder.texts == 3
    assert np.count_nonzero(probabilities) == 3
    assert probabilities.sum() == pytest.approx(1)


def test_no_hits_give_no_evidence(embedder):
    evidence = gather_evidence("Anything?", "Yes.", [])
    assert evidence.sentences == ()
    assert support_probabilities("Anything?", evidence, embedder).shape == (0,)
