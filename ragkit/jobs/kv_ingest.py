"""The KV of all chunks, computed ahead. What is stored is skipped, so it can be stopped anywhere and goes on."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from threading import Event

from ragkit.errors import KVCacheError, StoreError, UsageError
from ragkit.generation.blending import Blending
from ragkit.kvcache.chunk_kv import ChunkRef, EncodedKV
from ragkit.kvcache.kv_segment import RECORD_OVERHEAD
from ragkit.kvcache.remote_tier import RemoteTier
from ragkit.progress import Progress
from ragkit.reports import KVIngestReport, too_long_warnings
from ragkit.store import Store

_LOOKED_UP = 256  # chunks that are compared with the tiers at once
_WRITTEN_CHUNKS = 64  # at most in one write,
_WRITTEN_BYTES = 64 << 20  # and as many bytes: what a kill costs

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Missing:
    """Chunks without KV, about how many bytes it will take, how many chunks have it and how many will share it.

    `too_long` counts those that no prompt has room for.
    """

    chunk_ids: list[str]
    estimated_bytes: int
    present: int
    shared: int
    too_long: int


class KVIngest:
    """One run over all chunks of a store. Not reusable."""

    def __init__(self, store: Store, blending: Blending, progress: Progress, stop: Event | None = None) -> None:
        self._store = store
        self._blending = blending
        self._tiers = blending.kv_store
        self._progress = progress
        self._stop = stop or Event()
        self._computed = 0
        self._bytes = 0
        self._left_out = 0

    def run(self) -> tuple[KVIngestReport, tuple[str, ...]]:
        """Compute and write what is missing; return what was done, and warnings of what was left out.

        Raises:
            UsageError: there is no tier to write to.
            StoreError: the store is locked, or the disk is full; what was written stays.
        """
        if not self._tiers.backing:
            raise UsageError("there is no place for the KV of chunks: set kv.disk_mb above 0, or kv.remote")
        try:
            missing = self._missing()
            self._progress.start(len(missing.chunk_ids), missing.estimated_bytes, "chunks")
            warnings = self._fill(missing)
        except KVCacheError as error:
            raise error.__cause__ if isinstance(error.__cause__, StoreError) else error from error
        report = KVIngestReport(self._computed, missing.present, self._bytes, missing.shared, self._left_out)
        return report, (*too_long_warnings(missing.too_long), *warnings)

    def _missing(self) -> _Missing:
        row_ids = self._store.row_ids()
        wanted: set[str] = set()  # keys
        chunk_ids: list[str] = []
        estimated = present = shared = too_long = 0
        for start in range(0, len(row_ids), _LOOKED_UP):
            with self._store.snapshot():
                chunk_ids_here = [one.chunk.chunk_id for one in self._store.chunks(row_ids[start : start + _LOOKED_UP])]
            found = self._refs(chunk_ids_here)
            refs = [ref for ref in found if self._blending.fits_a_prompt(ref)]
            too_long += len(found) - len(refs)
            absent = self._tiers.absent(refs)
            present += len(refs) - len(absent)
            for ref in absent:
                if ref.key.digest in wanted:
                    shared += 1
                    continue
                wanted.add(ref.key.digest)
                chunk_ids.append(ref.chunk_id)
                estimated += self._estimate(ref)
        return _Missing(chunk_ids, estimated, present, shared, too_long)

    def _refs(self, chunk_ids: Sequence[str]) -> list[ChunkRef]:
        """Return the references of those chunks that are still there."""
        with self._store.snapshot():
            known = self._store.known_chunks(chunk_ids)
            stored = self._store.chunks_by_id([chunk_id for chunk_id in chunk_ids if chunk_id in known])
        return self._blending.refs([one.chunk for one in stored])

    def _fill(self, missing: _Missing) -> tuple[str, ...]:
        for batch in self._batches(missing.chunk_ids):
            fitting = self._fitting(batch)
            encoded = self._compute(fitting)
            if encoded and not self._tiers.write(encoded):
                return (self._full(len(missing.chunk_ids)),)
            self._computed += len(encoded)
            self._bytes += sum(chunk.nbytes for chunk in encoded)
            if len(fitting) < len(batch) and len(encoded) == len(fitting):
                return (self._full(len(missing.chunk_ids)),)
            if self._stop.is_set():
                logger.info("stopped; the KV of %d chunks is left to the next run", len(missing.chunk_ids))
                break
        return ()

    def _batches(self, chunk_ids: Sequence[str]) -> Iterator[list[ChunkRef]]:
        batch: list[ChunkRef] = []
        for start in range(0, len(chunk_ids), _WRITTEN_CHUNKS):
            for ref in self._refs(chunk_ids[start : start + _WRITTEN_CHUNKS]):
                if batch and sum(map(self._estimate, batch)) + self._estimate(ref) > _WRITTEN_BYTES:
                    yield batch
                    batch = []
                batch.append(ref)
            if batch:
                yield batch
                batch = []

    def _compute(self, refs: Sequence[ChunkRef]) -> list[EncodedKV]:
        """Return the KV of `refs`, or of the first of them where a stop is asked for."""
        encoded = []
        for ref in refs:
            if self._stop.is_set():
                break
            started = time.perf_counter()
            (chunk,) = self._blending.chunks.compute([ref])
            encoded.append(self._tiers.encode(chunk, ref, 1e3 * (time.perf_counter() - started)))
            self._progress.advance(documents=1, bytes=encoded[-1].nbytes, tokens=len(ref.token_ids))
        return encoded

    def _estimate(self, ref: ChunkRef) -> int:
        tokens = len(ref.token_ids)
        return int(tokens * self._tiers.codec.bytes_per_token(tokens)) + RECORD_OVERHEAD

    def _fitting(self, batch: Sequence[ChunkRef]) -> Sequence[ChunkRef]:
        """Return the first chunks of a batch, as many as a tier has room for."""
        room = max(tier.budget_bytes - tier.bytes_used for tier in self._tiers.backing)
        needed = itertools.accumulate(self._estimate(ref) for ref in batch)
        return batch[: sum(nbytes <= room for nbytes in needed)]

    def _full(self, wanted: int) -> str:
        self._left_out = wanted - self._computed
        names = " and ".join(f"{tier.name} ({tier.budget_bytes >> 20:,} MB)" for tier in self._tiers.backing)
        tiers = self._tiers.backing
        budgets = " or ".join("kv.remote_mb" if isinstance(tier, RemoteTier) else "kv.disk_mb" for tier in tiers)
        return (
            f"the KV of {self._left_out:,} chunks was left out, because {names} {'is' if len(tiers) == 1 else 'are'} "
            f"full: raise {budgets}, or take a smaller kv.codec; they are computed when they are first used"
        )
