"""The perplexity chunker: a chunk ends with the sentence that the text before it made easiest to foretell.

Meta-Chunking (arXiv 2410.12788): the loss of a sentence is the mean of its tokens' losses given all before; a sentence
whose loss is a local minimum, by at least a threshold against one of its neighbours, ends its chunk. One pass of a
causal model gives all losses.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from ragkit.chunking.length_constrained import LengthPrior, Scores
from ragkit.chunking.scored import BoundaryScores, ScoredChunker
from ragkit.chunking.units import Units
from ragkit.config import ChunkingConfig
from ragkit.errors import ChunkingError, UsageError
from ragkit.types import TextTokenizer

_LEAST = 1e-3  # log-odds of a decision with no margin
_FLAT = 1e-6  # losses that vary less are equal but for rounding
_DYNAMIC_FROM = 100  # minima seen before the dynamic threshold follows them
_BLOCK = 100_000  # code points tokenised at once


@runtime_checkable
class SpanTokenizer(Protocol):
    """What a `TextTokenizer` may offer, so that a text is not tokenised twice for its ids and their places."""

    def encode_batch_with_offsets(self, texts: Sequence[str]) -> Iterator[tuple[list[int], list[tuple[int, int]]]]:
        """Yield what `encode` and `offsets` return for each text."""
        ...


class LossModel(Protocol):
    """Gives the losses of tokens in texts of any length; `ragkit.chunking.decoder_losses` is one."""

    @property
    def settings(self) -> str:
        """What changes the losses besides the weights."""
        ...

    def token_losses(self, texts: Sequence[Sequence[int]]) -> list[NDArray[np.float32]]:
        """Return, for the token ids of each text, (tokens - 1,) nats of each token given those before it."""
        ...


@dataclass(frozen=True, slots=True)
class PerplexityOptions:
    """The rule's settings.

    Attributes:
        threshold: nats by which a minimum must lie below one of its neighbours.
        dynamic_threshold: from the hundredth minimum of a text on, take the smallest drop seen instead.
        overlap: the sentence at the minimum stands in both chunks.
        merge_tokens: join neighbouring chunks while they have at most this many tokens together; 0 for never.
        paragraph_log_odds: added where a paragraph starts; 0 is the published rule, which does not look at layout.
    """

    threshold: float = 0.3
    dynamic_threshold: bool = False
    overlap: bool = False
    merge_tokens: int = 0
    paragraph_log_odds: float = 0.0

    def __post_init__(self) -> None:
        if not self.threshold >= 0 or self.merge_tokens < 0:
            raise UsageError(
                "threshold and merge_tokens of the perplexity chunker must be at least 0, "
                f"got {self.threshold} and {self.merge_tokens}"
            )


class PerplexityScorer:
    """Scores boundaries by how far the sentence before one is a minimum of the loss.

    Args:
        model: gives the losses.
        tokenizer: the model's.
        model_id: changes with the model's weights.
        options: the rule's settings.
    """

    name = "perplexity"
    measure = "mean loss of the sentence before, in nats a token"

    def __init__(self, model: LossModel, tokenizer: TextTokenizer, model_id: str, options: PerplexityOptions) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self.options = options
        self.fingerprint = repr((model_id, model.settings, tokenizer.tokenizer_id, sorted(asdict(options).items())))

    def score(self, texts: Sequence[str], units: Sequence[Units]) -> list[BoundaryScores]:
        """Return the scores of each text; the signal is the loss of the sentence before the boundary, in nats.

        Raises:
            ChunkingError: the model gave a loss that is not finite.
        """
        tokenised = [_tokenised(text, some, self._tokenizer) for text, some in zip(texts, units, strict=True)]
        losses = self._model.token_losses([ids for ids, _ in tokenised])
        return [
            self._scores(sentence_losses(some_losses, owners, len(some)), some)
            for some_losses, (_, owners), some in zip(losses, tokenised, units, strict=True)
        ]

    def _scores(self, losses: Scores, units: Units) -> BoundaryScores:
        odds = minima_log_odds(losses, self.options.threshold, dynamic=self.options.dynamic_threshold)
        if self.options.merge_tokens:
            odds = _merged(odds, units, self.options.merge_tokens)
        return BoundaryScores(odds, losses[:-1])


def sentence_losses(losses: NDArray[np.float32], owners: NDArray[np.int64], sentences: int) -> Scores:
    """Return (sentences,) mean loss of each sentence's tokens; one without a token has the loss of the one before.

    Args:
        losses: (tokens - 1,) nats of the tokens from the second on.
        owners: (tokens,) sentence of each token.
        sentences: their number.
    """
    if not np.isfinite(losses).all():
        raise ChunkingError(
            f"the language model gave a loss that is not finite for token {int(np.isfinite(losses).argmin()) + 1}; "
            "run it in float32 or bfloat16, or take another model"
        )
    counts = np.bincount(owners[1:], minlength=sentences)
    sums = np.bincount(owners[1:], weights=losses, minlength=sentences)
    means = sums / np.maximum(counts, 1)
    known = np.maximum.accumulate(np.where(counts > 0, np.arange(sentences), 0))
    filled: Scores = means[known]
    return filled


def minima_log_odds(losses: Scores, threshold: float, *, dynamic: bool = False) -> Scores:
    """Return (sentences - 1,) log-odds of a cut behind each sentence but the last: above 0 exactly at the minima.

    Sentence i, neither first nor last, is a minimum where its loss is below both neighbours' and by `threshold` or
    more below one of them, or is below the one before by `threshold` and equal to the next. With `dynamic`, once 100
    minima are found, the threshold is the smallest of their smaller drops. The odds are the larger drop of a minimum,
    and elsewhere the smaller one, less the threshold, in standard deviations of the loss.
    """
    count = len(losses) - 1
    odds = np.full(max(0, count), -_LEAST)
    deviation = float(losses.std()) if len(losses) else 0.0
    if count < 2 or deviation < _FLAT:
        return odds
    before, behind = losses[:-2] - losses[1:-1], losses[2:] - losses[1:-1]
    level = (before > 0) & (behind == 0)
    lowest = (before > 0) & (behind > 0)
    depth = np.where(lowest, np.maximum(before, behind), np.where(level, before, np.minimum(before, behind)))
    thresholds = np.full(len(depth), threshold)
    if dynamic:
        thresholds = _dynamic_thresholds(depth, np.minimum(before, behind), lowest | level, threshold)
    accepted = (lowest | level) & (depth >= thresholds)
    margin = (depth - thresholds) / deviation
    odds[1:] = np.where(accepted, np.maximum(margin, _LEAST), np.minimum(margin, -_LEAST))
    odds[0] = min(-_LEAST, float(losses[1] - losses[0] - threshold) / deviation)
    return odds


def _dynamic_thresholds(depth: Scores, smaller: Scores, minimum: NDArray[np.bool_], threshold: float) -> Scores:
    thresholds = np.full(len(depth), threshold)
    current, smallest, seen = threshold, np.inf, 0
    previous = 0
    for index in np.flatnonzero(minimum).tolist():
        if depth[index] >= current:
            seen += 1
            smallest = min(smallest, float(smaller[index]))
            if seen >= _DYNAMIC_FROM:
                thresholds[previous : index + 1] = current
                previous = index + 1
                current = smallest
    thresholds[previous:] = current
    return thresholds


def _merged(odds: Scores, units: Units, merge_tokens: int) -> Scores:
    """Return `odds` with the cuts taken back that part chunks which fit `merge_tokens` together, from the left."""
    merged = odds.copy()
    opened = 0
    cuts = [*(np.flatnonzero(odds > 0) + 1).tolist(), len(units)]
    for cut, following in pairwise(cuts):
        if units.tokens_before[following - 1] - units.tokens_after[opened] <= merge_tokens:
            merged[cut - 1] = -_LEAST
        else:
            opened = cut
    return merged


def _tokenised(text: str, units: Units, tokenizer: TextTokenizer) -> tuple[list[int], NDArray[np.int64]]:
    """Return the token ids of a text and the unit of each: the one that holds its last character."""
    ids: list[int] = []
    ends: list[NDArray[np.int64]] = []
    begins, blocks = _blocks(text, units)
    for begin, (block_ids, spans) in zip(begins, _encoded(blocks, tokenizer), strict=True):
        ids += block_ids
        ends.append(begin + np.fromiter((stop for _, stop in spans), np.int64, len(spans)))
    places = np.maximum(np.concatenate(ends) - 1, 0) if ends else np.zeros(0, np.int64)
    owners = np.clip(np.searchsorted(units.starts, places, side="right") - 1, 0, max(0, len(units) - 1))
    return ids, owners.astype(np.int64)


def _blocks(text: str, units: Units) -> tuple[list[int], list[str]]:
    """Return the text in blocks of whole units: where each begins, and what it holds."""
    edges = units.starts.tolist()
    stops = [0]
    while stops[-1] < len(units):
        at = stops[-1]
        stops.append(max(at + 1, int(np.searchsorted(units.starts, edges[at] + _BLOCK, side="right")) - 1))
    places = [edges[stop] for stop in stops]
    return places[:-1], [text[begin:end] for begin, end in pairwise(places)]


def _encoded(blocks: list[str], tokenizer: TextTokenizer) -> Iterator[tuple[list[int], list[tuple[int, int]]]]:
    """Yield the token ids of each block and the spans of its tokens."""
    if isinstance(tokenizer, SpanTokenizer):
        yield from tokenizer.encode_batch_with_offsets(blocks)
    else:
        yield from ((tokenizer.encode(block), tokenizer.offsets(block)) for block in blocks)


def perplexity_chunker(
    config: ChunkingConfig,
    tokenizer: TextTokenizer,
    scorer: PerplexityScorer,
    prior: LengthPrior | None = None,
) -> ScoredChunker:
    """Return a chunker that cuts behind the minima of the loss, and holds the cap.

    Raises:
        UsageError: both an overlap in tokens and the overlap of the rule were asked for.
    """
    options = scorer.options
    if options.overlap and config.overlap_tokens:
        raise UsageError(
            f"chunking.overlap_tokens = {config.overlap_tokens} and the overlap of the perplexity chunker exclude "
            "each other; set one of them"
        )
    return ScoredChunker(scorer, config, tokenizer, prior, options.paragraph_log_odds, repeat_sentence=options.overlap)
