"""What `ragkit bench blend` measures: how soon a blend gives the first logits, and how near it is to full prefill."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ragkit.bench.answer_distance import ROOM_BEHIND, AnswerDistance, AnswerScorer
from ragkit.bench.blend_prompts import (
    Question,
    Retrieve,
    ScoredPrompt,
    collection_prompt,
    musique_prompts,
    questions_from,
    random_prompt,
    retrieved_prompts,
)
from ragkit.bench.blend_quality import PLAIN_REUSE, BlendQuality, Variant
from ragkit.bench.blend_report import (
    QUALITY_RATIOS,
    SPEED_RATIOS,
    BlendBenchOptions,
    BlendReport,
    Part,
    ScoredText,
    TimedText,
)
from ragkit.bench.blend_speed import BlendSpeed, SpeedCheck, SpeedRow
from ragkit.bench.musique import musique_items
from ragkit.bench.prompt_lengths import choose_lengths, tokens_that_fit
from ragkit.bench.recovery import recoveries
from ragkit.bench.watch import Watch
from ragkit.config import AUTO, BlendRows, ChunkContextName, PipelineConfig
from ragkit.errors import UsageError
from ragkit.generation.chunk_prefill import Neighbours
from ragkit.generation.engine import Engine
from ragkit.generation.neighbours import ChunkNeighbours
from ragkit.kvcache.kv_key import ContextKind
from ragkit.kvcache.pool import BLOCK_SIZE, KVPool
from ragkit.kvcache.selectors import make_selector
from ragkit.progress import Progress
from ragkit.store.base import StoreReader
from ragkit.types import Prompt

_ROUNDS = {"cpu": 3, "cuda": 5}


@dataclass(frozen=True, slots=True)
class Collection:
    """The user's collection: its chunks, and what retrieval finds for a question."""

    store: StoreReader
    retrieve: Retrieve


@dataclass(slots=True)
class _Measured:
    """What `BlendBenchmark` has found so far."""

    speed: list[SpeedRow] = field(default_factory=list)
    check: SpeedCheck | None = None
    distances: list[dict[str, AnswerDistance]] = field(default_factory=list)
    prompt_tokens: list[int] = field(default_factory=list)
    material: ScoredText | None = None
    notes: list[str] = field(default_factory=list)


