"""The chunkers that are compared, by name: those of the registry, and variants that show what a part brings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from difflib import get_close_matches
from types import MappingProxyType
from typing import Protocol

from ragkit.chunking.base import Chunker
from ragkit.chunking.boundary_head import BoundaryHeadOptions, boundary_head_chunker
from ragkit.chunking.breakpoints import BreakpointRule
from ragkit.chunking.length_constrained import LogNormalPrior
from ragkit.chunking.perplexity import LossModel, PerplexityOptions, PerplexityScorer, perplexity_chunker
from ragkit.chunking.registry import CHUNKERS, MODEL_CHUNKERS, ChunkerModels, create_chunker
from ragkit.chunking.semantic import SemanticOptions, semantic_chunker
from ragkit.config import ChunkingConfig, LengthPriorName
from ragkit.errors import UsageError
from ragkit.types import TextTokenizer


class ComparedModels(ChunkerModels, Protocol):
    """What chunkers run, with the losses of texts remembered: a language model takes minutes over a set."""

    @property
    def losses(self) -> LossModel:
        """Gives the losses of the generator."""
        ...


Build = Callable[[ChunkingConfig, TextTokenizer, ComparedModels], Chunker]

BASELINE = "recursive"
DEFAULT_VARIANTS = (
    *(BASELINE, "token", "sentence", "balanced", "structural", "semantic", "semantic:length", "cluster"),
    *("boundary_head", "boundary_head:length"),
)
_PARAGRAPH_LOG_ODDS = 2.0  # those of `balanced`


def _named(name: str, prior: LengthPriorName | None = None) -> Build:
    """Return the chunker of the registry, with `prior` or that of the configuration."""
    return lambda config, tokenizer, models: create_chunker(
        replace(config, chunker=name, length_prior=prior or config.length_prior), tokenizer, models
    )


def _by_rule(rule: BreakpointRule) -> Build:
    return lambda config, tokenizer, models: semantic_chunker(config, tokenizer, models.embedder, SemanticOptions(rule))


def _even(config: ChunkingConfig) -> LogNormalPrior:
    """Return the prior of `balanced`."""
    return LogNormalPrior(config.max_tokens * 2 / 3, 0.5)


def _semantic_to_length(config: ChunkingConfig, tokenizer: TextTokenizer, models: ChunkerModels) -> Chunker:
    """Return the semantic chunker with the layout and length of `balanced`: what similarity adds to them."""
    options = SemanticOptions(BreakpointRule.LOCAL_MINIMUM, paragraph_log_odds=_PARAGRAPH_LOG_ODDS)
    return semantic_chunker(config, tokenizer, models.embedder, options, _even(config))


def _head_to_length(config: ChunkingConfig, tokenizer: TextTokenizer, models: ChunkerModels) -> Chunker:
    """Return the boundary head with the layout and length of `balanced`: what the head adds to them."""
    options = BoundaryHeadOptions(paragraph_log_odds=_PARAGRAPH_LOG_ODDS)
    return boundary_head_chunker(config, tokenizer, models.embedder, options=options, prior=_even(config))


def _by_losses(paragraph_log_odds: float, *, even: bool) -> Build:
    """Return the perplexity chunker of the registry, or with the layout and length of `balanced`."""
    options = PerplexityOptions(paragraph_log_odds=paragraph_log_odds)

    def build(config: ChunkingConfig, tokenizer: TextTokenizer, models: ComparedModels) -> Chunker:
        scorer = PerplexityScorer(models.losses, models.engine.tokenizer, models.engine.model_name, options)
        return perplexity_chunker(config, tokenizer, scorer, _even(config) if even else None)

    return build


VARIANTS: Mapping[str, Build] = MappingProxyType(
    {
        **{name: _named(name) for name in (*CHUNKERS, *MODEL_CHUNKERS)},
        **{
            f"{name}:{prior}": _named(name, prior)
            for name in ("recursive", "sentence", "token")
            for prior in LengthPriorName
            if prior is not LengthPriorName.AUTO
        },
        **{f"semantic:{rule}": _by_rule(rule) for rule in BreakpointRule},
        "semantic:length": _semantic_to_length,
        "boundary_head:length": _head_to_length,
        "perplexity": _by_losses(0.0, even=False),
        "perplexity:length": _by_losses(_PARAGRAPH_LOG_ODDS, even=True),
    }
)


def check_variants(names: tuple[str, ...]) -> None:
    """Raise `UsageError` naming the first that does not exist, and the nearest that does."""
    for name in names:
        if name not in VARIANTS:
            nearest = get_close_matches(name, VARIANTS, n=1, cutoff=0.0)
            raise UsageError(
                f"there is no chunker {name!r} to compare; did you mean {nearest[0]!r}? There are {', '.join(VARIANTS)}"
            )
