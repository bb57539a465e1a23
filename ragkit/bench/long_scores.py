"""What an answer about a long document scores.

Sources: RULER (Hsieh et al., arXiv 2404.06654) for the two string matches, with its clean-up of control characters;
InfiniteBench (Zhang et al., arXiv 2402.13718) for key-value retrieval.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum

_CONTROL = re.compile(r"[\x00-\x1f]")
_SEPARATORS = re.compile(r"""[\n:"'.,?!{}]""")


class AnswerMetric(StrEnum):
    """Which rule scores an answer."""

    ALL = "all"
    PART = "part"
    VALUE = "value"


def string_match_all(prediction: str, answers: Sequence[str]) -> float:
    """Return the share of `answers` that the prediction contains, whatever their case."""
    text = _plain(prediction)
    return sum(answer.lower() in text for answer in answers) / len(answers)


def string_match_part(prediction: str, answers: Sequence[str]) -> float:
    """Return 1 where the prediction contains one of `answers`, whatever its case, else 0."""
    text = _plain(prediction)
    return float(any(answer.lower() in text for answer in answers))


def value_match(prediction: str, answers: Sequence[str]) -> float:
    """Return 1 where the first of `answers` is one whole word of the prediction, punctuation aside, else 0."""
    return float(answers[0] in _SEPARATORS.sub(" ", prediction).split())


def score(metric: AnswerMetric, prediction: str, answers: Sequence[str]) -> float:
    """Return what `prediction` scores, from 0 to 1."""
    return _RULES[metric](prediction, answers)


def _plain(prediction: str) -> str:
    return _CONTROL.sub("\n", prediction.strip()).lower()


_RULES: Mapping[AnswerMetric, Callable[[str, Sequence[str]], float]] = {
    AnswerMetric.ALL: string_match_all,
    AnswerMetric.PART: string_match_part,
    AnswerMetric.VALUE: value_match,
}
