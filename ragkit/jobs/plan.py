"""What an ingest has to do: every source compared with the store by content, before anything is read or written."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from ragkit.chunking.base import Chunker
from ragkit.errors import ReadError
from ragkit.readers import MediaType, Source, content_sha256
from ragkit.readers.file_systems import is_url
from ragkit.readers.registry import READERS, load_reader
from ragkit.store.base import SourceRecord, SourceStatus, StoreReader


class Action(StrEnum):
    """What becomes of one source."""

    ADD = "add"
    UPDATE = "update"
    UNCHANGED = "unchanged"
    RELINK = "relink"
    KNOWN_FAILURE = "known failure"


@dataclass(frozen=True, slots=True)
class PlannedSource:
    """One source and its action; `record` is what the store knows, for a relink under the old URI.

    `content_sha256` is empty where the source could not be read for hashing: the reader will say why. So it is where
    the content lies elsewhere and may have changed; what it is shows when it is read.
    """

    source: Source
    action: Action
    content_sha256: str
    record: SourceRecord | None = None


@dataclass(frozen=True, slots=True)
class IngestPlan:
    """Every source with its action, and the URIs that `--prune` removes."""

    items: tuple[PlannedSource, ...]
    removed: tuple[str, ...]

    def of(self, *actions: Action) -> list[PlannedSource]:
        """Return the items with one of these actions, in order."""
        return [item for item in self.items if item.action in actions]


class Recipes:
    """Digests of what turns content into chunks; a source whose recipe has changed is read again.

    A recipe is the chunker's half followed by the reader's half, so that a new version of one reader touches only
    its own sources, and of those only the documents whose text really changes.
    """

    def __init__(self, chunker: Chunker) -> None:
        self._chunker = hashlib.sha256(chunker.fingerprint.encode()).hexdigest()[:16]
        versions = {media_type: _reader_version(media_type) for media_type in READERS}
        self._readers = {str(media_type): version for media_type, version in versions.items()}
        # What could not be read may be readable once any reader has changed.
        self._any_reader = hashlib.sha256("\0".join(versions.values()).encode()).hexdigest()[:16]

    def of(self, media_type: str) -> str:
        """Return the recipe of sources of `media_type`; of unreadable ones for the empty string."""
        return self._chunker + self._readers.get(media_type, self._any_reader)

    def same_chunks(self, recipe: str | None) -> bool:
        """Return whether a document stored under `recipe` has the chunks that it would get now."""
        return recipe is not None and recipe.startswith(self._chunker)


def _reader_version(media_type: MediaType) -> str:
    reader = load_reader(media_type)
    return hashlib.sha256(f"{reader.name}\0{reader.version}".encode()).hexdigest()[:16]


def plan_ingest(
    store: StoreReader | None,
    sources: Iterable[Source],
    recipes: Recipes,
    *,
    retry_failed: bool = False,
    prune_roots: Sequence[str | Path] = (),
) -> IngestPlan:
    """Return what to do with `sources`.

    A known content under a new URI whose old file is gone is a rename. Sources of the store below `prune_roots` that
    were not discovered are removed; without roots nothing is.
    """
    known = {record.uri: record for record in store.sources()} if store else {}
    found = list(sources)
    discovered = {source.uri for source in found}
    items: list[PlannedSource] = []
    renamed: set[str] = set()
    for source in found:
        item = _plan_one(source, known.get(source.uri), recipes, retry_failed)
        if item.action is Action.ADD and store and item.content_sha256:
            old = _renamed_from(store, item.content_sha256, recipes, discovered | renamed)
            if old is not None:
                renamed.add(old.uri)
                item = PlannedSource(source, Action.RELINK, item.content_sha256, old)
        items.append(item)
    roots = [root if is_url(str(root)) else Path(root).resolve() for root in prune_roots]
    gone = (uri for uri in known if uri not in discovered and uri not in renamed)
    removed = tuple(uri for uri in gone if any(_is_below(uri, root) for root in roots))
    return IngestPlan(tuple(items), removed)


def _plan_one(source: Source, record: SourceRecord | None, recipes: Recipes, retry_failed: bool) -> PlannedSource:
    digest = _digest(source)
    if record is None:
        return PlannedSource(source, Action.ADD, digest)
    same = _same_content(source, digest, record) and record.recipe == recipes.of(record.media_type)
    if same and record.status is SourceStatus.OK:
        return PlannedSource(source, Action.UNCHANGED, digest, record)
    if same and record.status is SourceStatus.FAILED and not retry_failed:
        return PlannedSource(source, Action.KNOWN_FAILURE, digest, record)
    action = Action.UPDATE if record.indexed_sha256 else Action.ADD
    return PlannedSource(source, action, digest, record)


def _digest(source: Source) -> str:
    if source.origin is not None:
        return ""
    try:
        return content_sha256(source)
    except (ReadError, OSError):
        return ""


def _same_content(source: Source, digest: str, record: SourceRecord) -> bool:
    """Return whether a source is as it was when it was last looked at."""
    if source.origin is not None:  # its place says so, and nothing is fetched
        return bool(source.mtime_ns) and (source.size, source.mtime_ns) == (record.size, record.mtime_ns)
    return bool(digest) and record.content_sha256 == digest


def _renamed_from(store: StoreReader, digest: str, recipes: Recipes, taken: set[str]) -> SourceRecord | None:
    for record in store.sources_with_content(digest):
        if record.status is not SourceStatus.OK or record.uri in taken:
            continue
        if "://" in record.uri:  # it lies elsewhere, and nothing here says that it is gone
            continue
        if record.recipe == recipes.of(record.media_type) and not Path(record.uri).exists():
            return record
    return None


def _is_below(uri: str, root: str | Path) -> bool:
    if not isinstance(root, Path):
        return uri == root or uri.startswith(root.rstrip("/") + "/")
    path = Path(uri)
    return path == root or root in path.parents
