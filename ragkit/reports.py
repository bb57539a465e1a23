"""What the pipeline's calls return, apart from answers: plain data with the keys of the command line's JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ragkit.types import Metadata


@dataclass(frozen=True, slots=True)
class FailedSource:
    """A source that could not be ingested: where it is, what it was doing, a stable code and one line."""

    uri: str
    stage: str
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class PageIngestReport:
    """What was read into pages: documents to their end, those there already, and the tokens and bytes of this run."""

    read: int
    present: int
    tokens: int
    bytes: int


@dataclass(frozen=True, slots=True)
class KVIngestReport:
    """What computing the KV of all chunks did: chunks computed and written, chunks that had it, bytes written.

    `shared` chunks had none and have the text of another such chunk, whose KV is theirs. `left_out` chunks found no
    room.
    """

    computed: int = 0
    present: int = 0
    bytes: int = 0
    shared: int = 0
    left_out: int = 0


@dataclass(frozen=True, slots=True)
class KVStatus:
    """How much chunk KV is stored.

    Attributes:
        chunks: chunks whose KV on disk the present settings use (model and its type, codec, context); chunks of equal
            text share one.
        bytes_by_tier: bytes of each tier that outlives a process.
        codec: how KV is stored now.
        estimated_bytes: what the KV of all chunks takes in that codec; None where the generator is not here.
        page_bytes: what of the disk's bytes are pages of documents, and what selectors keep of them.
        other_bytes: what of the disk's bytes is KV of chunks that the present settings do not use: of another model,
            type, codec or context, or damaged.
        unknown_bytes: what of the disk's bytes is KV of chunks that nothing can be said of, because the generator is
            not at hand; `chunks` and `other_bytes` are 0 then.
    """

    chunks: int
    bytes_by_tier: Mapping[str, int]
    codec: str
    estimated_bytes: int | None
    page_bytes: int = 0
    other_bytes: int = 0
    unknown_bytes: int = 0


@dataclass(frozen=True, slots=True)
class IngestReport:
    """What one ingest did. Counts are sources (files), except `chunks` and `tokens`, which are newly written.

    `relinked` sources were renamed: linked again without reading. `skipped` files stood in a given folder and are of no
    readable kind (pictures, say), which is no failure; a file that was named itself is one. `interrupted` is True when
    a stop was asked for; everything counted is committed, and the same command goes on with the rest. `kv` is None
    where no KV was asked for, and `pages` where no pages were.
    """

    added: int = 0
    updated: int = 0
    unchanged: int = 0
    relinked: int = 0
    removed: int = 0
    skipped: int = 0
    failed: tuple[FailedSource, ...] = ()
    chunks: int = 0
    tokens: int = 0
    seconds: float = 0.0
    dry_run: bool = False
    interrupted: bool = False
    warnings: tuple[str, ...] = ()
    timings_s: Mapping[str, float] = field(default_factory=dict)
    kv: KVIngestReport | None = None
    pages: PageIngestReport | None = None


@dataclass(frozen=True, slots=True)
class ExportReport:
    """What an export wrote: where, `chunks` or `documents`, how many, bytes, and the store's generation."""

    target: str
    kind: str
    rows: int
    bytes: int
    generation: int


@dataclass(frozen=True, slots=True)
class Hit:
    """One search result with its text and place; `metadata` holds the chunk's `heading_path` and `table_header`."""

    rank: int
    score: float
    uri: str
    page: int | None
    char_start: int
    char_stop: int
    text: str
    chunk_id: str
    metadata: Metadata = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SearchResult:
    """Ranked hits and what each step took."""

    hits: tuple[Hit, ...]
    timings_ms: Mapping[str, float]
    warnings: tuple[str, ...] = ()


def too_long_warnings(count: int) -> tuple[str, ...]:
    """Return what is to be said of `count` chunks that no prompt has room for, if there are any."""
    if not count:
        return ()
    return (
        f"the KV of {count:,} chunks was left out, because they are too long for any prompt in the model's window: "
        "ingest with a smaller --max-tokens",
    )
