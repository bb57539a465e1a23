"""The margin-sampling chunker: a language model is asked, sentence by sentence, whether a new part starts.

Margin sampling of Meta-Chunking (arXiv 2410.12788): with d = P("2") - P("1") from the next-token distribution behind a
question about the chunk so far and the next sentence, the sentence joins the chunk while d is above a threshold, which
is 0 at first and the mean of the last five d from then on. The published code puts the whole chunk into every prompt
again. Here the chunk so far is kept as KV and only the sentence and the question run through the model; where a
sentence joins, its KV is there already.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ragkit.chunking.length_constrained import LengthPrior, Scores
from ragkit.chunking.scored import BoundaryScores, ScoredChunker
from ragkit.chunking.units import Units
from ragkit.config import ChunkingConfig
from ragkit.errors import ChunkingError, UsageError
from ragkit.types import CausalModel, CausalOutput, TextTokenizer

if TYPE_CHECKING:
    from torch import Tensor

_PREFIX = "Text of one part of a document:\n\n"
_QUESTION = (
    "\n\nThe last sentence of the text above is: {sentence}\n"
    "1. It opens a new part, because the topic or the line of thought changes there.\n"
    "2. It belongs to the part above it.\n"
    "Answer with 1 or 2.\nAnswer: "
)
_QUOTED = 400  # code points of the sentence that the question repeats
_LAST = 5  # decisions that the threshold is the mean of
_LEAST = 1e-3  # log-odds of a decision with no margin
_SHARPNESS = 10.0  # log-odds for a margin of 1; the sign alone decides where the cap leaves it free


@dataclass(frozen=True, slots=True)
class MarginOptions:
    """`dynamic_threshold`: the threshold follows the last five margins, as published; otherwise it stays 0."""

    dynamic_threshold: bool = True


class MarginScorer:
    """Scores boundaries by the margin between "a new part" and "the same part".

    Args:
        model: the language model.
        model_id: changes with its weights.
        max_tokens: the cap of a chunk: the text put before the model never grows beyond it.
        options: the rule's settings.

    Attributes:
        tokens_forwarded: tokens that went through the model since it was made.
    """

    name = "margin"
    measure = "margin of the same part over a new one, in probability"

    def __init__(self, model: CausalModel, model_id: str, max_tokens: int, options: MarginOptions) -> None:
        self._model = model
        self._max_tokens = max_tokens
        self._dynamic = options.dynamic_threshold
        self._prefix = model.tokenizer.encode(_PREFIX)
        one, two = model.tokenizer.encode("1"), model.tokenizer.encode("2")
        if len(one) != 1 or len(two) != 1:
            raise UsageError(f"margin sampling needs a model whose tokens for 1 and 2 are single, got {one} and {two}")
        self._one, self._two = one[0], two[0]
        self.fingerprint = repr((model_id, model.tokenizer.tokenizer_id, max_tokens, self._dynamic, _PREFIX, _QUESTION))
        self.tokens_forwarded = 0

    def score(self, texts: Sequence[str], units: Sequence[Units]) -> list[BoundaryScores]:
        """Return the scores of each text; the signal is d.

        Raises:
            ChunkingError: the model gave logits that are not finite.
        """
        return [self._score(some.texts(text, 0, len(some)), some) for text, some in zip(texts, units, strict=True)]

    def _score(self, sentences: list[str], units: Units) -> BoundaryScores:
        margins = np.zeros(max(0, len(sentences) - 1))
        odds: Scores = np.zeros_like(margins)
        recent: deque[float] = deque(maxlen=_LAST)
        part: _Part | None = None
        opened = 0
        for index, sentence in enumerate(sentences):
            ids = self._model.tokenizer.encode(sentence)
            too_long = units.tokens_before[index] - units.tokens_after[opened] > self._max_tokens
            if part is None or not self._fits(part, ids, sentence) or too_long:
                # The cap or the model's window closes the part; the model is not asked, and the boundary is even.
                part, opened = self._open(ids), index
                continue
            output = self._forward([*ids, *self._question(sentence)], part)
            margin = self._margin(output, index)
            threshold = float(np.mean(recent)) if self._dynamic and len(recent) == _LAST else 0.0
            recent.append(margin)
            margins[index - 1] = margin
            odds[index - 1] = _SHARPNESS * (threshold - margin)
            if margin > threshold:
                part.extend(output, len(ids))
            else:
                odds[index - 1] = max(_LEAST, odds[index - 1])
                part, opened = self._open(ids), index
        return BoundaryScores(odds, margins, None if self._dynamic else 0.0)

    def _question(self, sentence: str) -> list[int]:
        return self._model.tokenizer.encode(_QUESTION.format(sentence=" ".join(sentence[:_QUOTED].split())))

    def _fits(self, part: _Part, ids: list[int], sentence: str) -> bool:
        return part.tokens + len(ids) + len(self._question(sentence)) <= self._model.max_context

    def _open(self, ids: list[int]) -> _Part | None:
        """Return a part of one sentence behind the prefix, or None where the model's window is too small for it."""
        if len(self._prefix) + len(ids) > self._model.max_context:
            return None
        part = _Part()
        token_ids = [*self._prefix, *ids]
        part.extend(self._forward(token_ids, part), len(token_ids))
        return part

    def _forward(self, token_ids: list[int], part: _Part) -> CausalOutput:
        self.tokens_forwarded += len(token_ids)
        return self._model.forward(token_ids, part.kv)

    def _margin(self, output: CausalOutput, index: int) -> float:
        probabilities = output.logits.float().softmax(-1)
        margin = float(probabilities[self._two]) - float(probabilities[self._one])
        if not np.isfinite(margin):
            raise ChunkingError(
                f"the language model gave logits that are not finite at sentence {index}; run it in float32 or "
                "bfloat16, or take another model"
            )
        return margin


class _Part:
    """The KV of the part so far, the prefix included."""

    def __init__(self) -> None:
        self.tokens = 0
        self.kv: tuple[tuple[Tensor, Tensor], ...] = ()

    def extend(self, output: CausalOutput, tokens: int) -> None:
        """Take over the first `tokens` rows of a pass."""
        import torch

        fresh = tuple((keys[:tokens], values[:tokens]) for keys, values in output.kv)
        if self.kv:
            fresh = tuple(
                (torch.cat((old_keys, keys)), torch.cat((old_values, values)))
                for (old_keys, old_values), (keys, values) in zip(self.kv, fresh, strict=True)
            )
        self.kv = fresh
        self.tokens += tokens


def margin_chunker(
    config: ChunkingConfig,
    tokenizer: TextTokenizer,
    model: CausalModel,
    model_id: str,
    options: MarginOptions | None = None,
    prior: LengthPrior | None = None,
) -> ScoredChunker:
    """Return a chunker that asks `model` at every sentence, and holds the cap."""
    scorer = MarginScorer(model, model_id, config.max_tokens - config.overlap_tokens, options or MarginOptions())
    return ScoredChunker(scorer, config, tokenizer, prior)