class BlendBenchmark:
    """Measures one engine. `report` gives what is there at any time, also after `run` was interrupted.

    Args:
        engine: the model; its own pool is not used, so a small one will do.
        config: codec, context, selector and ratio that are in force.
        options: what is measured.
        collection: what prompts are made of; None where there is no store.

    Raises:
        UsageError: a length is beyond the model's window, or quality alone is wanted and there is nothing to ask.
        GenerationError: a length that was asked for does not fit into memory.
    """

    def __init__(
        self, engine: Engine, config: PipelineConfig, options: BlendBenchOptions, collection: Collection | None = None
    ) -> None:
        self._engine = engine
        self._config = config
        self._options = options
        self._collection = collection
        self._builder = engine.prompt_builder(config.generation.system_prompt)
        self._canonical = engine.prompt_builder().prefix.token_ids
        self._found = _Measured()
        self._lengths: tuple[int, ...] = ()
        self._on_gpu = engine.decoder.device.type == "cuda"
        self._rounds = options.rounds or _ROUNDS[engine.decoder.device.type]
        self._started = time.perf_counter()
        if config.blend.rows is BlendRows.SHARED:
            self._found.notes.append("blend.rows is shared, but only private rows are measured here")
        if config.blend.ratio == AUTO:
            self._found.notes.append("blend.ratio is auto, but only fixed ratios are measured here")
        if Part.SPEED in options.parts:
            fitting = tokens_that_fit(engine.decoder)
            self._lengths, notes = choose_lengths(options.lengths, self._on_gpu, engine.max_context, fitting)
            self._found.notes += notes
        if not self._can_ask():
            why = "quality is measured over a store's chunks or MuSiQue's: `ragkit ingest SOURCE` makes a store"
            if options.parts == (Part.QUALITY,):
                raise UsageError(why)
            if Part.QUALITY in options.parts:
                self._found.notes.append(why)

    def run(self, progress: Progress) -> None:
        """Measure everything; what was measured when an exception comes stays in `report`."""
        watch = Watch(progress, self._options.time_limit_s)
        measures_quality = Part.QUALITY in self._options.parts and self._can_ask()
        is_done = False
        try:
            if self._lengths:
                self._measure_speed(watch.part(0.5 if measures_quality else 1.0))
            if measures_quality:
                self._measure_quality(watch)
            is_done = True
        finally:
            if not is_done:
                self._found.notes.append("stopped before the end: what is shown was done by then")

    def report(self) -> BlendReport:
        """Return what was measured so far."""
        found = self._found
        return BlendReport(
            model=self._model_facts(),
            settings=self._settings(),
            speed=found.speed,
            check=found.check,
            quality=recoveries(found.distances, PLAIN_REUSE.label),
            distances=found.distances,
            quality_from=found.material,
            quality_tokens=sum(found.prompt_tokens) / max(1, len(found.prompt_tokens)),
            notes=found.notes,
            seconds=time.perf_counter() - self._started,
        )

    # ------------------------------------------------------------------------------------------------ speed

    def _measure_speed(self, watch: Watch) -> None:
        prompts = [self._timed_prompt(length) for length in self._lengths]
        speed: BlendSpeed | None = None
        try:
            speed = self._blend_speed([prompt for prompt, _ in prompts])
            self._found.check = speed.check(prompts[0][0], watch)
            for number, (prompt, material) in enumerate(prompts):
                done = speed.measure(prompt, str(material), self._rounds, watch)
                if not done:
                    self._found.notes.append(f"the time limit left out rounds of the prompt of {len(prompt):,} tokens")
                if watch.is_over:
                    self._note_left_out([left for left, _ in prompts[number + 1 :]])
                    break
        except torch.OutOfMemoryError:
            self._found.notes.append("the GPU's memory ended before all lengths were timed; take smaller --lengths")
        finally:
            if speed is not None:
                self._found.speed = speed.rows()
                speed.close()

    def _blend_speed(self, prompts: Sequence[Prompt]) -> BlendSpeed:
        engine, config = self._engine, self._config
        return BlendSpeed(
            engine.decoder,
            engine.rotary,
            self._canonical,
            config.kv,
            config.blend,
            self._options.ratios or SPEED_RATIOS,
            prompts,
            with_pool=self._on_gpu,
            neighbours=self._neighbours(),
        )

    def _timed_prompt(self, tokens: int) -> tuple[Prompt, TimedText]:
        if self._collection is not None:
            prompt = collection_prompt(self._builder, self._collection.store, tokens)
            if prompt is not None:
                return prompt, TimedText.COLLECTION
            self._found.notes.append(
                f"the collection's chunks make no prompt of {tokens:,} tokens: it is of random ones"
            )
        self._note_lack_of_neighbours("random chunks")
        vocabulary, chunk_tokens = self._engine.decoder.config.vocab_size, self._config.chunking.max_tokens
        return random_prompt(self._builder, vocabulary, tokens, chunk_tokens), TimedText.RANDOM

    def _note_left_out(self, prompts: Sequence[Prompt]) -> None:
        if prompts:
            lengths = ", ".join(f"{len(prompt):,}" for prompt in prompts)
            self._found.notes.append(f"the time limit left out prompts of {lengths} tokens")

    # ------------------------------------------------------------------------------------------------ quality

    def _can_ask(self) -> bool:
        return self._collection is not None or (self._options.musique is not None and not self._options.questions)

    def _measure_quality(self, watch: Watch) -> None:
        prompts = self._scored_prompts()
        if not prompts:
            self._found.notes.append("quality was not measured: no question has two chunks that fit the model's window")
            return
        engine, config = self._engine, self._config
        blocks = -(-(max(len(one.prompt) for one in prompts) + ROOM_BEHIND) // BLOCK_SIZE)
        scorer = AnswerScorer(
            engine.decoder, engine.rotary, KVPool(engine.decoder.layout, blocks, engine.decoder.device)
        )
        context = ContextKind(config.kv.context)
        quality = BlendQuality(scorer, self._canonical, str(config.kv.codec), context, self._neighbours())
        variants = self._variants()
        watch.start(len(prompts) * (len(variants) + 1), f"prefills of {len(prompts)} prompts to compare")
        for number, one in enumerate(prompts):
            if number and watch.is_over:
                self._found.notes.append(f"the time limit left out {len(prompts) - number} of {len(prompts)} prompts")
                break
            distances = quality.score(one.prompt, variants, one.gold, watch.step)
            self._found.distances.append(distances)
            self._found.prompt_tokens.append(len(one.prompt))

    def _neighbours(self) -> Neighbours:
        """Return what knows the neighbours of the collection's chunks; random ones and MuSiQue's have none."""
        if self._collection is None:
            return lambda chunk_id: ()
        engine, tokens = self._engine, self._config.kv.neighbour_tokens
        return ChunkNeighbours(self._collection.store, engine.prompt_builder(), tokens, engine.max_context)

    def _note_lack_of_neighbours(self, what: str) -> None:
        note = f"{what} have no neighbours: their KV is computed behind the prefix alone"
        if self._config.kv.context is ChunkContextName.NEIGHBOURS and note not in self._found.notes:
            self._found.notes.append(note)

    def _variants(self) -> list[Variant]:
        names = self._options.selectors or (self._config.blend.selector,)
        num_layers = self._engine.decoder.config.num_layers
        made = [(str(name), make_selector(name, num_layers)) for name in names]
        ratios = self._options.ratios or QUALITY_RATIOS
        return [PLAIN_REUSE, *(Variant(name, selector, ratio) for name, selector in made for ratio in ratios)]

    def _scored_prompts(self) -> list[ScoredPrompt]:
        options, builder, tokenizer = self._options, self._builder, self._engine.tokenizer
        if options.musique is not None and not options.questions:
            self._found.material = ScoredText.MUSIQUE
            self._note_lack_of_neighbours("MuSiQue's passages")
            items = musique_items(options.musique)
            found = musique_prompts(items, builder, tokenizer, ROOM_BEHIND)
        else:
            assert self._collection is not None, "asked before"
            self._found.material = ScoredText.COLLECTION
            questions = [Question(text) for text in options.questions] or questions_from(
                self._collection.store, options.items
            )
            found = retrieved_prompts(questions, self._collection.retrieve, builder, tokenizer, ROOM_BEHIND)
        return list(itertools.islice(found, options.items))

    # ------------------------------------------------------------------------------------------------ facts

    def _model_facts(self) -> dict[str, Any]:
        decoder = self._engine.decoder
        return {
            "name": self._engine.model_name,
            "device": str(decoder.device),
            "dtype": str(decoder.dtype).removeprefix("torch."),
            "layers": decoder.config.num_layers,
            "window": self._engine.max_context,
            "kv_bytes_per_token": decoder.layout.bytes_per_token,
        }

    def _settings(self) -> dict[str, Any]:
        options, config = self._options, self._config
        return {
            "codec": str(config.kv.codec),
            "context": str(config.kv.context),
            "selector": str(config.blend.selector),
            "ratio": config.blend.ratio,
            "chunk_tokens": config.chunking.max_tokens,
            "k": config.retrieval.k,
            "lengths": list(self._lengths),
            "speed_ratios": list(options.ratios or SPEED_RATIOS),
            "quality_ratios": list(options.ratios or QUALITY_RATIOS),
            "selectors": [str(name) for name in options.selectors or (config.blend.selector,)],
            "rounds": self._rounds,
            "items": options.items,
        }
