"""`Pipeline.query_many`: questions of a caller answered in one batch, in their order or as they end."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Unpack

if TYPE_CHECKING:
    from ragkit.answers.options import QuestionOptions
    from ragkit.jobs.question_files import Record
    from ragkit.jobs.rows import RowOutcome
    from ragkit.parts import Parts


class ManyQuestions:
    """What a `Pipeline` offers for many questions at once."""

    parts: Parts

    def query_many(
        self,
        questions: Iterable[str | Mapping[str, Any]],
        *,
        in_order: bool = True,
        **options: Unpack[QuestionOptions],
    ) -> Iterator[RowOutcome]:
        """Yield one outcome a question: its `answer`, or the `error` that kept it from one. Many are generated at once.

        Args:
            questions: questions, or rows with the keys of a row of `ragkit batch` (`question`, `id` and options); taken
                as they are needed.
            in_order: in the order of the questions, each held back until those before it have ended; False yields
                each as it ends, which keeps less in memory. Rows that read a document in pages end last.
            options: k, strategy, ratio, filter, document, system_prompt, max_new_tokens, temperature, top_p, seed,
                draft, draft_mode, for every row that does not say otherwise: see `QuestionOptions`.

        Raises:
            StoreMissingError: nothing was ingested yet.
        """
        from ragkit.answers.options import QuestionChanges, require_options
        from ragkit.jobs.answering import answer_many
        from ragkit.jobs.question_rows import RowReader

        require_options("query_many", options)
        _ = self.parts.store
        records = (_record(line, one) for line, one in enumerate(questions, start=1))
        outcomes = answer_many(self.parts, RowReader(QuestionChanges.of(options)).rows(records))
        return _in_order(outcomes) if in_order else outcomes


def _record(line: int, one: object) -> Record:
    from ragkit.jobs.question_files import Record

    if isinstance(one, str):
        return Record(line, {"question": one})
    if isinstance(one, Mapping):
        return Record(line, one)
    return Record(line, None, f"a question is a text, or a mapping with the key 'question', got {one!r}")


def _in_order(outcomes: Iterator[RowOutcome]) -> Iterator[RowOutcome]:
    early: dict[int, RowOutcome] = {}
    wanted = 0
    for outcome in outcomes:
        early[outcome.row.number] = outcome
        while wanted in early:
            yield early.pop(wanted)
            wanted += 1
