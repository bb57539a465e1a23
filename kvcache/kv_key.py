"""The identity of a chunk's KV: SHA-256 over everything that changes its numbers.

Two computations that could differ never share a key, so a changed model, tokenizer, codec or tenant is a miss rather
than a wrong answer. The digest depends on no process state (hash seeds, object ids), so every process agrees on it.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import re
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch

from ragkit.errors import KVCacheError
from ragkit.models.model_config import ModelConfig

KV_FORMAT_VERSION = 1  # of everything that is stored: record, codecs, what the key is made of

_HEX = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True, order=True)
class KVKey:
    """The identity of one chunk's KV: 64 hex digits."""

    digest: str

    def __post_init__(self) -> None:
        if not _HEX.fullmatch(self.digest):  # keys become file names, so nothing else may pass
            raise KVCacheError(f"a KV key is 64 lower-case hex digits, got {self.digest!r}")

    def __str__(self) -> str:
        return self.digest


class ContextKind(StrEnum):
    """What a chunk's KV was computed behind."""

    ISOLATED = "isolated"
    PREFIX = "prefix"
    NEIGHBOURS = "neighbours"
    PAGES = "pages"  # a window of a document, behind all windows before it


@dataclass(frozen=True, slots=True)
class ChunkContext:
    """What stood before a chunk when its KV was computed.

    Attributes:
        kind: the kind of context.
        context_id: distinguishes contexts of one kind by their content; the kind alone where there is only one.
    """

    kind: ContextKind
    context_id: str

    @classmethod
    def isolated(cls) -> ChunkContext:
        """Return the context of a chunk that stood alone."""
        return cls(ContextKind.ISOLATED, "isolated")

    @classmethod
    def prefix(cls, prefix_token_ids: Sequence[int]) -> ChunkContext:
        """Return the context of a chunk behind the canonical prefix."""
        return cls(ContextKind.PREFIX, f"prefix:{_token_digest(prefix_token_ids).hexdigest()}")

    @classmethod
    def neighbours(cls, prefix_token_ids: Sequence[int], neighbour_token_ids: Sequence[int]) -> ChunkContext:
        """Return the context of a chunk behind the canonical prefix and the tokens of other chunks.

        Without any such token it is the context behind the prefix: the numbers are the same. The tokens say it and not
        the chunks' ids, which every edit of their document changes.
        """
        if not neighbour_token_ids:
            return cls.prefix(prefix_token_ids)
        parts = (_token_digest(token_ids).hexdigest() for token_ids in (prefix_token_ids, neighbour_token_ids))
        return cls(ContextKind.NEIGHBOURS, f"neighbours:{':'.join(parts)}")

    @classmethod
    def of(cls, kind: ContextKind, prefix_token_ids: Sequence[int], behind: Sequence[int]) -> ChunkContext:
        """Return the context of a chunk's KV where chunks are computed as `kind` says, this one behind `behind`."""
        return cls.isolated() if kind is ContextKind.ISOLATED else cls.neighbours(prefix_token_ids, behind)


@dataclass(frozen=True, slots=True)
class KVRecipe:
    """Everything that changes a chunk's KV apart from its tokens and its context.

    Attributes:
        weights_fingerprint: content hash of the weights (`ragkit.models.weights_fingerprint`).
        config: the model's sizes, RoPE settings among them.
        tokenizer_id: the tokenizer's identity.
        dtype: the type that the model computes in.
        codec_id: the codec that the KV passes through.
        tenant_salt: separates tenants: equal text of two tenants has two keys.
        format_version: version of the stored form.
    """

    weights_fingerprint: str
    config: ModelConfig
    tokenizer_id: str
    dtype: torch.dtype
    codec_id: str
    tenant_salt: str = ""
    format_version: int = KV_FORMAT_VERSION

    def key(self, token_ids: Sequence[int], context: ChunkContext) -> KVKey:
        """Return the key of the KV of `token_ids` computed behind `context`."""
        return self.keys_behind(context)(token_ids)

    def keys_behind(self, context: ChunkContext) -> Callable[[Sequence[int]], KVKey]:
        """Return what gives the keys of chunks computed behind `context`, by their token ids."""
        before, behind = _settings_around_context(self)
        common = before.copy()
        # JSON keeps the fields apart whatever they hold, and escapes the zero byte that ends it here.
        common.update(json.dumps(context.context_id).encode() + behind + b"\0")

        def key(token_ids: Sequence[int]) -> KVKey:
            digest = common.copy()
            digest.update(_token_digest(token_ids).digest())
            return KVKey(digest.hexdigest())

        return key


@functools.lru_cache(maxsize=8)
def _settings_around_context(recipe: KVRecipe) -> tuple[hashlib._Hash, bytes]:
    """Return the digest of what stands before a key's context, and what stands behind it.

    A document of a million tokens has thousands of keys that differ in context and tokens alone, and to write the
    model's sizes takes most of the time of each.
    """
    settings = {
        "weights": recipe.weights_fingerprint,
        "config": dataclasses.asdict(recipe.config),
        "tokenizer": recipe.tokenizer_id,
        "dtype": str(recipe.dtype),
        "codec": recipe.codec_id,
        "salt": recipe.tenant_salt,
        "format": recipe.format_version,
    }
    # The fields stand in the order of their names.
    before = {name: value for name, value in settings.items() if name < "context"}
    behind = {name: value for name, value in settings.items() if name > "context"}
    first, last = (json.dumps(some, sort_keys=True) for some in (before, behind))
    return hashlib.sha256((first[:-1] + ', "context": ').encode()), (", " + last[1:]).encode()


def _token_digest(token_ids: Sequence[int]) -> hashlib._Hash:
    # As 64-bit numbers in the machine's order; `struct` takes a fifth of the time of `array`.
    return hashlib.sha256(struct.pack(f"={len(token_ids)}q", *token_ids))
