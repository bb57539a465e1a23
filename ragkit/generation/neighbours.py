"""Which chunks stand before a chunk in its document: what its KV is computed behind with the context `neighbours`."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from ragkit.errors import StoreError
from ragkit.generation.prompt import PromptBuilder
from ragkit.store.records import StoredChunk
from ragkit.types import Chunk, Segment

_KEPT_CHUNKS = 1024  # whose neighbours are kept: a question names its chunks several times, and the next one some again

_log = logging.getLogger(__name__)


class ChunkOrder(Protocol):
    """What says which chunk stands before which; `ragkit.store.Store` does."""

    @property
    def generation(self) -> int:
        """Number of the last commit."""
        ...

    def snapshot(self) -> AbstractContextManager[int]:
        """Pin one generation for all reads of this thread within the block."""
        ...

    def known_chunks(self, chunk_ids: Sequence[str]) -> set[str]:
        """Return which of these chunks are there."""
        ...

    def chunks_by_id(self, chunk_ids: Sequence[str]) -> list[StoredChunk]:
        """Return the chunks with these ids in the given order."""
        ...

    def chunk_at(self, doc_id: str, index: int) -> StoredChunk | None:
        """Return chunk `index` of a document, or None beyond its ends."""
        ...


class ChunkNeighbours:
    """Gives the segments before a chunk, by its id. Thread-safe; follows the store's generation.

    They are tokenised as prompts do it, and as many as `nearest_segments` takes: prefix, neighbours and chunk never
    take more than the window. A chunk that has left the store has no neighbours any more.

    Args:
        store: where the chunks are.
        builder: makes segments of them.
        tokens: most tokens of more than one neighbour.
        window: most tokens of prefix, neighbours and chunk.
    """

    def __init__(self, store: ChunkOrder, builder: PromptBuilder, tokens: int, window: int) -> None:
        self._store = store
        self._builder = builder
        self._tokens = tokens
        self._window = window - len(builder.prefix.token_ids)
        self._lock = threading.Lock()
        self._generation = -1
        self._found: dict[str, tuple[Segment, ...]] = {}

    def __call__(self, chunk_id: str) -> tuple[Segment, ...]:
        """Return the segments in the order of the document; none where nothing stands before the chunk."""
        generation = self._store.generation
        with self._lock:
            if generation != self._generation:  # the same chunk may have other neighbours: its document was cut anew
                self._generation = generation
                self._found.clear()
            found = self._found.pop(chunk_id, None)
        if found is None:
            found = self._read(chunk_id)
        with self._lock:
            if generation == self._generation:
                self._found[chunk_id] = found  # now the last one to leave
                if len(self._found) > _KEPT_CHUNKS:
                    del self._found[next(iter(self._found))]
        return found

    def _read(self, chunk_id: str) -> tuple[Segment, ...]:
        try:
            with self._store.snapshot():
                if not self._store.known_chunks([chunk_id]):
                    return ()
                return self._before(chunk_id)
        except StoreError as error:  # the key says what the KV was computed behind, so nothing is mistaken for it
            _log.warning("the KV of a chunk is computed without its neighbours, which cannot be read: %s", error)
            return ()

    def _before(self, chunk_id: str) -> tuple[Segment, ...]:
        (stored,) = self._store.chunks_by_id([chunk_id])
        chunk = stored.chunk
        room = self._window - len(self._builder.chunk_segment(chunk).token_ids)
        return nearest_segments(self._backwards(chunk), self._tokens, room)

    def _backwards(self, chunk: Chunk) -> Iterator[Segment]:
        for index in range(chunk.index - 1, -1, -1):
            before = self._store.chunk_at(chunk.doc_id, index)
            if before is None:
                return
            yield self._builder.chunk_segment(before.chunk)


def nearest_segments(backwards: Iterable[Segment], tokens: int, room: int) -> tuple[Segment, ...]:
    """Return the first of `backwards`, which lists what stands before a chunk from the nearest on, in reading order.

    Whole ones, as long as they have at most `tokens` tokens together, the nearest in any case; never more than `room`.
    """
    found: list[Segment] = []
    taken = 0
    for segment in backwards:
        taken += len(segment.token_ids)
        if taken > room or (found and taken > tokens):
            break
        found.append(segment)
    return tuple(reversed(found))
