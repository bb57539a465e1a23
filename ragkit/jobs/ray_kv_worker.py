"""What computes chunk KV in a worker of a Ray cluster, and writes it to the store's segments on shared storage."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

from ragkit.config import ChunkContextName, PipelineConfig
from ragkit.errors import StoreError
from ragkit.jobs.ray_worker import WorkerIdentity, limit_threads
from ragkit.parts import Parts
from ragkit.store.connections import translated
from ragkit.store.derived import write_kv
from ragkit.store.records import KVEntry, StoredChunk
from ragkit.store.rows import SegmentRow
from ragkit.types import Chunk

if TYPE_CHECKING:
    from ragkit.generation.blending import BlendedStore, Blending
    from ragkit.kvcache.chunk_kv import ChunkRef, EncodedKV

SEGMENT_BYTES = 64 << 20  # as a commit group


@dataclass(frozen=True, slots=True)
class ListedKV:
    """One chunk's KV as a worker names it: `key` is its digest, `estimated_bytes` about what its record will take.

    `fits_a_prompt` is false for chunks that no prompt has room for.
    """

    chunk_id: str
    key: str
    estimated_bytes: int
    fits_a_prompt: bool = True


@dataclass(frozen=True, slots=True)
class WrittenKV:
    """A segment that lies in the store's folder and is in no catalogue yet."""

    segment: SegmentRow
    entries: tuple[KVEntry, ...]
    kv_bytes: int
    tokens: int


class RayKVWorker:
    """Names, computes and writes chunk KV, one call at a time.

    Args:
        config: which model, and how its KV is stored.
        folder: the store's, under the same path on every node.
        threads: how many the model may use.
        witness: a file of the driver's in the folder, by which the worker sees that both mean the same one.
    """

    def __init__(self, config: PipelineConfig, folder: str, threads: int, witness: str) -> None:
        # The store's catalogue is the driver's, and so are its tiers: nothing is looked up or saved from here.
        kv = replace(config.kv, disk_mb=0, remote="", memory_mb=0, gpu_mb=0)
        self._config = replace(config, kv=kv)
        self._folder = Path(folder)
        self._threads = threads
        self._witness = witness
        self._shipped = _ShippedChunks()
        self._blending: Blending | None = None

    def start(self) -> WorkerIdentity:
        """Load the model and return who this is.

        Raises:
            StoreError: the store's folder is another one here.
        """
        import os

        node = os.uname().nodename
        if not (self._folder / self._witness).is_file():
            raise StoreError(
                f"the Ray worker on {node} does not see the store's segments in {self._folder / 'segments'}: put that "
                "folder on storage that every node mounts under the same path, and link it into the store"
            )
        limit_threads(self._threads)
        parts = Parts(self._folder, self._config)
        engine = parts.engine
        from ragkit.generation.blending import Blending
        from ragkit.models.fingerprint import weights_fingerprint

        store = cast("BlendedStore", self._shipped) if self._has_neighbours else None
        self._blending = Blending(engine, self._config.kv, self._config.blend, store)
        return WorkerIdentity(node, generator=weights_fingerprint(engine.folder))

    def names(self, chunks: Sequence[Chunk], before: Sequence[StoredChunk]) -> list[ListedKV]:
        """Return the keys of the KV of `chunks`; `before` are those that stand before them in their documents."""
        from ragkit.kvcache.kv_segment import RECORD_OVERHEAD

        codec = self._loaded.kv_store.codec
        listed = []
        for ref in self._refs(chunks, before):
            tokens = len(ref.token_ids)
            estimated = int(tokens * codec.bytes_per_token(tokens)) + RECORD_OVERHEAD
            fits = self._loaded.fits_a_prompt(ref)
            listed.append(ListedKV(ref.chunk_id, ref.key.digest, estimated, fits))
        return listed

    def compute(self, chunks: Sequence[Chunk], before: Sequence[StoredChunk]) -> list[WrittenKV]:
        """Compute and write the KV of `chunks`, and return the segments.

        Raises:
            StoreSpaceError: the disk is full.
        """
        written: list[WrittenKV] = []
        waiting: list[EncodedKV] = []
        for ref in self._refs(chunks, before):
            started = time.perf_counter()
            (computed,) = self._loaded.chunks.compute([ref])
            waiting.append(self._loaded.kv_store.encode(computed, ref, 1e3 * (time.perf_counter() - started)))
            if sum(one.nbytes for one in waiting) >= SEGMENT_BYTES:
                written.append(self._write(waiting))
                waiting = []
        return [*written, self._write(waiting)] if waiting else written

    @property
    def _loaded(self) -> Blending:
        assert self._blending is not None, "`start` comes first"
        return self._blending

    @property
    def _has_neighbours(self) -> bool:
        return self._config.kv.context is ChunkContextName.NEIGHBOURS

    def _refs(self, chunks: Sequence[Chunk], before: Sequence[StoredChunk]) -> list[ChunkRef]:
        self._shipped.hold(before)
        return self._loaded.refs(chunks)

    def _write(self, encoded: Sequence[EncodedKV]) -> WrittenKV:
        from ragkit.kvcache.kv_segment import segment_parts

        parts, entries = segment_parts(encoded)
        with translated(self._folder, sum(entry.bytes for entry in entries)):
            segment = write_kv(self._folder, parts, entries)
        tokens = sum(len(one.ref.token_ids) for one in encoded)
        return WrittenKV(segment, tuple(entries), sum(one.nbytes for one in encoded), tokens)


class _ShippedChunks:
    """A `ChunkOrder` of the chunks that came with a call."""

    def __init__(self) -> None:
        self.generation = 0
        self._by_id: dict[str, StoredChunk] = {}
        self._by_place: dict[tuple[str, int], StoredChunk] = {}

    def hold(self, chunks: Sequence[StoredChunk]) -> None:
        """Know these chunks and no others."""
        self.generation += 1
        self._by_id = {stored.chunk.chunk_id: stored for stored in chunks}
        self._by_place = {(stored.chunk.doc_id, stored.chunk.index): stored for stored in chunks}

    @contextlib.contextmanager
    def snapshot(self) -> Iterator[int]:
        """Give the generation, which only `hold` changes."""
        yield self.generation

    def known_chunks(self, chunk_ids: Sequence[str]) -> set[str]:
        """Return which of these chunks came along."""
        return self._by_id.keys() & set(chunk_ids)

    def chunks_by_id(self, chunk_ids: Sequence[str]) -> list[StoredChunk]:
        """Return the chunks with these ids in the given order."""
        return [self._by_id[chunk_id] for chunk_id in chunk_ids]

    def chunk_at(self, doc_id: str, index: int) -> StoredChunk | None:
        """Return chunk `index` of a document, or None where it did not come along."""
        return self._by_place.get((doc_id, index))
