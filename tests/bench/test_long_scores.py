"""What answers score, on cases made by hand."""

from __future__ import annotations

import pytest

from ragkit.bench.long_scores import AnswerMetric, score, string_match_all, string_match_part, value_match


@pytest.mark.parametrize(
    ("prediction", "answers", "share"),
    [
        (" 1234567.", ["1234567"], 1.0),
        ("They are 11, 22 and 44.", ["11", "22", "33", "44"], 0.75),
        ("OTTER and Badger", ["otter", "badger"], 1.0),
        ("1234567", ["7654321"], 0.0),
        ("", ["1"], 0.0),
        ("11 11 11", ["11", "22"], 0.5),
        ("12345678", ["1234567"], 1.0),  # containment, as published
    ],
)
def test_all_is_the_share_of_answers_that_are_contained(prediction, answers, share):
    assert string_match_all(prediction, answers) == share


@pytest.mark.parametrize(
    ("prediction", "answers", "hit"),
    [
        ("It was Exeter College, Oxford", ["Oxford University", "exeter college"], 1.0),
        ("Cambridge", ["Oxford", "Exeter"], 0.0),
        ("a\x00b", ["a\nb"], 1.0),  # control characters are line ends
    ],
)
def test_part_is_whether_any_answer_is_contained(prediction, answers, hit):
    assert string_match_part(prediction, answers) == hit


@pytest.mark.parametrize(
    ("prediction", "hit"),
    [
        ('ab-12", and so on', 1.0),
        ("the value is: ab-12.", 1.0),
        ('{"k":"ab-12"}', 1.0),
        ("ab-123", 0.0),
        ("xab-12", 0.0),
        ("AB-12", 0.0),
    ],
)
def test_a_value_must_be_a_whole_word_as_it_is_written(prediction, hit):
    assert value_match(prediction, ["ab-12"]) == hit


def test_each_metric_has_its_rule():
    assert [score(metric, "one two", ["one", "three"]) for metric in AnswerMetric] == [0.5, 1.0, 1.0]
