"""How much sooner a blend gives the first logits than full prefill, from every place where chunk KV can lie.

Timed is everything from the chunks' ids to the first logits: finding and loading KV, computing what is missing,
choosing tokens, recomputing them. Every prefill of a prompt takes its turn in every round, and the order rotates, so
that a machine that slows down slows all of them; a first round warms up.
"""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from ragkit.bench.watch import Watch
from ragkit.config import AUTO, BlendConfig, KVConfig
from ragkit.generation.blend_prefill import BlendOptions, BlendPrefill
from ragkit.generation.chunk_prefill import ChunkPrefill, Neighbours
from ragkit.generation.decoder import Decoder
from ragkit.generation.full_prefill import FullPrefill
from ragkit.generation.rotary_cache import RotaryCache
from ragkit.generation.strategy import PrefillRequest, PrefillResult, PrefillStrategy
from ragkit.kvcache.codecs import make_codec
from ragkit.kvcache.coverage import configured_ratio
from ragkit.kvcache.eviction import make_policy
from ragkit.kvcache.kv_key import ContextKind, KVRecipe
from ragkit.kvcache.kv_store import KVStore
from ragkit.kvcache.memory_tier import MemoryTier
from ragkit.kvcache.pool import BLOCK_SIZE, KVPool
from ragkit.kvcache.pool_tier import PoolTier
from ragkit.kvcache.request_kv import RequestKV
from ragkit.kvcache.selectors import make_selector
from ragkit.types import Prompt

_UNBOUNDED = 1 << 40  # of the host: a machine without room for the prompts' KV is not asked to measure them


class KVPlace(StrEnum):
    """Where a blend takes the chunks' KV from; `COMPUTED` is from nowhere: it is computed on the way."""

    COMPUTED = "computed"
    MEMORY = "memory"
    GPU = "gpu"


@dataclass(frozen=True, slots=True)
class Side:
    """One of the prefills that are compared. Full prefill has no place and no ratio."""

    place: KVPlace | None = None
    ratio: float | None = None


FULL = Side()


@dataclass(frozen=True, slots=True)
class SpeedRow:
    """One prefill of one prompt: medians over the rounds, in milliseconds.

    Attributes:
        prefill: full or blend.
        kv_from, ratio: of a blend; None for full prefill.
        tokens: of the whole prompt.
        text: what the chunks are made of, collection or random.
        first_logits_ms: everything; the parts of a blend follow.
        compute_ms: computing chunk KV that was missing.
        load_ms: until the last chunk's KV is there, without computing it.
        select_ms: choosing tokens.
        recompute_ms: the pass over the chosen tokens and the question.
        overlapped_ms: how much of loading went on below the other steps.
        times_full: full prefill's milliseconds over these.
        samples_ms: first_logits_ms of every round.
    """

    prefill: str
    kv_from: str | None
    ratio: float | None
    tokens: int
    text: str
    first_logits_ms: float
    compute_ms: float | None
    load_ms: float | None
    select_ms: float | None
    recompute_ms: float | None
    overlapped_ms: float | None
    times_full: float
    samples_ms: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class SpeedCheck:
    """Whether what is timed is right: relative distances from full prefill's first logits.

    Attributes:
        tokens: of the prompt that it was tried with.
        gap: of a blend that recomputes every token.
        noise: of full prefill in two pieces, which sums in another order.
    """

    tokens: int
    gap: float
    noise: float


_Steps = Mapping[str, float]


