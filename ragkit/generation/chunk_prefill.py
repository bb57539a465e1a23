"""The KV of chunks, each computed once behind its context, whatever prompt it will stand in."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import lru_cache, partial

import torch
from torch import Tensor

from ragkit.errors import KVCacheError
from ragkit.generation.attention import StandaloneAttention
from ragkit.generation.decoder import Decoder
from ragkit.generation.rotary_cache import RotaryCache
from ragkit.kvcache.chunk_kv import ChunkKV, ChunkRef
from ragkit.kvcache.codec import LayerKV
from ragkit.kvcache.cost_model import Cost
from ragkit.kvcache.kv_key import ChunkContext, ContextKind, KVRecipe
from ragkit.types import Segment

_KEPT_PREFIXES = 8  # of different system prompts; each takes a few dozen rows
_KEPT_CONTEXTS = 1024  # neighbours whose part of the key is kept
_KEPT_KEYS = 4096  # of chunks: to hash the tokens of a long prompt takes a millisecond, in which nothing is copied yet

# What a device may do before it was measured: FLOP/s in matrix products, and seconds until a pass is launched.
_FLOPS = {"cpu": 1e11, "cuda": 3e14}
_LAUNCH_S = {"cpu": 1e-3, "cuda": 1e-2}

Neighbours = Callable[[str], Sequence[Segment]]


class ChunkPrefill:
    """Names and computes chunk KV for one model, one canonical prefix and one kind of context. Thread-safe.

    Args:
        decoder: the model.
        rotary: its rotary tables.
        recipe: what the keys are made of.
        canonical_prefix: token ids that stand before every chunk while its KV is computed, unless it is isolated.
        context: what chunks are computed behind.
        neighbours: gives the segments that stand between prefix and chunk for `ContextKind.NEIGHBOURS`, by chunk id;
            none for a chunk that has none.

    Raises:
        KVCacheError: the context is neighbours, and nothing says which.
    """

    def __init__(
        self,
        decoder: Decoder,
        rotary: RotaryCache,
        recipe: KVRecipe,
        canonical_prefix: Sequence[int],
        context: ContextKind = ContextKind.PREFIX,
        neighbours: Neighbours | None = None,
    ) -> None:
        if context is ContextKind.NEIGHBOURS and neighbours is None:
            raise KVCacheError("KV behind neighbours needs to be told which: give `neighbours`, or the context prefix")
        self.recipe = recipe
        self.canonical_prefix = tuple(canonical_prefix)
        self.context = context
        self._decoder = decoder
        self._rotary = rotary
        self._neighbours = neighbours if context is ContextKind.NEIGHBOURS else None
        context_of = partial(ChunkContext.of, context, self.canonical_prefix)
        self._keys_behind = lru_cache(_KEPT_CONTEXTS)(lambda behind: recipe.keys_behind(context_of(behind)))
        self._key = lru_cache(_KEPT_KEYS)(lambda token_ids, behind: self._keys_behind(behind)(token_ids))
        self._prefixes: dict[tuple[int, ...], list[LayerKV]] = {}
        self._lock = threading.Lock()

    def ref(self, segment: Segment) -> ChunkRef:
        """Return the reference of a chunk's segment."""
        assert segment.chunk_id is not None, "only chunks have KV of their own"
        between = self._neighbours(segment.chunk_id) if self._neighbours is not None else ()
        behind = tuple(token for neighbour in between for token in neighbour.token_ids)
        return ChunkRef(self._key(segment.token_ids, behind), segment.token_ids, segment.chunk_id, behind)

    def is_exact_behind(self, prefix: Sequence[int], ref: ChunkRef) -> bool:
        """Return whether `ref`, standing right behind `prefix`, has the KV that full prefill would compute."""
        if self.context is ContextKind.ISOLATED or ref.behind:
            return False
        return tuple(prefix) == self.canonical_prefix

    @torch.inference_mode()
    def compute(self, refs: Sequence[ChunkRef]) -> list[ChunkKV]:
        """Return the KV of `refs`, computed now; keys are before RoPE."""
        return [ChunkKV(ref.key, ref.token_ids, tuple(self._compute_one(ref))) for ref in refs]

    @torch.inference_mode()
    def prefix_kv(self, token_ids: Sequence[int]) -> list[LayerKV]:
        """Return the KV of a prompt's first tokens, computed once for each prefix that is in use."""
        wanted = tuple(token_ids)
        with self._lock:
            found = self._prefixes.pop(wanted, None)
            if found is None:
                found = self._pass(wanted, ())
            self._prefixes[wanted] = found  # now the last one to leave
            if len(self._prefixes) > _KEPT_PREFIXES:
                del self._prefixes[next(iter(self._prefixes))]
            return found

    def _compute_one(self, ref: ChunkRef) -> list[LayerKV]:
        if self.context is ContextKind.ISOLATED:
            return self._pass(ref.token_ids, ())
        past = self.prefix_kv(self.canonical_prefix)
        # The tokens that the key was made of: what the store says now may be another edit's.
        rows, before = self._pass((*ref.behind, *ref.token_ids), past), len(ref.behind)
        return [(keys[before:], values[before:]) for keys, values in rows] if before else rows

    def _pass(self, token_ids: Sequence[int], past: Sequence[tuple[Tensor, Tensor]]) -> list[LayerKV]:
        if not token_ids:
            spec = self._decoder.layout.layers[0]
            empty = torch.empty(
                (0, spec.num_kv_heads, spec.head_dim), dtype=self._decoder.dtype, device=self._decoder.device
            )
            return [(empty, empty)] * self._decoder.layout.num_layers
        total = len(token_ids) + (len(past[0][0]) if past else 0)
        attend = StandaloneAttention(self._rotary.table(total, total), self._decoder.scale, past)
        projected = self._decoder.run_to_last(list(token_ids), attend)
        attend.keep_rows(projected.keys, projected.values)
        return attend.kept


def expected_attention_s(decoder: Decoder, rows: float) -> float:
    """Return the seconds that a token's attention to `rows` rows may take in all layers, before any was computed."""
    sizes = decoder.config
    kind = decoder.device.type if decoder.device.type in _FLOPS else "cpu"
    return 4 * sizes.num_layers * sizes.num_q_heads * sizes.head_dim * rows / _FLOPS[kind]


def expected_cost(decoder: Decoder, encoding_s: float = 0.0) -> Cost:
    """Return what computing a chunk's KV may take, in seconds a chunk and a token, before any was computed.

    Args:
        decoder: the model.
        encoding_s: what encoding a number may take.
    """
    sizes = decoder.config
    heads = (2 * sizes.num_q_heads + 2 * sizes.num_kv_heads) * sizes.head_dim
    weights = sizes.num_layers * sizes.hidden_size * (heads + 3 * sizes.intermediate_size)
    kind = decoder.device.type if decoder.device.type in _FLOPS else "cpu"
    numbers = sum(2 * spec.num_kv_heads * spec.head_dim for spec in decoder.layout.layers)
    return Cost(_LAUNCH_S[kind], 2 * weights / _FLOPS[kind] + numbers * encoding_s)
