"""Chunkers compared on question sets: every chunker under every cap, every question at equal retrieved characters.

Every ranking is cut at the same number of characters (its last chunk is cut to fit), so that longer chunks buy nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ragkit.bench.cached_embedder import CachedEmbedder
from ragkit.bench.cached_losses import CachedLosses
from ragkit.bench.chunking_rankings import Ranking, rank
from ragkit.bench.chunking_tables import (
    ChromaRow,
    ComparisonRow,
    FrontierPoint,
    Run,
    chroma_table,
    comparison,
    frontier,
)
from ragkit.bench.chunking_variants import VARIANTS, Build, ComparedModels
from ragkit.bench.question_sets import QuestionSet
from ragkit.chunking.perplexity import LossModel
from ragkit.config import ChunkingConfig
from ragkit.generation.engine import Engine
from ragkit.progress import Progress
from ragkit.retrieval.base import ChunkEmbedder
from ragkit.retrieval.chunk_vectors import SeparateChunks
from ragkit.types import TextTokenizer


@dataclass(frozen=True, slots=True)
class EvaluationTools:
    """What an evaluation works with.

    Attributes:
        tokenizer: counts the caps; `CharacterTokenizer` where their unit is characters.
        embedder: embeds questions, and the sentences of chunkers that ask for them.
        chunk_embedder: embeds chunks; None embeds each as a text of its own.
        load_engine: gives the language model, when a chunker asks for it.
        config: what all chunkers share besides name and cap.
        cache: folder that keeps the losses of texts from run to run, where a chunker asks for them.
    """

    tokenizer: TextTokenizer
    embedder: CachedEmbedder
    chunk_embedder: ChunkEmbedder | None
    load_engine: Callable[[], Engine]
    config: ChunkingConfig = field(default_factory=ChunkingConfig)
    cache: Path | None = None


@dataclass(frozen=True, slots=True)
class ChunkingReport:
    """What was measured; `chroma` and `points` (chunking_evaluation's frontier) are empty without that set."""

    rows: Sequence[ComparisonRow]
    chroma: Sequence[ChromaRow]
    points: Sequence[FrontierPoint]


class ChunkingEvaluation:
    """One comparison. `report` holds what is done, also after `run` was interrupted."""

    def __init__(
        self,
        sets: Sequence[QuestionSet],
        chunkers: Sequence[str],
        caps: Sequence[int],
        tools: EvaluationTools,
        variants: Mapping[str, Build] = VARIANTS,
    ) -> None:
        self._variants = variants
        self._sets = sets
        self._runs = [(name, cap) for name in chunkers for cap in caps]
        self._tools = tools
        self._models = _Models(tools)
        self._done: dict[str, dict[Run, Ranking]] = {data.name: {} for data in sets}

    def run(self, progress: Progress) -> None:
        """Measure everything, or go on until an exception ends it.

        Raises:
            ChunkingError: a chunker broke its contract or cannot cut a text.
            RetrievalError: the embedder gave a vector that is not finite.
        """
        progress.start(len(self._sets) * len(self._runs), 0, "runs")
        try:
            for data in self._sets:
                for run in self._runs:
                    self._done[data.name][run] = self._rank(data, run)
                    progress.advance(documents=1)
        finally:
            self._tools.embedder.save()
            self._models.losses.save()

    def report(self) -> ChunkingReport:
        """Return the tables of what is done."""
        rows: list[ComparisonRow] = []
        chroma: list[ChromaRow] = []
        points: list[FrontierPoint] = []
        for data in self._sets:
            runs = self._done[data.name]
            if not runs:
                continue
            rows += comparison(data, runs)
            points += frontier(data, runs)
            if data.name == "chunking_evaluation":
                chroma += chroma_table(data, runs)
        return ChunkingReport(rows, chroma, points)

    def _rank(self, data: QuestionSet, run: Run) -> Ranking:
        name, cap = run
        tools = self._tools
        config = replace(
            tools.config,
            chunker=name.partition(":")[0],
            max_tokens=cap,
            overlap_tokens=min(tools.config.overlap_tokens, cap - 1),
            length_target=min(tools.config.length_target, cap),
        )
        chunker = self._variants[name](config, tools.tokenizer, self._models)
        return rank(data, chunker, cap, tools.chunk_embedder or SeparateChunks(tools.embedder), tools.embedder)


class _Models(ComparedModels):
    """The models that chunkers ask for; sentences are embedded and texts foretold once for all of them."""

    def __init__(self, tools: EvaluationTools) -> None:
        self._tools = tools
        self._losses = CachedLosses(self._load_losses, self._model_id, tools.cache)

    @property
    def losses(self) -> CachedLosses:
        """The losses that are remembered."""
        return self._losses

    @property
    def embedder(self) -> CachedEmbedder:
        """The embedder that remembers."""
        return self._tools.embedder

    @property
    def engine(self) -> Engine:
        """The language model, loaded when first asked for."""
        return self._tools.load_engine()

    def _load_losses(self) -> LossModel:
        from ragkit.chunking.decoder_losses import DecoderLosses

        return DecoderLosses(self.engine.decoder)

    def _model_id(self) -> str:
        from ragkit.models.fingerprint import weights_fingerprint

        return weights_fingerprint(self.engine.folder)
