"""Prefill that reuses the KV of chunks at any position and recomputes the tokens that matter.

Steps: fetch the chunks' KV (what is nowhere is computed), lay it out behind the prompt's prefix, choose tokens, and run
the blend pass. With every token chosen the result equals full prefill; with none it is plain reuse.

Sources: CacheBlend (arXiv 2405.16444) for selective recomputation, FusionRAG (arXiv 2601.12904) for choosing by the
question's attention; change propagation is ours.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ragkit.errors import ConfigError
from ragkit.generation.blend_pass import BlendPass, Propagation, RowSink
from ragkit.generation.chunk_prefill import ChunkPrefill
from ragkit.generation.decoder import Decoder
from ragkit.generation.full_prefill import FullPrefill
from ragkit.generation.question_pass import question_mass
from ragkit.generation.reused_rows import BlendLayout, ReusedRows, RowSource
from ragkit.generation.strategy import PrefillRequest, PrefillResult
from ragkit.kvcache.kv_store import FetchedKV, FetchReport, KVStore
from ragkit.kvcache.selectors_question import QuestionAttention
from ragkit.kvcache.token_selection import ChunkSpan, TokenSelector
from ragkit.types import KVUse


@dataclass(frozen=True, slots=True)
class BlendOptions:
    """How chunks are blended; the defaults are what benchmarks/blend_quality.py supports.

    Attributes:
        ratio: part of the chunks' tokens that is recomputed, from 0 (plain reuse) to 1 (equals full prefill).
        selector: which tokens.
        propagation: how their change moves the others.
    """

    ratio: float = 0.15
    selector: TokenSelector = field(default_factory=QuestionAttention)
    propagation: Propagation = field(default_factory=Propagation)

    def __post_init__(self) -> None:
        require_ratio(self.ratio)


class BlendPrefill:
    """The strategy `blend`.

    Args:
        kv_store: where chunk KV is found and kept.
        chunks: names chunk KV and computes what is missing.
        options: how chunks are blended.
    """

    name = "blend"

    def __init__(self, kv_store: KVStore, chunks: ChunkPrefill, options: BlendOptions | None = None) -> None:
        self.kv_store = kv_store
        self.chunks = chunks
        self.options = options or BlendOptions()

    def prefill(self, decoder: Decoder, request: PrefillRequest) -> PrefillResult:
        """Return the logits of the first token; the request's rows are private and blended.

        Raises:
            CacheCapacityError: the pool has too few free blocks.
            ConfigError: the request's ratio is not from 0 to 1.
        """
        layout = BlendLayout(request.prompt)
        if not layout.chunks:
            return FullPrefill().prefill(decoder, request)
        ratio = self.options.ratio if request.ratio is None else require_ratio(request.ratio)
        request.kv.reserve(layout.num_tokens)
        clock = _Clock(decoder.device)
        refs = [self.chunks.ref(segment) for segment in layout.chunks]
        with self.kv_store.fetch(refs, self.chunks.compute) as fetched:
            clock.lap("fetch_kv")
            rows = self._rows(decoder, layout, fetched)
            clock.lap("gather_kv")
        scene = BlendScene(
            decoder, request, rows, layout.spans(self.chunks.is_exact_behind(layout.prefix)), ratio,
            self.options.propagation,
        )  # fmt: skip
        chosen = self.options.selector.choose(scene)
        clock.lap("select")
        blend = scene.blend_pass()
        slots = request.kv.slots(0, layout.num_tokens).to(decoder.device)
        pool = request.kv.pool
        sink = RowSink(list(zip(pool.keys, pool.values, strict=True)), slots)
        logits = blend.run(chosen, sink, self.options.selector)
        request.kv.num_tokens = layout.num_tokens
        clock.lap("blend")
        recomputed = round(blend.row_layers / decoder.config.num_layers) + layout.num_tokens - layout.stop
        return PrefillResult(
            logits,
            reused=layout.num_tokens - recomputed,
            recomputed=recomputed,
            timings_ms=clock.with_loading(fetched.report),
            kv=kv_use(fetched.report),
        )

    def _rows(self, decoder: Decoder, layout: BlendLayout, fetched: FetchedKV) -> ReusedRows:
        prefix = self.chunks.prefix_kv(layout.prefix)
        return ReusedRows.gather(decoder, layout, prefix, fetched.chunks, self.kv_store.codec)


class BlendScene:
    """One prompt as its selector sees it."""

    def __init__(
        self,
        decoder: Decoder,
        request: PrefillRequest,
        rows: RowSource,
        spans: Sequence[ChunkSpan],
        ratio: float,
        propagation: Propagation,
    ) -> None:
        self.spans = tuple(spans)
        self.budget = math.floor(ratio * (spans[-1].stop - spans[0].start) + 1e-9)
        self.device = decoder.device
        self._decoder = decoder
        self._rotary = request.rotary
        self._rows = rows
        self._token_ids = request.token_ids()
        self._propagation = propagation

    def blend_pass(self) -> BlendPass:
        """Return the pass over this prompt."""
        return self._pass_over(self._rows)

    def question_mass(self, repaired: Tensor | None = None) -> Tensor:
        """Return (positions,) fp32, as `SelectionScene` says."""
        rows = self._rows.draft
        if repaired is not None:
            rows, draft = ReusedRows.unwritten(self._decoder, rows.num_tokens), rows
            self._pass_over(draft).run(repaired, RowSink.over(rows))
        return question_mass(self._decoder, self._rotary, rows, self._token_ids[self.spans[-1].stop :])

    def _pass_over(self, rows: RowSource) -> BlendPass:
        return BlendPass(self._decoder, self._rotary, self, rows, self._token_ids, self._propagation)


def require_ratio(ratio: float) -> float:
    """Return `ratio`.

    Raises:
        ConfigError: it is not a number from 0 to 1.
    """
    if not (math.isfinite(ratio) and 0 <= ratio <= 1):
        raise ConfigError(f"the ratio of recomputed tokens must lie in [0, 1], got {ratio!r}")
    return ratio


def kv_use(report: FetchReport) -> KVUse:
    """Return what a fetch found, as answers tell it."""
    return KVUse(report.hits, report.misses, report.holes, dict(report.bytes_by_tier))


class _Clock:
    """Milliseconds of the steps, each waited for on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """End a step."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        self._laps[name] = (now - self._last) * 1e3
        self._last = now

    def with_loading(self, report: FetchReport) -> dict[str, float]:
        """Return the steps, with finding and loading KV (`load_kv`) apart from computing what was missing."""
        laps = dict(self._laps)
        laps["compute_kv"] = report.compute_ms
        laps["load_kv"] = max(laps.pop("fetch_kv") - report.compute_ms, 0.0) + laps.pop("gather_kv")
        return laps
