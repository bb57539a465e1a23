"""The windows of a paged document on disk: named by everything that they depend on, written in batches, read by layer.

The format is that of chunk KV (`kv_segment.py`): a record holds the pages of one window in all layers, with its token
ids and a CRC for each 16 KiB. A window's key goes over the tokens of all windows before it as well, because its numbers
depend on them; so two documents that begin alike share what they have in common, and reading that was interrupted goes
on behind the last window that was written.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager

from torch import Tensor

from ragkit.errors import KVCacheError
from ragkit.kvcache.backing_tier import BackingTier
from ragkit.kvcache.chunk_kv import ChunkRef, EncodedKV
from ragkit.kvcache.kv_key import ChunkContext, ContextKind, KVRecipe
from ragkit.kvcache.kv_segment import KVMissError, MissReason, RecordReader
from ragkit.kvcache.open_records import ELSEWHERE, OpenRecords

_SAVED_BYTES = 64 << 20  # that are written together; a kill costs what is being written and what waits


def window_refs(
    recipe: KVRecipe, reading_id: str, token_ids: Sequence[int], window_tokens: int, owner: str
) -> list[ChunkRef]:
    """Return the references of a document's windows, in order.

    Args:
        recipe: the model and the codec.
        reading_id: names how the document is read: whatever of it changes numbers.
        token_ids: all tokens.
        window_tokens: tokens of a window.
        owner: what the windows belong to in the catalogue, with which they go.
    """
    chain = hashlib.sha256(reading_id.encode())
    refs = []
    for start in range(0, len(token_ids), window_tokens):
        tokens = tuple(token_ids[start : start + window_tokens])
        context = ChunkContext(ContextKind.PAGES, f"pages:{chain.hexdigest()}")
        key = recipe.key(tokens, context)
        refs.append(ChunkRef(key, tokens, owner))
        chain.update(key.digest.encode())
    return refs


class PageRecords:
    """The records of some refs in one tier. Thread-safe.

    Args:
        tier: where they are; None keeps nothing.
        codec_id: what encodes them.
        num_layers: layers of a record.
    """

    def __init__(self, tier: BackingTier | None, codec_id: str, num_layers: int) -> None:
        self.tier = tier
        self._codec_id = codec_id
        self._num_layers = num_layers
        self._open = OpenRecords(self._record)
        self._waiting: list[EncodedKV] = []
        self._saving: tuple[list[EncodedKV], Future[None]] | None = None
        self._writer: ThreadPoolExecutor | None = None

    def present(self, refs: Sequence[ChunkRef]) -> set[int]:
        """Return which of `refs` are there, whole or not, by their place."""
        known = self.tier.holds([ref.key for ref in refs], remember=True) if self.tier is not None else set()
        return {index for index, ref in enumerate(refs) if ref.key in known}

    def layer(self, ref: ChunkRef, layer: int) -> Tensor:
        """Return the bytes of one layer of a record.

        Raises:
            KVMissError: it is not there, or damaged.
        """
        return self._open.layer(ref, layer)

    def will_read(self, ref: ChunkRef, layer: int) -> None:
        """Have the bytes of one layer of a record come nearer, without waiting for them."""
        self._open.will_read(ref, layer)

    def load(self, ref: ChunkRef, allocate: Callable[[int], Tensor] | None = None) -> EncodedKV:
        """Return a whole record; `allocate(bytes)` gives the uint8 memory that it is read into.

        Raises:
            KVMissError: it is not there, or damaged.
        """
        try:
            return self._whole(ref, allocate)
        except KVMissError as error:
            if error.reason not in ELSEWHERE:
                raise
        return self._whole(ref, allocate)

    def write(self, encoded: EncodedKV) -> int:
        """Keep a record, and return how many of those that were kept are not written yet, the last ones.

        What fills a batch is written by a thread of its own while the next records come.

        Raises:
            KVCacheError: the tier could not be written.
        """
        self._waiting.append(encoded)
        is_full = sum(one.nbytes for one in self._waiting) >= _SAVED_BYTES
        if is_full or (self._saving is not None and self._saving[1].done()):
            self._settle()
        if is_full:
            if self.tier is not None:
                self._writer = self._writer or ThreadPoolExecutor(1, thread_name_prefix="ragkit-page-save")
                self._saving = self._waiting, self._writer.submit(self._save, self.tier, self._waiting)
            self._waiting = []
        return len(self._waiting) + (0 if self._saving is None else len(self._saving[0]))

    def flush(self) -> None:
        """Write what waits; it goes on waiting where the tier cannot be written now.

        Raises:
            KVCacheError: the tier could not be written, or refused some of it.
        """
        self._settle()
        if self.tier is not None and self._waiting:
            self._save(self.tier, self._waiting)
        self._waiting = []

    def close(self) -> None:
        """Close what is open."""
        self._open.close()
        if self._writer is not None:
            self._writer.shutdown()
            self._writer = None

    def _settle(self) -> None:
        """Wait until the batch that is being written is; it waits again where it cannot be."""
        if self._saving is None:
            return
        batch, saved = self._saving
        wait([saved])  # an interrupt meanwhile leaves the batch as it is: being written
        self._saving = None
        try:
            saved.result()
        except BaseException:  # memory may have been short, for one
            self._waiting = batch + self._waiting
            raise

    def _whole(self, ref: ChunkRef, allocate: Callable[[int], Tensor] | None) -> EncodedKV:
        with self._record(ref) as reader:
            return reader.load(allocate)

    @staticmethod
    def _save(tier: BackingTier, batch: Sequence[EncodedKV]) -> None:
        kept = tier.save(batch)
        if kept < len(batch):
            raise KVCacheError(
                f"the tier {tier.name} kept {kept} of {len(batch)} windows of a document: the document left the "
                f"store meanwhile, or kv.disk_mb is too small for what is stored beside it"
            )

    def _record(self, ref: ChunkRef) -> AbstractContextManager[RecordReader]:
        if self.tier is None:
            raise KVMissError(MissReason.ABSENT, f"the KV of {ref.key} is not on disk")
        return self.tier.open(ref, self._codec_id, self._num_layers)
