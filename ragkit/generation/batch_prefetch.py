"""Which chunk KV a batch needs next: that of the requests that wait, in the order in which they will be let in.

Policy alone: `KVPrefetcher` reads. A blend that finds its chunks in memory need not wait for a disk or for another
machine while the device has nothing to do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ragkit.errors import RagkitError
from ragkit.generation.batch_job import BatchJob
from ragkit.generation.strategy import ReusingStrategy
from ragkit.kvcache.chunk_kv import ChunkRef
from ragkit.kvcache.kv_store import KVStore
from ragkit.kvcache.prefetch import KVPrefetcher

REQUESTS_AHEAD = 16  # whose chunks are read ahead, as far as they fit
_SHARE = 4  # of the store's memory one part holds what was read ahead, so that three are left to what runs

_Chunks = tuple[KVStore, Sequence[ChunkRef]]


class BatchPrefetch:
    """Has the chunks of the next requests read ahead, for one run of a batch.

    Args:
        reader: gives what reads from a store within so many bytes.
    """

    def __init__(self, reader: Callable[[KVStore, int], KVPrefetcher] = KVPrefetcher) -> None:
        self._reader = reader
        self._readers: dict[KVStore, KVPrefetcher] = {}
        self._looked_at: tuple[tuple[BatchJob, ...], tuple[BatchJob, ...]] = ((), ())
        self._chunks: dict[BatchJob, _Chunks | None] = {}

    def look(self, starting: Sequence[BatchJob], coming: Sequence[BatchJob]) -> None:
        """Have what `coming` needs read ahead, the first one first; return at once.

        Args:
            starting: requests that fetch their chunks in this step.
            coming: requests that wait, as they will be let in; the first `REQUESTS_AHEAD` count.
        """
        looked_at = tuple(starting), tuple(coming[:REQUESTS_AHEAD])
        if looked_at == self._looked_at:
            return
        self._looked_at = looked_at
        jobs = dict.fromkeys((*looked_at[0], *looked_at[1]))
        self._chunks = {job: self._chunks[job] if job in self._chunks else _chunks_of(job) for job in jobs}
        kept, wanted = (self._by_store(part) for part in looked_at)
        for store in wanted.keys() - self._readers.keys():
            budget = store.memory.budget_bytes // _SHARE
            if budget and store.backing:
                self._readers[store] = self._reader(store, budget)
        for store, reader in self._readers.items():
            reader.want(wanted.get(store, ()), kept.get(store, ()))

    def close(self) -> None:
        """Stop reading and let go of what was read and not used."""
        for reader in self._readers.values():
            reader.close()

    def _by_store(self, jobs: Sequence[BatchJob]) -> dict[KVStore, list[ChunkRef]]:
        found: dict[KVStore, list[ChunkRef]] = {}
        for job in jobs:
            chunks = self._chunks[job]
            if chunks is not None:
                found.setdefault(chunks[0], []).extend(chunks[1])
        return found


def _chunks_of(job: BatchJob) -> _Chunks | None:
    """Return the chunks that a request will fetch and from where; None where it fetches none."""
    strategy: object = job.strategy  # to mypy no strategy has both protocols
    if not isinstance(strategy, ReusingStrategy):
        return None
    try:
        return strategy.kv_store, strategy.chunk_refs(job.prompt)
    except RagkitError:  # the prefill meets it, and its request fails alone
        return None
