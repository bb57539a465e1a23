"""Chunk KV on the local disk: in segments of the store, whose transactions and erasure they share."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from ragkit.errors import KVCacheError, StoreError
from ragkit.kvcache.backing_tier import KnownRecord
from ragkit.kvcache.chunk_kv import ChunkRef, EncodedKV
from ragkit.kvcache.eviction import EvictionPolicy, EvictionQueue
from ragkit.kvcache.kv_key import KVKey
from ragkit.kvcache.kv_segment import (
    USUAL_FRONT,
    FileSource,
    KVMissError,
    MissReason,
    RecordReader,
    misses_in,
    segment_parts,
    will_read,
)
from ragkit.store.records import KVEntry, KVTotals, owning_chunk

_SEGMENT_BYTES = 64 << 20  # as a commit group
_LOCK_TIMEOUT_S = 5.0
_FILLED = 0.75  # of a segment's file holds live records, or it is written anew; and of the budget after an eviction
_MOVED_TOGETHER = 64  # records


class _KVWriter(Protocol):
    def add_kv(self, parts: Iterator[bytes | memoryview], entries: Sequence[KVEntry]) -> str: ...

    def remove_kv(self, keys: Sequence[str]) -> None: ...


class KVCatalogue(Protocol):
    """What the segment tier needs of a store; `ragkit.store.Store` has it."""

    def kv_entries(self, keys: Sequence[str]) -> dict[str, tuple[Path, KVEntry]]:
        """Return where the known ones of these KV keys lie."""
        ...

    def kv_listing(self) -> list[tuple[Path, KVEntry]]:
        """Return where every stored KV lies, oldest first."""
        ...

    def kv_totals(self) -> KVTotals:
        """Return how much KV is stored."""
        ...

    def known_chunks(self, chunk_ids: Sequence[str]) -> set[str]:
        """Return which of these chunks are there."""
        ...

    def writer(self, lock_timeout_s: float = ...) -> AbstractContextManager[_KVWriter]:
        """Give the one writer of the store."""
        ...


class SegmentTier:
    """Chunks in the store's `.kv` segments, each written in one transaction with its catalogue entries.

    The budget counts the files. A segment's file can only go as a whole, so where the budget is reached, the chunks of
    least worth leave, and segments of which too little is left are written anew without the gaps (log-structured
    cleaning; Rosenblum and Ousterhout, SOSP 1991).

    Args:
        catalogue: the store.
        budget_bytes: most bytes of segment files that it keeps.
        policy: which chunks leave first.
    """

    name = "disk"

    def __init__(self, catalogue: KVCatalogue, budget_bytes: int, policy: EvictionPolicy) -> None:
        self._catalogue = catalogue
        self.budget_bytes = budget_bytes
        self._lock = threading.Lock()
        self._writing = threading.Lock()  # one thread at a time: others write what selectors keep of a document's pages
        self._queue: EvictionQueue[KVKey] = EvictionQueue(policy)
        self._records: dict[KVKey, tuple[Path, KVEntry]] = {}
        self._remembered: dict[str, tuple[Path, KVEntry]] = {}  # where `holds` was to remember that records lay
        self._reload()

    @property
    def bytes_used(self) -> int:
        """Bytes of the segment files."""
        with self._lock:
            return sum(_file_bytes(path) for path in self._live_bytes())

    def holds(self, keys: Sequence[KVKey], *, remember: bool = False) -> set[KVKey]:
        """Return which of these keys it has a record of."""
        try:
            places = self._catalogue.kv_entries([key.digest for key in keys])
        except StoreError as error:
            raise KVCacheError(f"the catalogue cannot name chunk KV: {error}") from error
        if remember:
            with self._lock:
                self._remembered = dict(places)  # a copy: other threads take out what they write anew
            _will_read_fronts(places.values())
        return set(map(KVKey, places))

    def known(self, keys: Sequence[KVKey]) -> dict[KVKey, KnownRecord]:
        """Return the sizes of these records, and whether the page cache has them."""
        try:
            places = self._catalogue.kv_entries([key.digest for key in keys])
        except StoreError:
            return {}
        return {KVKey(key): KnownRecord(entry.bytes, _is_cached(path, entry)) for key, (path, entry) in places.items()}

    @contextlib.contextmanager
    def open(self, ref: ChunkRef, codec_id: str, num_layers: int) -> Iterator[RecordReader]:
        """Give a reader of the chunk's record."""
        try:
            path, source, reader = self._opened(ref, codec_id, num_layers)
            # An open file stays readable while it is removed, so eviction cannot pull it away from under a load.
            with misses_in(path.name), source:
                with self._lock:
                    if ref.key in self._records:
                        self._queue.use(ref.key)
                yield reader
        except KVMissError:
            with self._lock:
                self._remembered.pop(ref.key.digest, None)
            raise

    def _opened(self, ref: ChunkRef, codec_id: str, num_layers: int) -> tuple[Path, FileSource, RecordReader]:
        """Open a record where it is remembered, or where the catalogue says."""
        with self._lock:
            remembered = self._remembered.get(ref.key.digest)
        if remembered is not None:
            with contextlib.suppress(KVMissError):  # others may have written it anew, elsewhere
                return _open_record(remembered, ref, codec_id, num_layers)
        try:
            place = self._catalogue.kv_entries([ref.key.digest]).get(ref.key.digest)
        except StoreError as error:
            raise KVMissError(MissReason.UNREADABLE, f"the catalogue cannot name the KV of {ref.key}") from error
        if place is None:
            raise KVMissError(MissReason.ABSENT, f"the KV of {ref.key} is not on disk")
        return _open_record(place, ref, codec_id, num_layers)

    def save(self, chunks: Sequence[EncodedKV]) -> int:
        """Write chunks in segments of up to 64 MiB; those whose text has left the store meanwhile are left out."""
        with self._writing:
            return self._saved(chunks)

    def _saved(self, chunks: Sequence[EncodedKV]) -> int:
        kept = 0
        for group in _groups(chunks, min(_SEGMENT_BYTES, int(self.budget_bytes * _FILLED / 4))):
            try:
                with self._catalogue.writer(_LOCK_TIMEOUT_S) as writer:
                    if self._catalogue.kv_totals() != KVTotals(len(self._records), self.bytes_used):
                        self._catch_up()  # somebody else wrote, removed or cleaned: those bytes count as well
                    # What was erased meanwhile must not come back through its KV.
                    owners = [owning_chunk(chunk.ref.chunk_id) for chunk in group]
                    alive = self._catalogue.known_chunks(owners)
                    here = [chunk for chunk, owner in zip(group, owners, strict=True) if owner in alive]
                    kept += self._save_group(writer, here)
            except StoreError as error:
                with contextlib.suppress(StoreError):
                    self._reload()
                raise KVCacheError(f"chunk KV could not be written to the store: {error}") from error
        return kept

    def _save_group(self, writer: _KVWriter, chunks: Sequence[EncodedKV]) -> int:
        group = list({chunk.ref.key: chunk for chunk in chunks}.values())
        parts, entries = segment_parts(group)
        nbytes = sum(entry.bytes for entry in entries)
        if not group or nbytes > self.budget_bytes * _FILLED:
            return 0
        if self.bytes_used + nbytes > self.budget_bytes:
            self._make_room(writer, nbytes)
        # A record of the same key is there if it was unusable, or belongs to another chunk of the same text.
        known = list(self._catalogue.kv_entries([entry.key for entry in entries]))
        if known:
            writer.remove_kv(known)
        writer.add_kv(parts, entries)
        places = self._catalogue.kv_entries([entry.key for entry in entries])
        with self._lock:
            for entry in entries:
                self._remembered.pop(entry.key, None)
                self._note(places[entry.key][0], entry)
        return len(chunks)

    def _make_room(self, writer: _KVWriter, nbytes: int) -> None:
        self._catch_up()
        with self._lock:
            missing = sum(self._live_bytes().values()) + nbytes - int(self.budget_bytes * _FILLED)
            victims = self._queue.make_room(missing, lambda _: True) if missing > 0 else []
            for key in victims:
                del self._records[key]
            sparse = {path for path, live in self._live_bytes().items() if live < _FILLED * _file_bytes(path)}
            moving = [(path, entry) for path, entry in self._records.values() if path in sparse]
        writer.remove_kv([key.digest for key in victims])
        for start in range(0, len(moving), _MOVED_TOGETHER):
            self._move(writer, moving[start : start + _MOVED_TOGETHER])
        writer.remove_kv([])  # the segments that have become empty

    def _move(self, writer: _KVWriter, moving: Sequence[tuple[Path, KVEntry]]) -> None:
        """Write records into a new segment; those that cannot be read whole are forgotten."""
        contents: list[bytes] = []
        entries: list[KVEntry] = []
        lost: list[str] = []
        for path, entry in moving:
            content = _record_bytes(path, entry)
            if content is None:
                lost.append(entry.key)
                continue
            entries.append(dataclasses.replace(entry, offset=sum(map(len, contents))))
            contents.append(content)
        if lost:
            writer.remove_kv(lost)
        if entries:
            writer.add_kv(iter(contents), entries)
        places = self._catalogue.kv_entries([entry.key for entry in entries])
        with self._lock:
            for entry in entries:
                self._records[KVKey(entry.key)] = (places[entry.key][0], entry)
            for key in map(KVKey, lost):
                self._queue.remove(key)
                del self._records[key]

    def _reload(self) -> None:
        listing = self._catalogue.kv_listing()
        with self._lock:
            for key in list(self._records):
                self._queue.remove(key)
            self._records.clear()
            for path, entry in listing:
                self._note(path, entry)

    def _catch_up(self) -> None:
        """Follow what ingests and other processes did: chunks that left, and KV that was handed to other chunks."""
        listing = {KVKey(entry.key): (path, entry) for path, entry in self._catalogue.kv_listing()}
        with self._lock:
            for key in self._records.keys() - listing.keys():
                self._queue.remove(key)
                del self._records[key]
            for key, (path, entry) in listing.items():
                if key in self._records:
                    self._records[key] = (path, entry)
                else:
                    self._note(path, entry)

    def _note(self, path: Path, entry: KVEntry) -> None:
        key = KVKey(entry.key)
        if key in self._records:
            self._queue.remove(key)
        self._records[key] = (path, entry)
        # Computing costs about the same for every byte of one model's KV, and what an earlier process wrote must
        # compare with what this one does: so frequency decides here.
        self._queue.add(key, entry.bytes, float(entry.bytes))

    def _live_bytes(self) -> dict[Path, int]:
        live: dict[Path, int] = {}
        for path, entry in self._records.values():
            live[path] = live.get(path, 0) + entry.bytes
        return live


