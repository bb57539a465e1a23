"""Prefill that reuses the KV of chunks at any position and recomputes the tokens that matter.

Steps: fetch the chunks' KV (what is nowhere is computed), lay it out behind the prompt's prefix, choose tokens, and run
the blend pass. With every token chosen the result equals full prefill; with none it is plain reuse.

Sources: CacheBlend (arXiv 2405.16444) for selective recomputation, FusionRAG (arXiv 2601.12904) for choosing by the
question's attention; change propagation is ours.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial

from torch import Tensor

from ragkit.config import BlendRows
from ragkit.errors import ConfigError
from ragkit.generation.blend_pass import BlendInputs, BlendPass, Propagation
from ragkit.generation.chunk_prefill import ChunkPrefill
from ragkit.generation.decoder import Decoder
from ragkit.generation.full_prefill import FullPrefill
from ragkit.generation.private_rows import RowSink
from ragkit.generation.question_pass import question_mass
from ragkit.generation.request_rows import RequestRows
from ragkit.generation.reused_rows import BlendLayout, ReusedRows, RowSource
from ragkit.generation.step_clock import StepClock
from ragkit.generation.strategy import LaunchedPrefill, PrefillRequest, PrefillResult, done
from ragkit.generation.streamed_rows import StreamedChunks
from ragkit.kvcache.chunk_kv import ChunkRef, EncodedKV
from ragkit.kvcache.codec import LayerKV
from ragkit.kvcache.coverage import Coverage, Ratio, count_of, most_of
from ragkit.kvcache.fetch import FetchReport
from ragkit.kvcache.kv_store import KVStore
from ragkit.kvcache.pool_tier import PinnedBlocks
from ragkit.kvcache.rope import RotaryTable, has_own_frequencies
from ragkit.kvcache.selectors_question import QuestionAttention
from ragkit.kvcache.token_selection import ChunkSpan, LayerRange, TokenSelector
from ragkit.types import KVUse, Prompt

_OWN_FREQUENCIES = (
    "nothing was reused: a prompt beyond the window of this model's `dynamic` rotary frequencies has frequencies of "
    "its own, which chunk KV was not computed with"
)

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class BlendOptions:
    """How chunks are blended; the defaults are what benchmarks/blend_quality.py supports.

    Attributes:
        ratio: part of the chunks' tokens that is recomputed, from 0 (plain reuse) to 1 (equals full prefill), or what
            it must cover.
        selector: which tokens.
        propagation: how their change moves the others.
        rows: whether a request copies the chunks' rows, or lists them where they lie in the pool.
    """

    ratio: Ratio = 0.15
    selector: TokenSelector = field(default_factory=QuestionAttention)
    propagation: Propagation = field(default_factory=Propagation)
    rows: BlendRows = BlendRows.PRIVATE

    def __post_init__(self) -> None:
        require_ratio(self.ratio, self.selector)


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
        self._has_refused = False

    def chunk_refs(self, prompt: Prompt) -> list[ChunkRef]:
        """Return the references of the KV that a prompt's prefill will fetch, in its order."""
        return [self.chunks.ref(segment) for segment in BlendLayout(prompt).chunks]

    def prefill(self, decoder: Decoder, request: PrefillRequest) -> PrefillResult:
        """Return the logits of the first token; the request's rows are blended.

        They are private, unless shared ones are configured and the pool has room for all of the chunks.

        Raises:
            CacheCapacityError: the pool has too few free blocks.
            ConfigError: the request's ratio is not from 0 to 1, or is a coverage that the selector cannot meet.
        """
        return self.launch(decoder, request).finish()

    def launch(self, decoder: Decoder, request: PrefillRequest) -> LaunchedPrefill:
        """Do what `prefill` does without waiting for a GPU, whose work for others goes on below the launches.

        Host memory that chunks are copied from is held until `finish`, but no blocks of the pool: whoever gets them
        writes behind this prefill, in the same stream. The host waits for the device where chunks must be computed,
        where the ratio is a coverage, which settles a shape, where a selector narrows its choice between layers, and
        where change is propagated by evidence.
        """
        layout = BlendLayout(request.prompt)
        if not layout.chunks:
            return done(FullPrefill().prefill(decoder, request))
        if has_own_frequencies(decoder.config.rope, layout.num_tokens):
            # What lies behind un-rotated keys was computed with other frequencies: no row would be exact.
            return done(replace(FullPrefill().prefill(decoder, request), warnings=(_OWN_FREQUENCIES,)))
        return self._launch(decoder, request, layout)

    def _launch(self, decoder: Decoder, request: PrefillRequest, layout: BlendLayout) -> LaunchedPrefill:
        options = self.options
        ratio = options.ratio if request.ratio is None else require_ratio(request.ratio, options.selector)
        clock = StepClock(decoder.device)
        refs = [self.chunks.ref(segment) for segment in layout.chunks]
        spans = layout.spans(self.chunks.is_exact_behind(layout.prefix, refs[0]))
        prefix = self.chunks.prefix_kv(layout.prefix)
        own = RequestRows(request, prefix, spans, options.propagation, options.rows)
        with ExitStack() as holding:
            fetched = holding.enter_context(self.kv_store.fetch(refs, self.chunks.compute))
            rows, streamed = self._load(decoder, layout, prefix, fetched.chunks)
            inputs = own.settle(layout, refs, fetched.chunks, streamed, self.kv_store.pool)
            scene = BlendScene(decoder, request.rotary, inputs, rows, spans, ratio, options.propagation)
            clock.lap("load_kv")
            chosen = options.selector.choose(scene)
            if streamed is not None:
                streamed.tokens_are_chosen()
            clock.lap("select")
            blend = scene.blend_pass()
            logits = blend.run(chosen, own.target(chosen), options.selector)
            clock.lap("blend")
            if self.kv_store.pool is not None:
                self.kv_store.pool.release_all([one for one in fetched.chunks if isinstance(one, PinnedBlocks)])
            held = holding.pop_all()
        request.kv.num_tokens = layout.num_tokens
        recomputed = round(blend.row_layers / decoder.config.num_layers) + layout.num_tokens - layout.stop
        arrival = None if streamed is None else streamed.queue.last_arrival()
        afterwards = None if own.are_shared else self._afterwards(streamed)

        def finish() -> PrefillResult:
            with held:  # the copies have to be there before the chunks may leave their tiers
                timings = clock.finish(arrival)
            return PrefillResult(
                logits,
                reused=layout.num_tokens - recomputed,
                recomputed=recomputed,
                timings_ms=with_computing(timings, fetched.report),
                kv=kv_use(fetched.report),
                afterwards=afterwards,
                warnings=self._warnings(own.refusal, fetched.report.damage),
            )

        return LaunchedPrefill(logits, finish)

    def _load(
        self,
        decoder: Decoder,
        layout: BlendLayout,
        prefix: Sequence[LayerKV],
        chunks: Sequence[EncodedKV | PinnedBlocks],
    ) -> tuple[RowSource, StreamedChunks | None]:
        """Return the rows of the prompt, and what brings them to the device if they are not there yet."""
        if decoder.device.type != "cuda" and self.kv_store.pool is None:
            stored = [chunk for chunk in chunks if isinstance(chunk, EncodedKV)]
            return ReusedRows.gather(decoder, layout, prefix, stored, self.kv_store.codec), None
        streamed = StreamedChunks(decoder, layout, prefix, chunks, self.kv_store.codec)
        return streamed.rows(), streamed

    def _warnings(self, refusal: str, damage: str) -> tuple[str, ...]:
        damages = (damage,) if damage else ()
        if not refusal:
            return damages
        warning = f"rows are private, not shared: {refusal}"
        if not self._has_refused:  # once; every result says it
            self._has_refused = True
            _log.warning(warning)
        return (warning, *damages)

    def _afterwards(self, streamed: StreamedChunks | None) -> Callable[[], None] | None:
        tier = self.kv_store.pool
        if tier is None or streamed is None or not streamed.came_from_host:
            return None
        return partial(streamed.keep, tier)


