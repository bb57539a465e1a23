from __future__ import annotations

from dataclasses import replace

import pytest

from ragkit.answers.confidence import MODEL, Signals, judge, signals_of
from ragkit.config import AnswerConfig
from ragkit.errors import ConfigError


def test_no_hits_are_nothing_found(embedder):
    confidence = judge("Anything?", [], embedder, AnswerConfig(found_threshold=0.0))
    assert (confidence.found, confidence.score) == (False, 0.0)


def test_a_question_about_the_text_is_found_and_one_about_another_is_not(towers, embedder):
    _, hits = towers
    near = judge("When was Tokyo Tower finished?", hits, embedder, AnswerConfig())
    off = [replace(hit, dense=0.1) for hit in hits]
    far = judge("Which vitamin do carrots contain?", off, embedder, AnswerConfig())
    assert near.found
    assert not far.found
    assert near.score > 0.9 > 0.1 > far.score


def test_the_threshold_decides(towers, embedder):
    _, hits = towers
    score = judge("When was Tokyo Tower finished?", hits, embedder, AnswerConfig()).score
    assert judge("When was Tokyo Tower finished?", hits, embedder, AnswerConfig(found_threshold=score)).found
    above = AnswerConfig(found_threshold=min(1.0, score + 1e-6))
    assert not judge("When was Tokyo Tower finished?", hits, embedder, above).found
    with pytest.raises(ConfigError, match=r"found_threshold must lie in \[0, 1\], got 1.5"):
        AnswerConfig(found_threshold=1.5)


def test_signals_are_the_best_chunk_and_sentence(towers, embedder):
    _, hits = towers
    signals = signals_of("When was Tokyo Tower finished?", hits, embedder)
    assert signals == Signals(dense=0.6, sentence=pytest.approx(1.0), chunk=pytest.approx(1.0))


def test_a_chunk_covers_what_no_sentence_does_alone(towers, embedder):
    _, hits = towers
    signals = signals_of("Is Tokyo Tower orange?", hits, embedder)
    assert signals.chunk == pytest.approx(1.0)
    assert signals.sentence < 0.8


def test_nothing_is_embedded_where_the_dense_leg_ran(towers, embedder):
    _, hits = towers
    judge("When was Tokyo Tower finished?", hits, embedder, AnswerConfig())
    assert embedder.texts == 0


def test_where_only_words_were_searched_the_best_chunks_are_embedded(towers, embedder):
    _, hits = towers
    sparse = [replace(hit, dense=None) for hit in hits]
    signals = signals_of(hits[1].chunk.text, sparse, embedder)
    assert signals.dense == pytest.approx(1.0, abs=1e-5)
    assert embedder.texts == 3


def test_every_signal_speaks_for_an_answer():
    base = Signals(0.4, 0.4, 0.4)
    for name in ("dense", "sentence", "chunk"):
        assert MODEL.probability(replace(base, **{name: 0.9})) > MODEL.probability(base)
    assert MODEL.probability(Signals(-1e6, 0, 0)) == pytest.approx(0.0, abs=1e-20)
