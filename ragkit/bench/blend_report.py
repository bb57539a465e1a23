"""What `ragkit bench blend` is asked to measure, and what it gives back."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ragkit.config import SelectorName
from ragkit.errors import UsageError

if TYPE_CHECKING:  # the command line looks at the options before anything heavy is imported
    from ragkit.bench.answer_distance import AnswerDistance
    from ragkit.bench.blend_speed import SpeedCheck, SpeedRow
    from ragkit.bench.recovery import Recovery

SPEED_RATIOS = (0.05, 0.15, 0.30)
QUALITY_RATIOS = (0.02, 0.05, 0.10, 0.15, 0.30)
#: Selectors that have no budget are no selectors to compare.
COMPARABLE = tuple(name for name in SelectorName if name not in (SelectorName.EVERYTHING, SelectorName.NONE))


class Part(StrEnum):
    """What is measured."""

    SPEED = "speed"
    QUALITY = "quality"


class TimedText(StrEnum):
    """What the prompts that are timed are made of."""

    RANDOM = "random"
    COLLECTION = "collection"


class ScoredText(StrEnum):
    """What the prompts whose answers are compared are made of."""

    COLLECTION = "collection"
    MUSIQUE = "musique"


@dataclass(frozen=True, slots=True)
class BlendBenchOptions:
    """What is measured, and how often. Empty is the default.

    Attributes:
        parts: speed, quality or both.
        lengths: tokens of the timed prompts; by default those of the device that the model and memory allow.
        ratios: parts of the chunks' tokens that are recomputed; by default `SPEED_RATIOS` and `QUALITY_RATIOS`.
        selectors: whose quality is measured; by default the configured one.
        rounds: how often each prefill is timed; 0 is the device's default.
        items: most prompts that quality is measured over.
        questions: asked of the collection instead of questions made from it.
        musique: the folder of MuSiQue, whose items are taken where no questions are given.
        time_limit_s: most seconds in all; what runs then is finished.
    """

    parts: tuple[Part, ...] = tuple(Part)
    lengths: tuple[int, ...] = ()
    ratios: tuple[float, ...] = ()
    selectors: tuple[SelectorName, ...] = ()
    rounds: int = 0
    items: int = 20
    questions: tuple[str, ...] = ()
    musique: Path | None = None
    time_limit_s: float = math.inf

    def __post_init__(self) -> None:
        if not all(math.isfinite(ratio) and 0 < ratio <= 1 for ratio in self.ratios):
            raise UsageError(f"ratios must lie above 0 and up to 1, got {', '.join(f'{one:g}' for one in self.ratios)}")
        strangers = [str(name) for name in self.selectors if name not in COMPARABLE]
        if strangers:
            raise UsageError(f"no budget goes to the selector {strangers[0]}; take some of {', '.join(COMPARABLE)}")


@dataclass(frozen=True, slots=True)
class BlendReport:
    """What was measured so far.

    Attributes:
        model, settings: what it was measured with.
        speed: a row a prefill and length.
        check: whether what was timed is right; None before anything was.
        quality: a row a variant, plain reuse first.
        distances: of every variant, prompt by prompt.
        quality_from: what the prompts of `quality` are made of.
        quality_tokens: their mean length in tokens.
        notes: one line each: what was left out, and why.
        seconds: how long it took.
    """

    model: dict[str, Any]
    settings: dict[str, Any]
    speed: list[SpeedRow]
    check: SpeedCheck | None
    quality: list[Recovery]
    distances: list[dict[str, AnswerDistance]]
    quality_from: ScoredText | None
    quality_tokens: float
    notes: list[str]
    seconds: float
