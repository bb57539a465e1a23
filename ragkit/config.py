"""Frozen settings, one class a part. `ragkit.settings` fills them from TOML, environment and flags.

Components receive their own part, never the whole. Impossible values raise `ConfigError` on construction.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from ragkit.batch_config import BatchConfig
from ragkit.draft_config import DraftConfig
from ragkit.errors import ConfigError
from ragkit.jobs_config import JobsConfig
from ragkit.setting_checks import AUTO, at_least, multiple, random_seed, share, share_or_auto, text
from ragkit.setting_names import (
    BatchOrder,
    BlendRows,
    ChunkContextName,
    ChunkPlacement,
    CodecName,
    Device,
    DraftMode,
    DraftWeights,
    EncoderBackend,
    FusionMethod,
    LengthPriorName,
    LoadingMode,
    PagePositions,
    PageSelectorName,
    PageVote,
    PolicyName,
    SearchMode,
    SelectorName,
    Strategy,
)

__all__ = [
    "AUTO",
    "AUTO_SELECTORS",
    "PAGE_CODECS",
    "AnswerConfig",
    "BatchConfig",
    "BatchOrder",
    "BlendConfig",
    "BlendRows",
    "ChunkContextName",
    "ChunkPlacement",
    "ChunkingConfig",
    "CodecName",
    "Device",
    "DraftConfig",
    "DraftMode",
    "DraftWeights",
    "EmbeddingConfig",
    "EncoderBackend",
    "FusionMethod",
    "GenerationConfig",
    "IngestConfig",
    "JobsConfig",
    "KVConfig",
    "LengthPriorName",
    "LoadingMode",
    "PagePositions",
    "PageSelectorName",
    "PageVote",
    "PagesConfig",
    "PipelineConfig",
    "PolicyName",
    "RetrievalConfig",
    "SearchMode",
    "SelectorName",
    "Strategy",
]

#: The codecs of pages: those whose pages can be read one by one.
PAGE_CODECS = (CodecName.FP32, CodecName.BF16, CodecName.FP16, CodecName.INT8, CodecName.INT4)
#: The selectors that can: they know how much of the question's attention a token receives.
AUTO_SELECTORS = (SelectorName.QUESTION, SelectorName.TWO_ROUNDS)


@dataclass(frozen=True, slots=True)
class ChunkingConfig:
    """How documents are cut. `max_tokens` is a hard cap in the generator's tokens.

    A `length_prior` makes every chunker weigh its boundaries against chunk lengths under the cap: it pulls towards
    `length_target` tokens, the harder the smaller the `length_spread` (tokens; of the logarithm for log-normal). 0
    takes two thirds of the cap, and a spread that fits the prior.

    With a `sentence_model`, the folder of a SaT model, sentences end where it gives more than `sentence_threshold`:
    0.25 is for models named `-sm`, 0.025 for the others; without one they are found by rule.
    """

    chunker: str = "recursive"
    max_tokens: int = 256
    overlap_tokens: int = 0
    length_prior: LengthPriorName = LengthPriorName.AUTO
    length_target: int = 0
    length_spread: float = 0.0
    sentence_model: str = ""
    sentence_threshold: float = 0.25

    def __post_init__(self) -> None:
        at_least("chunking.max_tokens", self.max_tokens, 1)
        at_least("chunking.overlap_tokens", self.overlap_tokens, 0)
        if self.overlap_tokens >= self.max_tokens:
            raise ConfigError(
                f"chunking.overlap_tokens must be below chunking.max_tokens = {self.max_tokens}, "
                f"got {self.overlap_tokens}"
            )
        if not 0 <= self.length_target <= self.max_tokens:
            raise ConfigError(
                f"chunking.length_target must be at most chunking.max_tokens = {self.max_tokens}, or 0 for two thirds "
                f"of it, got {self.length_target}"
            )
        if self.length_spread and not (math.isfinite(self.length_spread) and self.length_spread >= 0.01):
            raise ConfigError(f"chunking.length_spread must be 0 or a number from 0.01, got {self.length_spread}")
        if not 0 < self.sentence_threshold < 1:
            raise ConfigError(f"chunking.sentence_threshold must lie between 0 and 1, got {self.sentence_threshold}")


@dataclass(frozen=True, slots=True)
class EmbeddingConfig:
    """Which embedder, and how it runs. `batch_tokens` bounds the padded tokens of one forward.

    With `late_chunking` the encoder reads whole documents, and a chunk's vector is the mean of its tokens there; a long
    document is read in windows, each of which repeats `window_overlap` of the one before.
    """

    model: str = "all-minilm-l6-v2"
    backend: EncoderBackend = EncoderBackend.AUTO
    batch_tokens: int = 8192
    late_chunking: bool = False
    window_overlap: float = 0.5

    def __post_init__(self) -> None:
        at_least("embedding.batch_tokens", self.batch_tokens, 1)
        if not 0 <= self.window_overlap <= 0.5:
            raise ConfigError(f"embedding.window_overlap must lie in [0, 0.5], got {self.window_overlap!r}")


@dataclass(frozen=True, slots=True)
class RetrievalConfig:
    """How chunks are found.

    The defaults are what benchmarks/retrieval_quality.py supports. `candidates` is how many hits each leg contributes,
    `dense_weight` the dense leg's say in the fusion, from 0 to 1, and `rrf_k` the constant of reciprocal rank fusion.
    BM25 leaves out words that over `common_share` of all chunks hold. Search is exact up to `flat_limit` chunks.
    """

    mode: SearchMode = SearchMode.HYBRID
    k: int = 8
    candidates: int = 100
    fusion: FusionMethod = FusionMethod.SCORES
    dense_weight: float = 0.5
    rrf_k: int = 60
    common_share: float = 0.1
    flat_limit: int = 100_000

    def __post_init__(self) -> None:
        at_least("retrieval.k", self.k, 1)
        at_least("retrieval.candidates", self.candidates, 1)
        at_least("retrieval.rrf_k", self.rrf_k, 0)
        at_least("retrieval.flat_limit", self.flat_limit, 0)
        share("retrieval.dense_weight", self.dense_weight)
        share("retrieval.common_share", self.common_share)


@dataclass(frozen=True, slots=True)
class GenerationConfig:
    """Which generator, and how it decodes. `temperature` 0 is greedy; `context_tokens` 0 is the model's window."""

    model: str = "smollm2-135m-instruct"
    dtype: str = "auto"
    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    context_tokens: int = 0
    system_prompt: str = ""
    strategy: Strategy = Strategy.AUTO

    def __post_init__(self) -> None:
        at_least("generation.max_new_tokens", self.max_new_tokens, 1)
        at_least("generation.context_tokens", self.context_tokens, 0)
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ConfigError(f"generation.temperature must be a finite number >= 0, got {self.temperature}")
        if not (math.isfinite(self.top_p) and 0 < self.top_p <= 1):
            raise ConfigError(f"generation.top_p must lie in (0, 1], got {self.top_p}")
        random_seed("generation.seed", self.seed)
        text("generation.system_prompt", self.system_prompt)


