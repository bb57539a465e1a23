"""Chunkers by the name that `--chunker` takes. A new chunker is one file and one line here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Protocol

from ragkit.chunking.balanced import balanced_chunker
from ragkit.chunking.base import Chunker
from ragkit.chunking.boundary_head import boundary_head_chunker
from ragkit.chunking.cluster import ClusterChunker
from ragkit.chunking.code import code_chunker
from ragkit.chunking.margin import margin_chunker
from ragkit.chunking.perplexity import PerplexityOptions, PerplexityScorer, perplexity_chunker
from ragkit.chunking.recursive import recursive_chunker
from ragkit.chunking.semantic import semantic_chunker
from ragkit.chunking.sentence import sentence_chunker
from ragkit.chunking.sentence_vectors import SentenceEmbedder
from ragkit.chunking.structural import structural_chunker
from ragkit.chunking.token import token_chunker
from ragkit.chunking.topic import topic_chunker
from ragkit.config import ChunkingConfig
from ragkit.errors import ConfigError, UsageError
from ragkit.types import TextTokenizer

if TYPE_CHECKING:
    from ragkit.generation.engine import Engine


class ChunkerModels(Protocol):
    """The models that some chunkers run, each loaded when it is first asked for; `Pipeline` is one."""

    @property
    def embedder(self) -> SentenceEmbedder:
        """The embedder of the configuration."""
        ...

    @property
    def engine(self) -> Engine:
        """The generator of the configuration."""
        ...


ChunkerFactory = Callable[[ChunkingConfig, TextTokenizer], Chunker]
ModelChunkerFactory = Callable[[ChunkingConfig, TextTokenizer, ChunkerModels], Chunker]

CHUNKERS: Mapping[str, ChunkerFactory] = MappingProxyType(
    {
        "balanced": balanced_chunker,
        "code": code_chunker,
        "recursive": recursive_chunker,
        "sentence": sentence_chunker,
        "structural": structural_chunker,
        "token": token_chunker,
    }
)


def _perplexity(config: ChunkingConfig, tokenizer: TextTokenizer, models: ChunkerModels) -> Chunker:
    from ragkit.chunking.decoder_losses import DecoderLosses

    engine = models.engine
    scorer = PerplexityScorer(
        DecoderLosses(engine.decoder), engine.tokenizer, _model_id(engine.folder), PerplexityOptions()
    )
    return perplexity_chunker(config, tokenizer, scorer)


def _model_id(folder: Path) -> str:
    from ragkit.models.fingerprint import weights_fingerprint

    return weights_fingerprint(folder)


MODEL_CHUNKERS: Mapping[str, ModelChunkerFactory] = MappingProxyType(
    {
        "boundary_head": lambda config, tokenizer, models: boundary_head_chunker(config, tokenizer, models.embedder),
        "cluster": lambda config, tokenizer, models: ClusterChunker(config, tokenizer, models.embedder),
        "margin": lambda config, tokenizer, models: margin_chunker(
            config, tokenizer, models.engine, _model_id(models.engine.folder)
        ),
        "perplexity": _perplexity,
        "semantic": lambda config, tokenizer, models: semantic_chunker(config, tokenizer, models.embedder),
        "topic": lambda config, tokenizer, models: topic_chunker(config, tokenizer, models.embedder),
    }
)


def create_chunker(config: ChunkingConfig, tokenizer: TextTokenizer, models: ChunkerModels | None = None) -> Chunker:
    """Return the chunker that `config.chunker` names.

    Args:
        config: name, cap and overlap.
        tokenizer: the generator's.
        models: what the chunkers of `MODEL_CHUNKERS` run; the others do without.

    Raises:
        ConfigError: there is no chunker of that name; the message names the nearest one.
        UsageError: the chunker runs a model and `models` is None, or its model does not fit it.
        MissingExtraError: the chunker needs a package that is not installed.
    """
    factory = CHUNKERS.get(config.chunker)
    if factory is not None:
        return factory(config, tokenizer)
    with_models = MODEL_CHUNKERS.get(config.chunker)
    if with_models is not None:
        if models is None:
            raise UsageError(
                f"the chunker {config.chunker!r} runs a model, and none was given; pass `models`, or take one of "
                f"{', '.join(sorted(CHUNKERS))}"
            )
        return with_models(config, tokenizer, models)
    names = sorted([*CHUNKERS, *MODEL_CHUNKERS])
    nearest = get_close_matches(config.chunker, names, n=1, cutoff=0.0)[0] if config.chunker else "recursive"
    raise ConfigError(
        f"chunking.chunker {config.chunker!r} does not exist; did you mean {nearest!r}? There are {', '.join(names)}"
    )
