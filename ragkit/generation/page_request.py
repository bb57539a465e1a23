"""What a batch over a document's pages takes and gives: one question of many, and how it ended."""

from __future__ import annotations

from dataclasses import dataclass, field

from ragkit.generation.paged_question import PagedQuestion
from ragkit.generation.sampling import SamplingConfig
from ragkit.generation.steps import Finished


@dataclass(frozen=True, slots=True)
class PageRequest:
    """One question of a batch.

    Attributes:
        name: what its result is found by; the batch only hands it on.
        token_ids: tokens behind the document, as `PagedQuestion` takes them.
        sampling: how tokens are chosen, and when to stop; its random numbers are its own.
    """

    name: int
    token_ids: tuple[int, ...]
    sampling: SamplingConfig = field(default_factory=SamplingConfig)


@dataclass(frozen=True, slots=True)
class PageResult:
    """How one question ended: with `question`, `text` and `finished`, or with `error`.

    Attributes:
        name: that of the request.
        text: the answer, all pieces joined.
        question: says what it attended to.
        finished: what `PagedAnswer` yields last.
        error: why there is no answer.
    """

    name: int
    text: str = ""
    question: PagedQuestion | None = None
    finished: Finished | None = None
    error: Exception | None = None