def _groups(chunks: Sequence[EncodedKV], limit: int = _SEGMENT_BYTES) -> Iterator[list[EncodedKV]]:
    group: list[EncodedKV] = []
    for chunk in chunks:
        if group and sum(item.nbytes for item in group) + chunk.nbytes > limit:
            yield group
            group = []
        group.append(chunk)
    if group:
        yield group


def _open_record(
    place: tuple[Path, KVEntry], ref: ChunkRef, codec_id: str, num_layers: int
) -> tuple[Path, FileSource, RecordReader]:
    path, entry = place
    with misses_in(path.name), contextlib.ExitStack() as stack:
        source = stack.enter_context(FileSource(path, entry.offset, entry.bytes))
        reader = RecordReader(source, ref, codec_id, num_layers, entry.crc32)
        stack.pop_all()
    return path, source, reader


def _will_read_fronts(places: Iterable[tuple[Path, KVEntry]]) -> None:
    """Have the system read what stands before the data of records: thousands of small reads, one after the other."""
    by_path: dict[Path, list[int]] = {}
    for path, entry in places:
        by_path.setdefault(path, []).append(entry.offset)
    for path, offsets in by_path.items():
        with contextlib.suppress(OSError), path.open("rb") as file:
            for offset in offsets:
                will_read(file.fileno(), offset, USUAL_FRONT)


def _is_cached(path: Path, entry: KVEntry) -> bool:
    try:
        with FileSource(path, entry.offset, entry.bytes) as source:
            return source.is_cached()
    except KVMissError:
        return False


def _file_bytes(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _record_bytes(path: Path, entry: KVEntry) -> bytes | None:
    try:
        with path.open("rb") as file:
            file.seek(entry.offset)
            content = file.read(entry.bytes)
    except OSError:
        return None
    return content if len(content) == entry.bytes and zlib.crc32(content) == entry.crc32 else None