@dataclass(frozen=True, slots=True)
class KVConfig:
    """Where the KV of chunks is kept, and how.

    `gpu_mb`, `memory_mb`, `disk_mb` and `remote_mb` bound the tiers; on a GPU chunks take at most `gpu_mb` of the KV
    pool, and leave when requests need it; with a `disk_mb` of 0 the store keeps no KV. `remote` is an fsspec URL, or
    empty. KV of another codec or context is never mistaken for what is configured now: it is a miss. With a `loading`
    of `auto`, measured rates decide which chunks are loaded from disk or remote and which are computed beside that;
    `always` loads whatever is stored.

    With a `context` of `neighbours` a chunk's KV is computed behind the chunks before it in its document: whole ones,
    the nearest first, as long as they have at most `neighbour_tokens` tokens together; the nearest in any case.
    """

    codec: CodecName = CodecName.BF16
    context: ChunkContextName = ChunkContextName.PREFIX
    neighbour_tokens: int = 256
    gpu_mb: int = 8192
    memory_mb: int = 2048
    disk_mb: int = 8192
    remote: str = ""
    remote_mb: int = 65536
    policy: PolicyName = PolicyName.COST
    loading: LoadingMode = LoadingMode.AUTO

    def __post_init__(self) -> None:
        at_least("kv.neighbour_tokens", self.neighbour_tokens, 1)
        at_least("kv.gpu_mb", self.gpu_mb, 0)
        at_least("kv.memory_mb", self.memory_mb, 0)
        at_least("kv.disk_mb", self.disk_mb, 0)
        at_least("kv.remote_mb", self.remote_mb, 0)


