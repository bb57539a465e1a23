"""How near blended prefill comes to full prefill, prompt by prompt, for several ways of blending."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch

from ragkit.bench.answer_distance import AnswerDistance, AnswerScorer, distance_between
from ragkit.config import BlendRows
from ragkit.generation.blend_pass import Propagation
from ragkit.generation.blend_prefill import BlendOptions, BlendPrefill
from ragkit.generation.chunk_prefill import ChunkPrefill, Neighbours
from ragkit.generation.full_prefill import FullPrefill
from ragkit.kvcache.codecs import make_codec
from ragkit.kvcache.coverage import Coverage, Ratio
from ragkit.kvcache.eviction import make_policy
from ragkit.kvcache.kv_key import ContextKind, KVRecipe
from ragkit.kvcache.kv_store import KVStore
from ragkit.kvcache.memory_tier import MemoryTier
from ragkit.kvcache.pool_tier import PoolTier
from ragkit.kvcache.selectors_static import NoTokens
from ragkit.kvcache.token_selection import TokenSelector
from ragkit.types import Prompt

#: Through what plain reuse is measured, whatever the others use: the gap that shares are of is always the same.
REUSE_CODEC, REUSE_CONTEXT = "bf16", ContextKind.PREFIX
NO_PROPAGATION = Propagation(key_strength=0.0, value_strength=0.0)

_STORE_BYTES = 8 << 30  # more than one prompt takes


@dataclass(frozen=True, slots=True)
class Variant:
    """One way of blending. Plain reuse is `PLAIN_REUSE`.

    Attributes:
        name: for tables.
        selector, ratio: which tokens are recomputed, and how many.
        propagation: how their change moves the others.
        context: what the chunks are computed behind, where it is not what those of all variants are.
        rows: whether the request copies the chunks' rows, or lists them where they lie in the pool.
    """

    name: str
    selector: TokenSelector
    ratio: Ratio
    propagation: Propagation = field(default_factory=Propagation)
    context: ContextKind | None = None
    rows: BlendRows = BlendRows.PRIVATE

    @property
    def label(self) -> str:
        """The name and the ratio, or what it covers."""
        if isinstance(self.ratio, Coverage):
            return f"{self.name} auto {self.ratio.share:g}"
        return f"{self.name} @ {self.ratio:g}"


PLAIN_REUSE = Variant("reuse", NoTokens(), 0.0, NO_PROPAGATION)


class BlendQuality:
    """Full prefill and variants of one model, one prompt at a time.

    Args:
        scorer: follows the answers.
        canonical_prefix: what stands before every chunk while its KV is computed.
        codec, context: how the chunks of all variants but plain reuse are kept, and what they are computed behind.
        neighbours: which chunks stand before a chunk, for the context of that name.
    """

    def __init__(
        self,
        scorer: AnswerScorer,
        canonical_prefix: Sequence[int],
        codec: str,
        context: ContextKind,
        neighbours: Neighbours | None = None,
    ) -> None:
        self._scorer = scorer
        self._prefix = tuple(canonical_prefix)
        self._codec = codec
        self._context = context
        self._neighbours = neighbours

    @torch.inference_mode()
    def score(
        self,
        prompt: Prompt,
        variants: Sequence[Variant],
        gold: Sequence[int] = (),
        after_each: Callable[[], None] = lambda: None,
    ) -> dict[str, AnswerDistance]:
        """Return how far each variant is from full prefill, by label.

        Args:
            prompt: prefix, chunks and question.
            variants: what is measured.
            gold: token ids of the right answer; empty where it is not known.
            after_each: called after full prefill and each variant.
        """
        reference = self._scorer.outcome(FullPrefill(), prompt, gold)
        after_each()
        found = {}
        with ExitStack() as stack:
            stores: dict[tuple[str, BlendRows], KVStore] = {}
            for variant in variants:
                is_plain = variant is PLAIN_REUSE
                codec = REUSE_CODEC if is_plain else self._codec
                context = REUSE_CONTEXT if is_plain else variant.context or self._context
                place = (codec, variant.rows)
                if place not in stores:
                    stores[place] = stack.enter_context(self._store(*place))
                options = BlendOptions(variant.ratio, variant.selector, variant.propagation, variant.rows)
                strategy = BlendPrefill(stores[place], self._chunks(codec, context), options)
                outcome = self._scorer.outcome(strategy, prompt, gold, reference.answer)
                found[variant.label] = distance_between(outcome, reference)
                after_each()
        return found

    def _store(self, codec: str, rows: BlendRows) -> KVStore:
        decoder, pool = self._scorer.decoder, self._scorer.pool
        memory = MemoryTier("ram", _STORE_BYTES, make_policy("lru"), decoder.device)
        tier = PoolTier(pool, pool.num_blocks, make_policy("lru")) if rows is BlendRows.SHARED else None
        return KVStore(make_codec(codec, decoder.layout), memory, pool=tier)

    def _chunks(self, codec: str, context: ContextKind) -> ChunkPrefill:
        decoder = self._scorer.decoder
        recipe = KVRecipe("0" * 64, decoder.config, "benchmark", decoder.dtype, codec)
        return ChunkPrefill(decoder, self._scorer.rotary, recipe, self._prefix, context, self._neighbours)
