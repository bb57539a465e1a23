"""The KV of chunks, each computed once behind its context, whatever prompt it will stand in."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

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
        neighbours: gives the segments that stand between prefix and chunk for `ContextKind.NEIGHBOURS`, by chunk id.

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
        self._neighbours = neighbours or (lambda chunk_id: ())
        self._key = None if context is ContextKind.NEIGHBOURS else recipe.keys_behind(self._context_of(""))
        self._prefixes: dict[tuple[int, ...], list[LayerKV]] = {}
        self._lock = threading.Lock()

    def ref(self, segment: Segment) -> ChunkRef:
        """Return the reference of a chunk's segment."""
        assert segment.chunk_id is not None, "only chunks have KV of their own"
        key_of = self._key or self.recipe.keys_behind(self._context_of(segment.chunk_id))
        key = key_of(segment.token_ids)
        return ChunkRef(key, segment.token_ids, segment.chunk_id)

    def is_exact_behind(self, prefix: Sequence[int]) -> bool:
        """Return whether a chunk that stands right behind `prefix` has the KV that full prefill would compute."""
        return self.context is ContextKind.PREFIX and tuple(prefix) == self.canonical_prefix

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
        between = [token for segment in self._between(ref.chunk_id) for token in segment.token_ids]
        rows = self._pass((*between, *ref.token_ids), past)
        return [(keys[len(between) :], values[len(between) :]) for keys, values in rows] if between else rows

    def _pass(self, token_ids: Sequence[int], past: Sequence[tuple[Tensor, Tensor]]) -> list[LayerKV]:
        if not token_ids:
            spec = self._decoder.layout.layers[0]
            empty = torch.empty(
                (0, spec.num_kv_heads, spec.head_dim), dtype=self._decoder.dtype, device=self._decoder.device
            )
            return [(empty, empty)] * self._decoder.layout.num_layers
        total = len(token_ids) + (len(past[0][0]) if past else 0)
        attend = StandaloneAttention(self._rotary.table(total, total), self._decoder.scale, past)
        activations = self._decoder.embed(list(token_ids))
        last = self._decoder.config.num_layers - 1
        for layer in range(last):
            activations = self._decoder.layer(layer, activations, attend)
        projected = self._decoder.project(last, activations)  # what follows in the last layer changes no row
        attend.keep_rows(projected.keys, projected.values)
        return attend.kept

    def _between(self, chunk_id: str) -> Sequence[Segment]:
        return self._neighbours(chunk_id) if self.context is ContextKind.NEIGHBOURS else ()

    def _context_of(self, chunk_id: str) -> ChunkContext:
        if self.context is ContextKind.ISOLATED:
            return ChunkContext.isolated()
        if self.context is ContextKind.PREFIX:
            return ChunkContext.prefix(self.canonical_prefix)
        ids = [str(segment.chunk_id) for segment in self._between(chunk_id)]
        return ChunkContext.neighbours(self.canonical_prefix, ids)


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