class BlendScene:
    """One prompt as its selector sees it."""

    def __init__(
        self,
        decoder: Decoder,
        rotary: RotaryTable,
        inputs: BlendInputs,
        rows: RowSource,
        spans: Sequence[ChunkSpan],
        ratio: Ratio,
        propagation: Propagation,
    ) -> None:
        self.spans = tuple(spans)
        self.budget = _budget(ratio, spans)
        self.coverage = ratio if isinstance(ratio, Coverage) else None
        self.device = decoder.device
        self._decoder = decoder
        self._rotary = rotary
        self._inputs = inputs
        self._rows = rows
        self._propagation = propagation

    def blend_pass(self) -> BlendPass:
        """Return the pass over this prompt."""
        return self._pass_over(self._rows)

    def question_mass(self, layers: LayerRange, repaired: Tensor | None = None) -> Tensor:
        """Return (positions,) fp32, as `SelectionScene` says."""
        rows = self._rows.draft
        if repaired is not None:
            rows, draft = ReusedRows.unwritten(self._decoder, rows.num_tokens), rows
            self._pass_over(draft).run(repaired, RowSink.over(rows))
        inputs = self._inputs
        ending = inputs.token_ids[self.spans[-1].stop :]
        return question_mass(self._decoder, self._rotary, rows, ending, layers, inputs.pool, inputs.slots)

    def _pass_over(self, rows: RowSource) -> BlendPass:
        return BlendPass(self._decoder, self._rotary, self, rows, self._inputs, self._propagation)


def _budget(ratio: Ratio, spans: Sequence[ChunkSpan]) -> int:
    """Return how many tokens may be recomputed: of exact chunks none, unless all tokens are."""
    tokens = spans[-1].stop - spans[0].start
    budget = count_of(most_of(ratio), tokens)
    return budget if budget == tokens else min(budget, sum(one.stop - one.start for one in spans if not one.is_exact))


def require_ratio(ratio: Ratio, selector: TokenSelector) -> Ratio:
    """Return `ratio`.

    Raises:
        ConfigError: it is neither a number from 0 to 1 nor a coverage that `selector` can meet.
    """
    if isinstance(ratio, Coverage):
        if not selector.meets_coverage:
            raise ConfigError(
                f"the selector {selector.name} does not ask what the question looks at and can meet no coverage: "
                "give it a ratio in [0, 1]"
            )
    elif not (math.isfinite(ratio) and 0 <= ratio <= 1):
        raise ConfigError(f"the ratio of recomputed tokens must lie in [0, 1], got {ratio!r}")
    return ratio


def kv_use(report: FetchReport) -> KVUse:
    """Return what a fetch found, as answers tell it."""
    return KVUse(report.hits, report.misses, report.holes, dict(report.bytes_by_tier), report.recomputed)


def with_computing(timings: Mapping[str, float], report: FetchReport) -> dict[str, float]:
    """Return the steps with finding and loading KV (`load_kv`) apart from computing what was missing."""
    load_ms = max(timings["load_kv"] - report.compute_ms, 0.0)
    return {"load_kv": load_ms, "compute_kv": report.compute_ms} | {
        name: spent for name, spent in timings.items() if name != "load_kv"
    }