class PromptTimings:
    """What was timed with one prompt so far."""

    def __init__(self, tokens: int, text: str, sides: Sequence[Side]) -> None:
        self._tokens = tokens
        self._text = text
        self._samples: dict[Side, list[_Steps]] = {side: [] for side in sides}

    def add(self, side: Side, steps: _Steps) -> None:
        """Keep one sample."""
        self._samples[side].append(steps)

    def rows(self) -> list[SpeedRow]:
        """Return a row a side that has a sample; none before full prefill has one."""
        if not self._samples[FULL]:
            return []
        full = statistics.median(steps["total"] for steps in self._samples[FULL])
        return [self._row(side, samples, full) for side, samples in self._samples.items() if samples]

    def _row(self, side: Side, samples: Sequence[_Steps], full: float) -> SpeedRow:
        def median(step: str) -> float | None:
            values = [sample[step] for sample in samples if step in sample]
            return statistics.median(values) if values else None

        total = statistics.median(sample["total"] for sample in samples)
        return SpeedRow(
            prefill="full" if side is FULL else "blend",
            kv_from=None if side.place is None else str(side.place),
            ratio=side.ratio,
            tokens=self._tokens,
            text=self._text,
            first_logits_ms=total,
            compute_ms=median("compute_kv"),
            load_ms=median("load_kv"),
            select_ms=median("select"),
            recompute_ms=median("blend"),
            overlapped_ms=median("overlapped"),
            times_full=full / total,
            samples_ms=tuple(sample["total"] for sample in samples),
        )


