"""Questions about long documents whose answers are known, and what the tasks that make them share.

A document is separate from its questions, so that it can be read before they are known. A task's length counts all that
a model sees and says: the prompt's frame, the document, one question, and the room for its answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from random import Random
from typing import Protocol, TypeAlias, TypeVar, cast

from ragkit.bench.haystacks import TooShortError
from ragkit.bench.long_scores import AnswerMetric
from ragkit.bench.prose import Prose, read_prose
from ragkit.types import TextTokenizer

_Kept = TypeVar("_Kept")
CharSpan: TypeAlias = tuple[int, int]  # half-open characters of the document


@dataclass(frozen=True, slots=True)
class LongQuestion:
    """One question about a document.

    Attributes:
        text: what is asked.
        answers: what must be said, all or one of them, as the metric says.
        answer_prefix: how the answer begins; the model goes on from there.
        gold: where the answers stand: for each of them the first span that says it.
        depth: where the first span lies, as a share of the document.
    """

    text: str
    answers: tuple[str, ...]
    answer_prefix: str
    gold: tuple[CharSpan, ...]
    depth: float


@dataclass(frozen=True, slots=True)
class LongItem:
    """A document with its questions.

    Attributes:
        task: name of the task.
        length: the length in tokens that was asked for; `tokens` is at most so many.
        index: which one of its kind.
        document: the text.
        tokens: document, frame, the longest question and the room for its answer.
        questions: what is asked, one by one.
        metric: how answers are scored.
        max_new_tokens: room for an answer.
    """

    task: str
    length: int
    index: int
    document: str
    tokens: int
    questions: tuple[LongQuestion, ...]
    metric: AnswerMetric
    max_new_tokens: int


class LongTask(Protocol):
    """Makes documents with questions. Equal seeds give equal items; the questions do not depend on the length."""

    @property
    def name(self) -> str:
        """The name that `--tasks` takes."""
        ...

    def make(self, material: Material, length: int, index: int) -> LongItem:
        """Return item `index` of `length` tokens.

        Raises:
            TooShortError: what the task puts into a document does not fit.
            UsageError: the folder's data are not as published.
        """
        ...


class Material:
    """What tasks make documents of.

    Args:
        tokenizer: counts the length.
        data: folder with public texts (docs/long_context.md); made ones where there is none, or where they end.
        seed: everything follows from it.
        frame_tokens: what a prompt takes besides document, question and answer.
        questions: how many a document gets where the task allows.
    """

    def __init__(
        self,
        tokenizer: TextTokenizer,
        data: Path | None = None,
        *,
        seed: int = 0,
        frame_tokens: int = 64,
        questions: int = 1,
    ) -> None:
        self.tokenizer = tokenizer
        self.data = data
        self.seed = seed
        self.frame_tokens = frame_tokens
        self.questions = questions
        self._kept: dict[str, object] = {}

    def chance(self, *names: object) -> Random:
        """Return a generator of random numbers that follows from the seed and `names` alone."""
        return Random("/".join(map(str, (self.seed, *names))))

    @cached_property
    def prose(self) -> Prose:
        """Running text, read and tokenised once."""
        return read_prose(self.data, self.tokenizer)

    def kept(self, name: str, make: Callable[[], _Kept]) -> _Kept:
        """Return what `make` gave when `name` was first asked for: what a task reads once for all its items."""
        if name not in self._kept:
            self._kept[name] = make()
        return cast(_Kept, self._kept[name])

    def room(self, length: int, questions: Sequence[LongQuestion], max_new_tokens: int) -> int:
        """Return how many tokens a document may have beside the longest of `questions`.

        Raises:
            TooShortError: it would have none.
        """
        texts = [f"{one.text}{one.answer_prefix}" for one in questions]
        room = length - self.frame_tokens - max(self.tokenizer.count_batch(texts)) - max_new_tokens
        if room < 1:
            raise TooShortError(
                f"a length of {length:,} tokens leaves no room for a document: frame, question and answer take "
                f"{length - room:,}"
            )
        return room
