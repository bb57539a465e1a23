"""The settings of drafting, a part of `ragkit.config`."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ragkit.errors import ConfigError
from ragkit.setting_checks import at_least
from ragkit.setting_names import DraftMode, DraftWeights

#: Names of drafters that are no models.
DRAFTERS = ("none", "auto", "self", "lookup")
MOST_DEPTH = 31  # tokens behind each other that one pass verifies


@dataclass(frozen=True, slots=True)
class DraftConfig:
    """Whether and how tokens are drafted, several of which are then verified in one pass.

    `drafter`: none, lookup (what followed before in the chunks and the answer), self (the generator over the best
    chunks alone), auto, or the name of a model with the generator's tokenizer. With `exact` the answer is what the
    generator alone gives, or has its distribution; `transfer` moves the generator towards its drafter by `strength`,
    and the answer with it. `depth` bounds the tokens of a draft, which adapt to what they bring.

    `self` reads at most `context_tokens` of the best chunks, dealt out to `prompts` whose drafts are one tree, drafts
    with the generator's own `weights` or a copy of 4 bits (a quarter of the memory more), and leaves out attention in
    `dropped_layers` layers. With `retrieve_anew` other chunks are looked for with the answer so far where drafts become
    worse.
    """

    drafter: str = "none"
    mode: DraftMode = DraftMode.EXACT
    strength: float = 10.0
    depth: int = 16
    context_tokens: int = 4096
    prompts: int = 1
    weights: DraftWeights = DraftWeights.SAME
    dropped_layers: int = 0
    retrieve_anew: bool = True

    def __post_init__(self) -> None:
        if not self.drafter.strip():
            raise ConfigError(f"draft.drafter must be {', '.join(DRAFTERS)} or the name of a model, got nothing")
        if not (math.isfinite(self.strength) and self.strength >= 0):
            raise ConfigError(f"draft.strength must be a finite number >= 0, got {self.strength}")
        at_least("draft.depth", self.depth, 1)
        at_least("draft.context_tokens", self.context_tokens, 1)
        at_least("draft.prompts", self.prompts, 1)
        at_least("draft.dropped_layers", self.dropped_layers, 0)
        for name, number in (("depth", self.depth), ("prompts", self.prompts)):
            if number > MOST_DEPTH:
                raise ConfigError(f"draft.{name} must be at most {MOST_DEPTH}, as one pass verifies, got {number}")
        if self.mode is DraftMode.TRANSFER and self.drafter == "none":
            raise ConfigError(
                "draft.mode transfer says what drafts may do, and draft.drafter is none: name a drafter (--draft), or "
                "leave the mode exact"
            )
        if self.mode is DraftMode.TRANSFER and self.drafter in ("auto", "lookup"):
            raise ConfigError(
                f"draft.mode transfer moves the generator towards its drafter's distribution, and {self.drafter} has "
                "none: draft with self or a model"
            )
