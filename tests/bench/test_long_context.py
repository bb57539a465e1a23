"""The evaluation over long documents: who is asked what, what is kept, and what the report says."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import pytest
import torch
from doubles import WordTokenizer

from ragkit.bench.bootstrap import mean_bootstrap
from ragkit.bench.long_answers import LongAnswer
from ragkit.bench.long_context import LongContextEval, LongPlan
from ragkit.bench.long_items import LongQuestion, Material
from ragkit.bench.long_report import ALL_TASKS, Outcome, depth_cells, score_rows, task_cells
from ragkit.bench.needle import NeedleTask, spaced_depths
from ragkit.bench.ruler_tasks import RULER_TASKS
from ragkit.errors import CacheCapacityError, GenerationError, KernelInputError
from ragkit.progress import Silent

THREE_DEPTHS = (NeedleTask(spaced_depths(3)),)


@dataclass
class Reader:
    """Answers what stands in the first `reach` characters of a document."""

    name: str = "reader"
    most_tokens: int = 0
    reach: int = 10**9
    error: Exception | None = None
    asked: list[tuple[int, int]] = field(default_factory=list)

    def answer(self, document: str, questions: Sequence[LongQuestion], max_new_tokens: int) -> Iterator[LongAnswer]:
        self.asked.append((len(document), len(questions)))
        for question in questions:
            if self.error is not None:
                raise self.error
            said = [document[start:stop] for start, stop in question.gold if stop <= self.reach]
            yield LongAnswer(" ".join(said), ((0, self.reach),), 10, 2.0, 0.5)


def evaluation(answerers, *, tasks=THREE_DEPTHS, lengths=(1000, 2000), rounds=((0, 1, 2),), keep=None, **limit):
    plan = LongPlan(tasks, lengths, rounds, **limit)
    return LongContextEval(plan, Material(WordTokenizer()), answerers, depth_cells, {"seed": 0}, keep)


def measured(*answerers, **changes):
    one = evaluation(answerers, **changes)
    one.run(Silent())
    return one.report()


def test_every_answerer_is_asked_about_every_document_and_read_once_each():
    first, second = Reader("first"), Reader("second", reach=2000)
    report = measured(first, second)
    assert first.asked == second.asked
    assert len(first.asked) == 6
    assert [(row.strategy, row.length, row.questions) for row in report.rows] == [
        ("first", 1000, 3), ("first", 2000, 3), ("second", 1000, 3), ("second", 2000, 3),
    ]  # fmt: skip
    assert [row.score for row in report.rows] == pytest.approx([100, 100, 66.67, 33.33], abs=0.01)
    assert [row.gold_shown for row in report.rows] == pytest.approx([100, 100, 66.67, 33.33], abs=0.01)
    assert report.rows[0].against_first is None
    assert report.rows[3].against_first.mean == pytest.approx(-66.67, abs=0.01)
    assert (report.rows[0].document_seconds, report.rows[0].seconds, report.rows[0].prompt_tokens) == (2.0, 0.5, 10)
    assert (report.settings, report.notes) == ({"seed": 0}, [])


def test_the_heat_map_has_a_cell_for_every_depth_from_the_top_down():
    cells = measured(Reader(reach=2000)).cells
    assert list(dict.fromkeys(cell.row for cell in cells)) == ["0%", "50%", "100%"]
    assert {(cell.row, cell.length): cell.score for cell in cells} == {
        ("0%", 1000): 100, ("50%", 1000): 100, ("100%", 1000): 0,
        ("0%", 2000): 100, ("50%", 2000): 0, ("100%", 2000): 0,
    }  # fmt: skip


def test_questions_about_one_document_are_asked_together():
    reader = Reader()
    report = measured(reader, tasks=[NeedleTask(spaced_depths(5), together=True)], rounds=[(0,), (1,)])
    assert [questions for _, questions in reader.asked] == [5] * 4
    assert [row.questions for row in report.rows] == [10, 10]
    assert len(report.cells) == 10


def test_beyond_its_window_an_answerer_is_not_asked_and_a_note_says_so():
    small, large = Reader("small", most_tokens=1500), Reader("large")
    report = measured(small, large)
    assert len(small.asked) == 3
    assert [(row.strategy, row.length) for row in report.rows] == [("small", 1000), ("large", 1000), ("large", 2000)]
    assert report.notes == ["small was not asked at 2,000 tokens: it takes 1,500 at most, the model's window"]
    assert report.rows[2].against_first is None


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (GenerationError("too much"), "too much"),
        (CacheCapacityError("too much"), "too much"),
        (KernelInputError("too much"), "too much"),
        (torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate"), "memory ended"),
        (MemoryError(), "memory ended"),
    ],
)
def test_an_answerer_that_gives_up_is_not_asked_at_that_length_again(error, why):
    broken = Reader("broken", error=error)
    report = measured(broken, Reader("other"))
    assert len(broken.asked) == 2
    assert {row.strategy for row in report.rows} == {"other"}
    assert report.notes == [f"broken gave up at {length} tokens: {why}" for length in ("1,000", "2,000")]


def test_a_task_that_does_not_fit_is_left_out_with_a_note():
    report = measured(Reader(), lengths=(60, 1000), tasks=[RULER_TASKS["vt"]])
    assert [row.length for row in report.rows] == [1000]
    assert report.notes[0].startswith("vt was left out at 60 tokens: a length of 60 tokens leaves no room")


def test_the_time_limit_ends_it_after_the_first_reading_and_says_what_is_missing():
    second = Reader("second")
    report = measured(Reader("first"), second, time_limit_s=0.0)
    assert [one.strategy for one in report.outcomes] == ["first"]
    assert second.asked == []
    assert report.notes == ["the time limit left out 11 of 12 readings of documents"]


def test_a_time_that_is_over_before_anything_was_answered_leaves_the_first_answer():
    report = measured(Reader("small", most_tokens=10), Reader("second"), time_limit_s=0.0)
    assert [one.strategy for one in report.outcomes] == ["second"]
    assert report.notes[-1] == "the time limit left out 10 of 12 readings of documents"


def test_what_was_done_before_an_interruption_is_in_the_report():
    reader = Reader()
    one = evaluation([reader])

    class Stopping(Silent):
        done = 0

        def advance(self, documents: int = 0, bytes: int = 0, tokens: int = 0) -> None:
            self.done += documents
            if self.done == 4:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        one.run(Stopping())
    assert len(one.report().outcomes) == 4
    assert one.report().seconds > 0


def test_what_is_done_is_given_away_as_it_comes_and_once_more_at_an_unforeseen_end(monkeypatch):
    monkeypatch.setattr("ragkit.bench.long_context._KEPT_EVERY_S", 0.0)
    kept = []
    one = evaluation([Reader("first"), Reader("second", error=RuntimeError("a launch failed"))], keep=kept.append)
    with pytest.raises(RuntimeError, match="a launch failed"):
        one.run(Silent())
    assert [len(report.outcomes) for report in kept] == [1]
    kept.clear()
    evaluation([Reader()], keep=kept.append).run(Silent())
    assert [len(report.outcomes) for report in kept] == [1, 2, 3, 4, 5, 6]


def test_what_is_done_within_seconds_is_given_away_at_the_end_alone():
    kept = []
    evaluation([Reader()], keep=kept.append).run(Silent())
    assert [len(report.outcomes) for report in kept] == [6]


def test_every_round_is_done_at_every_length_before_the_next():
    reader = Reader()
    measured(reader, rounds=((0,), (1,)))
    sizes = [size for size, _ in reader.asked]
    assert [size > sizes[0] * 1.5 for size in sizes] == [False, True, False, True]


def outcome(**changes) -> Outcome:
    values = {
        "strategy": "full", "task": "a", "length": 1, "index": 0, "number": 0, "depth": 0.0, "tokens": 1,
        "question": "?", "answers": ("x",), "text": "x", "score": 1.0, "gold_shown": 1.0, "prompt_tokens": 1,
        "document_seconds": 0.0, "seconds": 0.0,
    }  # fmt: skip
    return Outcome(**(values | changes))


def test_the_mean_of_tasks_gives_each_the_same_weight_and_needs_all_of_them():
    some = [outcome(score=1.0), *(outcome(task="b", index=at, score=0.0) for at in range(3))]
    rows = score_rows([*some, outcome(length=2)])
    assert [(row.task, row.length, row.score, row.questions) for row in rows] == [
        ("a", 1, 100, 1), ("a", 2, 100, 1), ("b", 1, 0, 3), (ALL_TASKS, 1, 50, 4),
    ]  # fmt: skip
    assert [(cell.row, cell.score) for cell in task_cells(some)] == [("a", 100), ("b", 0)]


def test_differences_count_questions_that_both_answered():
    some = [outcome(score=0.0), outcome(number=1, score=1.0), outcome(strategy="rag"), outcome(strategy="rag", index=1)]
    [_, row] = score_rows(some)
    assert (row.against_first.mean, row.against_first.low, row.against_first.high) == (100, 100, 100)


def test_the_interval_of_a_mean_resamples_within_groups():
    assert mean_bootstrap([[1.0, 1.0], [0.0]]) == (0.5, 0.5, 0.5)
    mean, low, high = mean_bootstrap([[0.0, 1.0] * 50])
    assert (mean, low, high) == pytest.approx((0.5, 0.4, 0.6), abs=0.02)
    with pytest.raises(ValueError, match=r"sizes \[1, 0\]"):
        mean_bootstrap([[1.0], []])
