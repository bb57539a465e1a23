"""`Pipeline.query_many`: questions of a caller answered in one batch, in their order or as they end."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

from ragkit.config import Strategy
from ragkit.types import MetadataValue

if TYPE_CHECKING:
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
        k: int | None = None,
        strategy: Strategy | str | None = None,
        ratio: float | Literal["auto"] | None = None,
        filter: Mapping[str, MetadataValue] | None = None,
        document: str | None = None,
        system_prompt: str | None = None,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        seed: int | None = None,
    ) -> Iterator[RowOutcome]:
        """Yield one outcome a question: its `answer`, or the `error` that kept it from one. Many are generated at once.

        Args:
            questions: questions, or rows with the keys of a row of `ragkit batch` (`question`, `id` and options); taken
                as they are needed.
            in_order: in the order of the questions, each held back until those before it have ended; False yields
                each as it ends, which keeps less in memory. Rows that read a document in pages end last.
            k, strategy, ratio, filter, document, system_prompt, max_new_tokens, temperature, top_p, seed: as for
                `Pipeline.stream`, for every row that does not say otherwise.

        Raises:
            StoreMissingError: nothing was ingested yet.
        """
        from ragkit.answers.options import QuestionChanges
        from ragkit.jobs.answering import answer_many
        from ragkit.jobs.question_files import Record
        from ragkit.jobs.question_rows import RowReader

        _ = self.parts.store
        defaults = QuestionChanges(
            k, strategy, ratio, filter, document, system_prompt, max_new_tokens, temperature, top_p, seed
        )
        records = (
            Record(line, {"question": one} if isinstance(one, str) else one)
            for line, one in enumerate(questions, start=1)
        )
        outcomes = answer_many(self.parts, RowReader(defaults).rows(records))
        return _in_order(outcomes) if in_order else outcomes


def _in_order(outcomes: Iterator[RowOutcome]) -> Iterator[RowOutcome]:
    early: dict[int, RowOutcome] = {}
    wanted = 0
    for outcome in outcomes:
        early[outcome.row.number] = outcome
        while wanted in early:
            yield early.pop(wanted)
            wanted += 1