@dataclass(frozen=True, slots=True)
class BlendConfig:
    """How reused chunks are blended. `auto` blends where the prompt holds at least `min_tokens` tokens of chunks.

    Below, full prefill is quick as well, and the bundled model's answers are sometimes lost at the default ratio.

    `ratio` is the part of the chunks' tokens that is recomputed. With `auto` every request finds its own: tokens are
    taken until they receive `auto_coverage` of the question's attention to chunks that are not exact already, so that
    the rest of it, which falls on reused KV, is the error that is put up with; never less than `auto_least` nor more
    than `auto_most` of the tokens.

    With `rows` `private` a request copies its chunks' rows; with `shared` it lists the chunks where they lie in the KV
    pool, a tier of `kv.gpu_mb` that is then there on a CPU as well, keeps what it recomputes beside them, and moves
    the other rows by a coarse field: many requests over the same chunks take little more memory than one.
    """

    ratio: float | Literal["auto"] = 0.15
    selector: SelectorName = SelectorName.QUESTION
    min_tokens: int = 2048
    auto_coverage: float = 0.7
    auto_least: float = 0.05
    auto_most: float = 0.3
    rows: BlendRows = BlendRows.PRIVATE

    def __post_init__(self) -> None:
        share_or_auto("blend.ratio", self.ratio)
        if self.ratio == AUTO and self.selector not in AUTO_SELECTORS:
            raise ConfigError(
                f"blend.ratio can be auto where blend.selector asks what the question looks at "
                f"({' or '.join(AUTO_SELECTORS)}), got {str(self.selector)!r}: take one of these, or a number"
            )
        at_least("blend.min_tokens", self.min_tokens, 0)
        share("blend.auto_coverage", self.auto_coverage)
        share("blend.auto_most", self.auto_most)
        if not 0 <= self.auto_least <= self.auto_most:
            raise ConfigError(
                f"blend.auto_least must lie in [0, blend.auto_most = {self.auto_most!r}], got {self.auto_least!r}"
            )


