"""The plain data that every part of ragkit exchanges.

Nothing here imports torch, numpy or any other heavy package: `import ragkit` stays cheap. Spans are half-open
and count Unicode code points of a document's text. Scores are higher-is-better everywhere.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor

MetadataValue = str | int | float | bool | None
Metadata = Mapping[str, MetadataValue]


@dataclass(frozen=True, slots=True)
class PageSpan:
    """One page of a paginated source: `document.text[char_start:char_stop]` is what stands on page `number`."""

    number: int
    char_start: int
    char_stop: int


@dataclass(frozen=True, slots=True)
class Document:
    """A text with a stable identity.

    Attributes:
        doc_id: hex digest of the text and its page spans (`document_id`), so equal content has equal identity.
        uri: where it came from: a path or URL, with `#row=N` for one row of a table of documents.
        text: the decoded content. For a UTF-8 text file this is the file's content unchanged.
        pages: page spans in ascending order; empty for sources without pages.
        metadata: flat values that filters can use (`title`, `author`, columns of a table, ...).
    """

    doc_id: str
    uri: str
    text: str
    pages: tuple[PageSpan, ...] = ()
    metadata: Metadata = field(default_factory=dict)

    @classmethod
    def from_text(
        cls, text: str, uri: str = "memory:", pages: Sequence[PageSpan] = (), metadata: Metadata | None = None
    ) -> Document:
        """Return a document whose `doc_id` is computed from `text` and `pages`."""
        return cls(document_id(text, pages), uri, text, tuple(pages), dict(metadata or {}))

    def page_at(self, char: int) -> int | None:
        """Return the number of the page that holds code point `char`, or None where the source has no pages."""
        return page_of(self.pages, char)


@dataclass(frozen=True, slots=True)
class Chunk:
    """A stretch of one document: always `text == document.text[char_start:char_stop]`.

    Attributes:
        chunk_id: `chunk_id_of(doc_id, char_start, char_stop)`.
        doc_id: the document it was cut from.
        index: 0-based place among the chunks of its document.
        text: the exact text.
        char_start, char_stop: half-open span in the document's text.
        token_count: the generator's tokens of `text` alone, without special tokens.
        page: page of the first code point, or None where the source has no pages.
        metadata: what its place says of it: `heading_path` ("Guide > Install") below headings, `table_header`
            ("name | size") for rows of a table whose header lies in an earlier chunk.
    """

    chunk_id: str
    doc_id: str
    index: int
    text: str
    char_start: int
    char_stop: int
    token_count: int
    page: int | None = None
    metadata: Metadata = field(default_factory=dict, hash=False)


@dataclass(frozen=True, slots=True)
class SearchHit:
    """One retrieved chunk; `score` is higher-is-better for every metric, `rank` starts at 1."""

    chunk_id: str
    score: float
    rank: int


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of token ids of a prompt; `chunk_id` names the chunk it came from, None for template and question."""

    token_ids: tuple[int, ...]
    chunk_id: str | None = None


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt as segments that were tokenised apart and are joined as ids.

    The same chunk has the same ids wherever it stands, which is what makes its KV cache reusable.
    """

    segments: tuple[Segment, ...]

    @property
    def token_ids(self) -> tuple[int, ...]:
        """All token ids in order."""
        return tuple(token for segment in self.segments for token in segment.token_ids)

    def __len__(self) -> int:
        return sum(len(segment.token_ids) for segment in self.segments)


@dataclass(frozen=True, slots=True)
class Citation:
    """A sentence-level span that supports an answer: `document.text[char_start:char_stop] == quote`."""

    doc_id: str
    uri: str
    page: int | None
    char_start: int
    char_stop: int
    quote: str
    score: float


@dataclass(frozen=True, slots=True)
class TokenUsage:
    """Tokens of one request: `prompt = reused + recomputed`, and what was generated."""

    prompt: int = 0
    reused: int = 0
    recomputed: int = 0
    generated: int = 0


@dataclass(frozen=True, slots=True)
class KVUse:
    """Where the KV of a request's chunks came from.

    Attributes:
        hits, misses: chunks found in some tier, and chunks that had to be computed.
        holes: misses among hits: chunks that were missing before the last one that was found.
        bytes_by_tier: bytes taken from each tier.
        recomputed: chunks that a tier had, and that were computed because that was sooner than loading them.
    """

    hits: int = 0
    misses: int = 0
    holes: int = 0
    bytes_by_tier: Mapping[str, int] = field(default_factory=dict)
    recomputed: int = 0

    def __add__(self, other: KVUse) -> KVUse:
        """Return what both used together."""
        tiers = dict.fromkeys((*self.bytes_by_tier, *other.bytes_by_tier))
        return KVUse(
            self.hits + other.hits,
            self.misses + other.misses,
            self.holes + other.holes,
            {tier: self.bytes_by_tier.get(tier, 0) + other.bytes_by_tier.get(tier, 0) for tier in tiers},
            self.recomputed + other.recomputed,
        )


@dataclass(frozen=True, slots=True)
class DraftUse:
    """What drafting did for one answer.

    Attributes:
        mode: none where no drafter was named; exact: the answer is what the model alone gives, or has its distribution;
            transfer: the model was moved towards the drafter, and so was the answer, wherever a token was drafted.
        drafter: what proposed tokens: self, lookup or a model's name.
        drafted, accepted: tokens that were proposed and verified, and how many of them stood.
        steps: passes of the model after the prompt's; each brings the tokens that stood, and one more.
        ms_per_step: mean milliseconds of such a pass, drafting included.
    """

    mode: str = "none"
    drafter: str = ""
    drafted: int = 0
    accepted: int = 0
    steps: int = 0
    ms_per_step: float = 0.0


@dataclass(frozen=True, slots=True)
class AttendedSpan:
    """A stretch of a document that an answer attended to because it was found among all others.

    Attributes:
        token_start, token_stop: positions in the document's tokens.
        char_start, char_stop: the same in its text.
        share: how much of all choices of layers and steps took it, from 0 to 1.
    """

    token_start: int
    token_stop: int
    char_start: int
    char_stop: int
    share: float


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to one question, with what it rests on and what it cost.

    Attributes:
        text: the generated answer; a refusal sentence where `found` is False.
        found: False when nothing retrieved supports an answer.
        citations: supporting spans, best first, at most five.
        strategy: the prefill strategy that ran: full, blend or pages.
        model: name of the generator.
        tokens: token counts.
        timings_ms: load_models, retrieve, load_kv, prefill, first_token, total; where chunks were blended, also what
            prefill consists of besides `load_kv`: compute_kv, select, blend.
        dropped_chunks: chunk ids that did not fit the context budget, best first.
        warnings: one line each; every fallback shows up here.
        kv: where the KV of the chunks came from.
        attended: where a document was answered from its pages, those of them that were found, most often first.
        draft: what drafting did.
    """

    text: str
    found: bool
    citations: tuple[Citation, ...]
    strategy: str
    model: str
    tokens: TokenUsage
    timings_ms: Mapping[str, float]
    dropped_chunks: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    kv: KVUse = field(default_factory=KVUse)
    attended: tuple[AttendedSpan, ...] = ()
    draft: DraftUse = field(default_factory=DraftUse)


