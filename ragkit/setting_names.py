"""The names that settings take: one enum for each setting that chooses among a few."""

from __future__ import annotations

from enum import StrEnum


class Device(StrEnum):
    """Where models run; `auto` takes CUDA when it is there."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


class SearchMode(StrEnum):
    """Which legs a search uses."""

    HYBRID = "hybrid"
    DENSE = "dense"
    BM25 = "bm25"


class FusionMethod(StrEnum):
    """How the legs' lists become one: by their scores, each over its leg's best, or by reciprocal ranks."""

    SCORES = "scores"
    RRF = "rrf"


class Strategy(StrEnum):
    """How a prompt is prefilled. `auto` takes the fastest that keeps the answer."""

    AUTO = "auto"
    FULL = "full"
    BLEND = "blend"
    PAGES = "pages"


class DraftWeights(StrEnum):
    """Which weights `self` drafts with: the generator's own, or a copy of 4 bits."""

    SAME = "same"
    INT4 = "int4"


class LengthPriorName(StrEnum):
    """How welcome the lengths under the cap are; `auto` leaves it to the chunker."""

    AUTO = "auto"
    UNIFORM = "uniform"
    GAUSSIAN = "gaussian"
    LOG_NORMAL = "log-normal"
    POLYNOMIAL = "polynomial"


class EncoderBackend(StrEnum):
    """How embeddings are computed; `auto` takes the thin encoder where the folder is of BERT type."""

    AUTO = "auto"
    ENCODER = "encoder"
    SENTENCE_TRANSFORMERS = "sentence-transformers"


class CodecName(StrEnum):
    """How chunk KV is stored; the number behind `entropy` is its level, 1 the finest.

    `int4+bf16` and `int4+int8` keep a 4-bit copy beside: a GPU loads it first and chooses tokens by it while the rest
    is still on its way.
    """

    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"
    INT8 = "int8"
    INT4 = "int4"
    INT4_BF16 = "int4+bf16"
    INT4_INT8 = "int4+int8"
    ENTROPY1 = "entropy1"
    ENTROPY2 = "entropy2"
    ENTROPY3 = "entropy3"


class PolicyName(StrEnum):
    """Which chunk leaves a full tier first."""

    COST = "cost"
    GDSF = "gdsf"
    LFU = "lfu"
    LRU = "lru"


class LoadingMode(StrEnum):
    """Whether chunk KV that is stored is computed anew where that is sooner than loading it."""

    AUTO = "auto"
    ALWAYS = "always"


class ChunkContextName(StrEnum):
    """What a chunk's KV is computed behind.

    Nothing, the model's canonical prompt prefix, or that prefix and the chunks before it in its document.
    """

    ISOLATED = "isolated"
    PREFIX = "prefix"
    NEIGHBOURS = "neighbours"


class SelectorName(StrEnum):
    """How the tokens of reused chunks that are recomputed are chosen."""

    EVERYTHING = "everything"
    NONE = "none"
    RANDOM = "random"
    FIRST = "first"
    KEY_DEVIATION = "k-deviation"
    VALUE_DEVIATION = "v-deviation"
    KV_DEVIATION = "kv-deviation"
    GRADUAL = "gradual"
    CACHE_CRAFT = "cache-craft"
    QUESTION = "question"
    TWO_ROUNDS = "two-rounds"


class PageSelectorName(StrEnum):
    """How the pages of a long document that are attended to are chosen."""

    EVERYTHING = "everything"
    WINDOW = "window"
    MEAN_KEY = "mean-key"
    REPRESENTATIVE = "representative"
    MIN_MAX = "min-max"
    LOW_RANK = "low-rank"
    SOFT_VOTE = "soft-vote"
    CENTROIDS = "centroids"
    CENTROIDS_2 = "centroids-2"


class PageVote(StrEnum):
    """How query heads come to share one choice of pages.

    `softmax`: every head of every query gives its weight of 1 to the pages by a softmax, and the weights are added, so
    that heads whose logits are large do not outvote others; `sum`: the logits are added; `max`: the highest counts.
    """

    SOFTMAX = "softmax"
    SUM = "sum"
    MAX = "max"


class PagePositions(StrEnum):
    """Where chosen pages stand for the model.

    `reindexed`: behind the sinks and before the local window, without gaps and in their order; `clamped`: all at one
    place before the local window; `true`: where they stand in the document, which must fit into the window then.
    """

    REINDEXED = "reindexed"
    CLAMPED = "clamped"
    TRUE = "true"


class BlendRows(StrEnum):
    """Whether a blended request copies the rows of its chunks, or lists the blocks that they lie in for all."""

    PRIVATE = "private"
    SHARED = "shared"


class BatchOrder(StrEnum):
    """In which order the requests of a batch start: those with a common beginning together, or as they come."""

    REUSE = "reuse"
    GIVEN = "given"


class ChunkPlacement(StrEnum):
    """Where the chunks of a prompt stand in a batch: by relevance, or common ones first so that more can be shared."""

    RELEVANCE = "relevance"
    FREE = "free"


class DraftMode(StrEnum):
    """What drafting may do to an answer.

    `exact`: nothing, every token has the chances that the model alone gives it; `transfer`: where a token was drafted,
    the model's logits are moved towards the drafter's, so that answers differ from the model's own.
    """

    EXACT = "exact"
    TRANSFER = "transfer"
