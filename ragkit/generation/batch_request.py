"""What a batch takes and gives: one request of many, and how it ended."""

from __future__ import annotations

from dataclasses import dataclass, field

from ragkit.errors import RagkitError
from ragkit.generation.sampling import SamplingConfig
from ragkit.generation.speculative_decode import Drafting
from ragkit.generation.steps import Finished
from ragkit.generation.strategy import PrefillStrategy
from ragkit.kvcache.coverage import Ratio
from ragkit.types import Prompt


@dataclass(frozen=True, slots=True)
class BatchRequest:
    """One request of a batch.

    Attributes:
        request_id: what its result is found by; the batch only hands it on.
        prompt: the prompt in segments.
        sampling: how tokens are chosen, and when to stop; its random numbers are its own.
        strategy: a prefill strategy of the engine by name, or any other, as `Engine.generate` takes it.
        ratio: part of reused tokens that is recomputed, as `Engine.generate` takes it.
        drafting: has several tokens verified in one pass, as `Engine.generate` takes it; None decodes one by one.
    """

    request_id: str
    prompt: Prompt
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    strategy: str | PrefillStrategy = "full"
    ratio: Ratio | None = None
    drafting: Drafting | None = None


@dataclass(frozen=True, slots=True)
class BatchResult:
    """How one request ended: with `finished` or with `error`, never both.

    Attributes:
        request_id: that of the request.
        text: the answer, all pieces joined; empty where it failed.
        finished: what `Engine.generate` yields last, with its tokens, usage and timings; None where it failed.
        error: why there is no answer, in one line; None where there is one.
    """

    request_id: str
    text: str
    finished: Finished | None = None
    error: RagkitError | None = None