@runtime_checkable
class TextTokenizer(Protocol):
    """What chunking and prompts need from a generator's tokenizer. No method adds special tokens."""

    @property
    def tokenizer_id(self) -> str:
        """Hex digest of everything that changes the ids."""
        ...

    def encode(self, text: str) -> list[int]:
        """Return the token ids of `text`."""
        ...

    def count_batch(self, texts: Sequence[str]) -> list[int]:
        """Return the number of tokens of each text."""
        ...

    def offsets(self, text: str) -> list[tuple[int, int]]:
        """Return the half-open code point span of each token of `text`."""
        ...

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of `token_ids`, special tokens left out."""
        ...


class CausalOutput(NamedTuple):
    """What a `CausalModel` returns for a run of tokens.

    Attributes:
        logits: (vocab_size,) after the last token.
        kv: keys (before RoPE) and values (tokens, kv_heads, head_dim) of these tokens, one pair a layer.
    """

    logits: Tensor
    kv: tuple[tuple[Tensor, Tensor], ...]


class CausalModel(Protocol):
    """A language model as chunkers and selectors need it: losses of tokens, and their KV outside any pool."""

    @property
    def max_context(self) -> int:
        """Most tokens that one pass may span, `past` included."""
        ...

    @property
    def tokenizer(self) -> TextTokenizer:
        """The model's tokenizer."""
        ...

    def forward(self, token_ids: Sequence[int], past: Sequence[tuple[Tensor, Tensor]] = ()) -> CausalOutput:
        """Return logits and KV of `token_ids`, at the positions behind `past`.

        Args:
            token_ids: at least one.
            past: keys (before RoPE) and values of earlier tokens, one pair a layer, as a `CausalOutput` holds them.
        """
        ...

    def token_losses(self, token_ids: Sequence[int], past: Sequence[tuple[Tensor, Tensor]] = ()) -> Tensor:
        """Return (tokens - 1,) fp32 nats of each token given all before it; the first has no loss."""
        ...


def document_id(text: str, pages: Sequence[PageSpan] = ()) -> str:
    """Return the 32 hex digits that identify a text with its page spans."""
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass"))
    if pages:
        spans = [(page.number, page.char_start, page.char_stop) for page in pages]
        digest.update(b"\0" + json.dumps(spans).encode())
    return digest.hexdigest()[:32]


def chunk_id_of(doc_id: str, char_start: int, char_stop: int) -> str:
    """Return the 32 hex digits that identify one span of one document."""
    return hashlib.sha256(f"{doc_id}:{char_start}:{char_stop}".encode()).hexdigest()[:32]


def page_of(pages: Sequence[PageSpan], char: int) -> int | None:
    """Return the number of the last page that starts at or before `char`, or None without pages."""
    low, high = 0, len(pages)
    while low < high:
        middle = (low + high) // 2
        if pages[middle].char_start <= char:
            low = middle + 1
        else:
            high = middle
    return pages[low - 1].number if low else (pages[0].number if pages else None)
