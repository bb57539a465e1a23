"""The seam of drafters: what proposes tokens that the model verifies afterwards, many in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from ragkit.generation.draft_tree import DraftTree
from ragkit.generation.sampling import SamplingConfig
from ragkit.kvcache.pool import KVPool
from ragkit.types import Prompt

READ_AT_ONCE = 32  # tokens that a model reads with the first step of a draft; more take passes of their own
MOST_RECORDED = 4 * READ_AT_ONCE  # tokens that are read in such passes; more are read as a prompt is


@dataclass(frozen=True, slots=True)
class DraftContext:
    """What a drafter may know of a request.

    Attributes:
        prompt: the whole prompt in segments.
        sampling: how tokens are chosen; a drafter that draws its tokens draws them so.
        needs_probabilities: whether its distributions are wanted even where it does not draw, because they change the
            target (`DraftMode.TRANSFER`).
    """

    prompt: Prompt
    sampling: SamplingConfig
    needs_probabilities: bool = False


@dataclass(frozen=True, slots=True)
class DraftBudget:
    """How much may be proposed at once.

    Attributes:
        depth: most tokens behind each other; 0 asks for nothing.
        nodes: most tokens in all branches together.
    """

    depth: int
    nodes: int


@dataclass(frozen=True, slots=True)
class DraftPrice:
    """What drafting for a request would cost, before it is begun. All 0: nothing.

    Attributes:
        step_ms: measured milliseconds of one more token of depth; 0 before the first.
        step_share: the same in plain steps of the target, by the bytes that both read.
        begin_ms: measured milliseconds of reading the drafter's prompt; 0 before the first.
        begin_tokens: tokens of it that are computed.
        first_ms: measured milliseconds of a draft of one token; 0 before the first.
    """

    step_ms: float = 0.0
    step_share: float = 0.0
    begin_ms: float = 0.0
    begin_tokens: int = 0
    first_ms: float = 0.0


class DraftSession(Protocol):
    """The drafter's state of one request. It is told every token of the answer, and proposes what follows them."""

    @property
    def step_ms(self) -> float:
        """Measured milliseconds of one more token of depth, forgotten exponentially; 0 before the first."""
        ...

    @property
    def first_ms(self) -> float:
        """The same of a draft of one token; 0 before the first."""
        ...

    @property
    def behind_ms(self) -> float:
        """The same of reading more than `MOST_RECORDED` tokens before a draft; 0 before the first."""
        ...

    @property
    def step_share(self) -> float:
        """What a token of depth takes in plain steps of the target, by the bytes read; 0 where no model runs."""
        ...

    @property
    def lag(self) -> int:
        """Tokens noted that are read with the next draft and not before; 0 where no model reads them."""
        ...

    def accept(self, token_ids: Sequence[int]) -> None:
        """Note the tokens that follow those noted before, whoever proposed them."""
        ...

    def refresh(self, prompt: Prompt) -> None:
        """Go on with another prompt: what was retrieved anew. Tokens noted so far stay."""
        ...

    def holds_blocks_of(self, pool: KVPool) -> bool:
        """Return whether rows of its own lie in blocks of `pool`."""
        ...

    def close(self) -> None:
        """Give memory back; twice is harmless."""
        ...


class Drafter(Protocol):
    """Proposes tokens. It keeps nothing of a request: that is in the request's session."""

    @property
    def name(self) -> str:
        """The name that `--draft` takes."""
        ...

    @property
    def has_probabilities(self) -> bool:
        """Whether its trees tell the distributions that tokens were drawn from, where they were drawn."""
        ...

    @property
    def width(self) -> int:
        """Paths that it proposes beside each other at most, each token of depth costing as many nodes."""
        ...

    def price(self, prompt: Prompt) -> DraftPrice:
        """Return what drafting for a request with this prompt would cost."""
        ...

    def begin(self, context: DraftContext) -> DraftSession:
        """Return the state of one request, before the first token of its answer."""
        ...

    def propose(self, sessions: Sequence[DraftSession], budgets: Sequence[DraftBudget]) -> list[DraftTree]:
        """Return a tree a request behind the tokens that its session has noted; it may be empty, or below its budget.

        Drafters with a model run one step for all requests together.
        """
        ...