@dataclass(frozen=True, slots=True)
class PagesConfig:
    """How a document is read that is longer than the model's window, and what of it a question attends to.

    Its KV is kept in pages of `page_tokens`, stored by `codec`. Everything is read in windows of `window_tokens`, which
    attend to the first `sink_tokens`, to the pages that `reading_selector` finds, `budget_tokens` in all, and to the
    `local_tokens` before. It finds `reading_found_times` as many, of which those stay whose keys would be attended to
    most. Questions and answers do so by `selector` and `found_times`; an answer chooses again every `interval` tokens
    and in every `layer_interval`-th layer, and the layers between share its choice. With `per_key_head` each key head
    has pages of its own. A choice is also kept where the queries have a cosine of `keep_similarity` with those that
    made it; 1 never keeps one.

    `memory_mb` of the encoded pages stay in memory, the others on disk within `kv.disk_mb`. A GPU holds all pages of a
    document that take at most `gpu_mb`; else, and on a CPU, `cache_mb` of them stay decoded there. `keep_received` also
    stores the attention that rows received, for selectors that look at it.
    """

    page_tokens: int = 64
    codec: CodecName = CodecName.INT8
    selector: PageSelectorName = PageSelectorName.LOW_RANK
    reading_selector: PageSelectorName = PageSelectorName.MIN_MAX
    vote: PageVote = PageVote.SOFTMAX
    per_key_head: bool = False
    positions: PagePositions = PagePositions.REINDEXED
    sink_tokens: int = 128
    budget_tokens: int = 2048
    found_times: int = 3
    reading_found_times: int = 3
    local_tokens: int = 1024
    window_tokens: int = 512
    interval: int = 8
    layer_interval: int = 1
    keep_similarity: float = 1.0
    keep_received: bool = False
    gpu_mb: int = 49152
    cache_mb: int = 1024
    memory_mb: int = 4096

    def __post_init__(self) -> None:
        at_least("pages.page_tokens", self.page_tokens, 8)
        if self.page_tokens & (self.page_tokens - 1):
            raise ConfigError(f"pages.page_tokens must be a power of two, got {self.page_tokens}")
        for name in ("sink_tokens", "budget_tokens"):
            multiple(f"pages.{name}", getattr(self, name), "pages.page_tokens", self.page_tokens)
        for name in ("local_tokens", "window_tokens"):
            multiple(f"pages.{name}", getattr(self, name), "pages.page_tokens", self.page_tokens, least=1)
        at_least("pages.found_times", self.found_times, 1)
        at_least("pages.reading_found_times", self.reading_found_times, 1)
        at_least("pages.interval", self.interval, 1)
        at_least("pages.layer_interval", self.layer_interval, 1)
        share("pages.keep_similarity", self.keep_similarity)
        at_least("pages.gpu_mb", self.gpu_mb, 0)
        at_least("pages.cache_mb", self.cache_mb, 1)
        at_least("pages.memory_mb", self.memory_mb, 1)
        if self.codec not in PAGE_CODECS:
            raise ConfigError(f"pages.codec must be one of {', '.join(PAGE_CODECS)}, got {str(self.codec)!r}")


@dataclass(frozen=True, slots=True)
class AnswerConfig:
    """How answers are cited and refused. The defaults were chosen on data (docs/benchmarks.md).

    Sentences are cited until one of them holds the answer with probability `citation_mass`; a question whose
    confidence is below `found_threshold` is refused.
    """

    max_citations: int = 5
    max_quote_chars: int = 300
    citation_mass: float = 0.9
    found_threshold: float = 0.15

    def __post_init__(self) -> None:
        at_least("answers.max_citations", self.max_citations, 1)
        at_least("answers.max_quote_chars", self.max_quote_chars, 20)
        share("answers.citation_mass", self.citation_mass)
        share("answers.found_threshold", self.found_threshold)


@dataclass(frozen=True, slots=True)
class IngestConfig:
    """Which sources are read, and the limits that a parser runs under. `kv` computes the KV of all chunks as well."""

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    kv: bool = False
    parse_timeout_s: float = 120.0
    parse_memory_mb: int = 2048
    commit_mb: int = 64
    lock_timeout_s: float = 10.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.parse_timeout_s) and self.parse_timeout_s > 0):
            raise ConfigError(f"ingest.parse_timeout_s must be a finite number > 0, got {self.parse_timeout_s}")
        at_least("ingest.parse_memory_mb", self.parse_memory_mb, 64)
        at_least("ingest.commit_mb", self.commit_mb, 1)
        if not self.lock_timeout_s >= 0:
            raise ConfigError(f"ingest.lock_timeout_s must be >= 0, got {self.lock_timeout_s}")


@dataclass(frozen=True, slots=True)
class PipelineConfig:
    """Everything a `Pipeline` can be told."""

    device: Device = Device.AUTO
    offline: bool = False
    chunking: ChunkingConfig = field(default_factory=ChunkingConfig)
    embedding: EmbeddingConfig = field(default_factory=EmbeddingConfig)
    retrieval: RetrievalConfig = field(default_factory=RetrievalConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    kv: KVConfig = field(default_factory=KVConfig)
    blend: BlendConfig = field(default_factory=BlendConfig)
    pages: PagesConfig = field(default_factory=PagesConfig)
    draft: DraftConfig = field(default_factory=DraftConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    answers: AnswerConfig = field(default_factory=AnswerConfig)
    ingest: IngestConfig = field(default_factory=IngestConfig)
    jobs: JobsConfig = field(default_factory=JobsConfig)
