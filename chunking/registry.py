"""Chunkers by the name that `--chunker` takes. A new chunker is one file and one line here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from types import MappingProxyType

from ragkit.chunking.base import Chunker
from ragkit.chunking.recursive import recursive_chunker
from ragkit.chunking.sentence import sentence_chunker
from ragkit.chunking.token import token_chunker
from ragkit.config import ChunkingConfig
from ragkit.errors import ConfigError
from ragkit.types import TextTokenizer

ChunkerFactory = Callable[[ChunkingConfig, TextTokenizer], Chunker]

CHUNKERS: Mapping[str, ChunkerFactory] = MappingProxyType(
    {"recursive": recursive_chunker, "sentence": sentence_chunker, "token": token_chunker}
)


def create_chunker(config: ChunkingConfig, tokenizer: TextTokenizer) -> Chunker:
    """Return the chunker that `config.chunker` names.

    Raises:
        ConfigError: there is no chunker of that name; the message names the nearest one.
    """
    factory = CHUNKERS.get(config.chunker)
    if factory is None:
        nearest = get_close_matches(config.chunker, CHUNKERS, n=1, cutoff=0.0)
        raise ConfigError(
            f"chunking.chunker {config.chunker!r} does not exist; did you mean {nearest[0]!r}? "
            f"There are {', '.join(sorted(CHUNKERS))}"
        )
    return factory(config, tokenizer)
