"""What the scheduler of a batch knows of a request and of a common beginning: numbers of tokens and blocks."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto


class Stage(Enum):
    """Where a request stands."""

    WAITING = auto()
    PREFILL = auto()
    DECODE = auto()
    ENDED = auto()


@dataclass(slots=True, eq=False)
class SharedEntry:
    """A common beginning: rows that are computed once and that others list.

    Attributes:
        key: its place in the order in which beginnings are needed.
        length: its tokens, without those of its parent.
        parent: the beginning right before it.
        awaited: requests and beginnings that have still to list it.
        users: requests and beginnings that list it now.
        computed: tokens whose rows are written.
        is_held: whether it has its blocks.
        given_up: tokens that were computed when it last gave its blocks up.
    """

    key: int
    length: int
    parent: SharedEntry | None = None
    awaited: int = 0
    users: int = 0
    computed: int = 0
    is_held: bool = False
    given_up: int = 0

    @property
    def to_compute(self) -> int:
        """Tokens of its prefill."""
        return self.length


@dataclass(slots=True, eq=False)
class RequestEntry:
    """A request.

    Attributes:
        key: its place in the order of starting.
        prompt_tokens: tokens of its prompt behind the common beginning.
        answer_tokens: most tokens of its answer.
        beginning: the last common beginning that it lists.
        cost: tokens that count for its prefill where a strategy does it, in one go; 0 where it goes in pieces.
        strategy_blocks: blocks that such a prefill may take.
        generated: tokens of its answer so far.
        computed: tokens of `to_compute` whose rows are written.
        replayed: tokens of the answer that this prefill computes again.
        blocks: blocks that are its own.
        wanted_rows: rows that its drafts would take in the next step.
        stage: where it stands.
    """

    key: int
    prompt_tokens: int
    answer_tokens: int
    beginning: SharedEntry | None = None
    cost: int = 0
    strategy_blocks: int = 0
    generated: int = 0
    computed: int = 0
    replayed: int = 0
    blocks: int = 0
    wanted_rows: int = 0
    stage: Stage = Stage.WAITING

    @property
    def to_compute(self) -> int:
        """Tokens of its prefill: the prompt, and what was generated before its rows were given up."""
        return self.prompt_tokens + self.replayed

    @property
    def rows_at_start(self) -> int:
        """Rows of its own that it starts with: those of its prefill, and one for an answer that begins."""
        return self.prompt_tokens + max(self.generated, 1)

    @property
    def rows(self) -> int:
        """Rows of its own that it needs once its next token is computed."""
        return self.prompt_tokens + self.generated


Entry = SharedEntry | RequestEntry


def beginnings(entry: Entry) -> list[SharedEntry]:
    """Return the common beginnings that an entry stands behind, the first one first."""
    path: list[SharedEntry] = []
    at = entry.parent if isinstance(entry, SharedEntry) else entry.beginning
    while at is not None:
        path.append(at)
        at = at.parent
    return path[::-1]