class BlendSpeed:
    """Times prefills of one model. Close it: it holds threads and the chunks' KV.

    Args:
        decoder, rotary: the model.
        prefix: token ids that stand before every chunk while its KV is computed.
        kv, blend: codec, context and selector; tiers on disk and behind are not used.
        ratios: parts of the chunks' tokens that are recomputed, one blend each.
        prompts: what will be timed; the pool has room for the largest.
        with_pool: also from the pool, where chunks lie on a GPU.
        neighbours: which chunks stand before a chunk, for the context of that name.

    The blend that computes the chunks' KV is timed at one ratio, the configured one if it is among `ratios`, else the
    middle one: at another ratio it differs by what the others differ by.
    """

    def __init__(
        self,
        decoder: Decoder,
        rotary: RotaryCache,
        prefix: Sequence[int],
        kv: KVConfig,
        blend: BlendConfig,
        ratios: Sequence[float],
        prompts: Sequence[Prompt],
        *,
        with_pool: bool,
        neighbours: Neighbours | None = None,
    ) -> None:
        self._decoder = decoder
        self._rotary = rotary
        self._with_pool = with_pool
        codec = make_codec(kv.codec, decoder.layout)
        recipe = KVRecipe("0" * 64, decoder.config, "benchmark", decoder.dtype, codec.codec_id)
        self._chunks = ChunkPrefill(decoder, rotary, recipe, prefix, ContextKind(kv.context), neighbours)
        on_gpu = decoder.device.type == "cuda"
        self._memory = MemoryTier("ram", _UNBOUNDED, make_policy("lru"), page_locked=on_gpu)
        self._store = KVStore(codec, self._memory)
        self._options = BlendOptions(configured_ratio(blend), make_selector(blend.selector, decoder.config.num_layers))
        self._blend = BlendPrefill(self._store, self._chunks, self._options)
        blocks = max(_blocks(len(prompt)) + with_pool * _chunk_blocks(prompt) for prompt in prompts)
        self._pool = KVPool(decoder.layout, blocks + 1, decoder.device)
        cold = blend.ratio if blend.ratio != AUTO and blend.ratio in ratios else sorted(ratios)[len(ratios) // 2]
        self.sides = (
            FULL,
            *(Side(KVPlace.MEMORY, ratio) for ratio in ratios),
            *(Side(KVPlace.GPU, ratio) for ratio in ratios if with_pool),
            Side(KVPlace.COMPUTED, cold),
        )
        self._timings: list[PromptTimings] = []

    def close(self) -> None:
        """Stop the threads and let the KV go."""
        self._store.close()

    def rows(self) -> list[SpeedRow]:
        """Return what was timed so far; that of a prompt that was cut short as well."""
        return [row for timings in self._timings for row in timings.rows()]

    @torch.inference_mode()
    def check(self, prompt: Prompt, watch: Watch) -> SpeedCheck:
        """Return how far recomputing every token is from full prefill."""
        in_pieces = FullPrefill(piece_tokens=-(-len(prompt) // 2))
        strategies: list[tuple[PrefillStrategy, float | None]] = [
            (FullPrefill(), None), (in_pieces, None), (self._blend, 1.0)
        ]  # fmt: skip
        watch.start(len(strategies), f"prefills of {len(prompt):,} tokens that check the results")
        logits = []
        for strategy, ratio in strategies:
            logits.append(self._prefill(strategy, ratio, prompt)[0].logits.float())
            watch.step()
        full, pieces, everything = logits
        return SpeedCheck(len(prompt), _distance(everything, full), _distance(pieces, full))

    @torch.inference_mode()
    def measure(self, prompt: Prompt, text: str, rounds: int, watch: Watch) -> bool:
        """Time every side `rounds` times, and return whether the time sufficed for all.

        Args:
            prompt: one of `prompts`.
            text: what its chunks are made of.
            rounds: how often, besides the round that warms up.
            watch: is looked at after every round.
        """
        timings = PromptTimings(len(prompt), text, self.sides)
        self._timings.append(timings)
        watch.start(len(self.sides) * (rounds + 1), f"prefills of {len(prompt):,} tokens")
        with self._pooled(prompt) as pooled:
            for turn in range(rounds + 1):
                if turn > 1 and watch.is_over:
                    return False
                shift = turn % len(self.sides)
                for side in (*self.sides[shift:], *self.sides[:shift]):
                    steps = self._run(side, pooled, prompt)
                    if turn:
                        timings.add(side, steps)
                    watch.step()
        return True

    def _run(self, side: Side, pooled: BlendPrefill | None, prompt: Prompt) -> _Steps:
        if side is FULL:
            return self._prefill(FullPrefill(), None, prompt)[1]
        if side.place is KVPlace.COMPUTED:
            self._store.discard([ref.key for ref in self._store.refs()])
        strategy = pooled if side.place is KVPlace.GPU and pooled is not None else self._blend
        result, steps = self._prefill(strategy, side.ratio, prompt)
        assert side.place is not KVPlace.GPU or set(result.kv.bytes_by_tier) == {"gpu"}, "chunks have left the pool"
        return steps

    @contextlib.contextmanager
    def _pooled(self, prompt: Prompt) -> Iterator[BlendPrefill | None]:
        """Give blended prefill with the chunks of `prompt` in the pool, or None without a pool for chunks."""
        if not self._with_pool:
            yield None
            return
        tier = PoolTier(self._pool, _chunk_blocks(prompt), make_policy("lru"))
        with KVStore(self._store.codec, self._memory, pool=tier) as store:
            blend = BlendPrefill(store, self._chunks, self._options)
            result, _ = self._prefill(blend, None, prompt)
            if result.afterwards is not None:
                result.afterwards()
            yield blend

    def _prefill(
        self, strategy: PrefillStrategy, ratio: float | None, prompt: Prompt
    ) -> tuple[PrefillResult, dict[str, float]]:
        """Return what a strategy gives and its milliseconds by step; the device is idle before and after."""
        gc.collect()
        self._wait()
        started = time.perf_counter()
        with RequestKV(self._pool) as kv:
            rotary = self._rotary.table(len(prompt), len(prompt))
            result = strategy.prefill(self._decoder, PrefillRequest(prompt, kv, rotary, ratio))
            self._wait()
            total = (time.perf_counter() - started) * 1e3
        return result, {**result.timings_ms, "total": total}

    def _wait(self) -> None:
        if self._decoder.device.type == "cuda":
            torch.cuda.synchronize(self._decoder.device)


def _blocks(tokens: int) -> int:
    return -(-tokens // BLOCK_SIZE)


def _chunk_blocks(prompt: Prompt) -> int:
    return sum(_blocks(len(segment.token_ids)) for segment in prompt.segments if segment.chunk_id is not None)


def _distance(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())
