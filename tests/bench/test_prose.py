"""Running text around needles: where it comes from, and in which order."""

from __future__ import annotations

import itertools
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from doubles import WordTokenizer

from ragkit.bench.made_text import made_sentences
from ragkit.bench.prose import Prose, read_prose
from ragkit.errors import UsageError


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


def test_threads_that_take_at_once_get_what_each_alone_gets():
    class Slow(WordTokenizer):
        def count_batch(self, texts):
            time.sleep(0.002)  # others run while pieces are drawn
            return super().count_batch(texts)

    beyond = (f" Beyond {number}." for number in itertools.count())
    shared = Prose([f" Own {number}." for number in range(12)], beyond, Slow())
    sizes = [10_000 * (1 + number % 7) for number in range(24)]
    with ThreadPoolExecutor(8) as threads:
        taken = list(threads.map(lambda size: shared.starting_at(size % 5 / 5).take(size), sizes))
    assert taken == [prose().starting_at(size % 5 / 5).take(size) for size in sizes]


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
