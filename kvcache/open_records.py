"""Records of which single layers are read, kept open: those used last, for several threads at once."""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager

from torch import Tensor

from ragkit.kvcache.chunk_kv import ChunkRef
from ragkit.kvcache.kv_segment import KVMissError, MissReason, RecordReader

# Why a record that was looked up before may be elsewhere now: its segment was written anew, or others mended it.
ELSEWHERE = frozenset((MissReason.UNREADABLE, MissReason.SHORT, MissReason.CHECKSUM))

_MOST = 256  # more than are found at once as a rule: those beyond are opened a second time when they are read


class OpenRecords:
    """Thread-safe; records are opened and read side by side, one record by one thread at a time.

    Args:
        open_record: opens one; its reader holds until the context ends.
        most: records that stay open.
    """

    def __init__(
        self, open_record: Callable[[ChunkRef], AbstractContextManager[RecordReader]], most: int = _MOST
    ) -> None:
        self._open_record = open_record
        self._most = most
        self._lock = threading.Lock()
        self._records: OrderedDict[ChunkRef, _OpenRecord] = OrderedDict()

    def layer(self, ref: ChunkRef, layer: int) -> Tensor:
        """Return the bytes of one layer of a record.

        Raises:
            KVMissError: it is not there, or damaged.
        """
        try:
            return self._read(ref, layer)
        except KVMissError as error:
            self._close(ref, error)
            if error.reason not in ELSEWHERE:
                raise
        try:
            return self._read(ref, layer)
        except KVMissError as error:
            self._close(ref, error)
            raise

    def will_read(self, ref: ChunkRef, layer: int) -> None:
        """Have the bytes of a layer of a record come nearer, without waiting for them; `layer` says what is wrong."""
        with contextlib.suppress(KVMissError):
            self._opened(ref).will_read(layer)

    def close(self) -> None:
        """Close all."""
        with self._lock:
            records, self._records = list(self._records.values()), OrderedDict()
        for record in records:
            record.close()

    def _read(self, ref: ChunkRef, layer: int) -> Tensor:
        while True:
            found = self._opened(ref).layer(layer)
            if found is not None:
                return found

    def _opened(self, ref: ChunkRef) -> _OpenRecord:
        with self._lock:
            known = self._records.get(ref)
            if known is not None:
                self._records.move_to_end(ref)
                return known
        opened = _OpenRecord(self._open_record(ref))
        leaving = []
        with self._lock:
            known = self._records.setdefault(ref, opened)
            if known is not opened:
                leaving.append(opened)  # another thread was sooner
            while len(self._records) > self._most:
                leaving.append(self._records.popitem(last=False)[1])
        for record in leaving:
            record.close()
        return known

    def _close(self, ref: ChunkRef, why: KVMissError) -> None:
        with self._lock:
            found = self._records.pop(ref, None)
        if found is not None:
            found.close(why)


class _OpenRecord:
    """One record; closing it waits for who reads."""

    def __init__(self, context: AbstractContextManager[RecordReader]) -> None:
        self._lock = threading.Lock()
        self._stack = contextlib.ExitStack()
        self._reader: RecordReader | None = self._stack.enter_context(context)

    def layer(self, layer: int) -> Tensor | None:
        """Return the bytes of a layer, or None where the record was closed meanwhile."""
        with self._lock:
            return None if self._reader is None else self._reader.layer(layer)

    def will_read(self, layer: int) -> None:
        """Have the bytes of a layer come nearer."""
        with self._lock:
            if self._reader is not None:
                self._reader.will_read(layer)

    def close(self, why: KVMissError | None = None) -> None:
        """Close the record; who opened it is told `why` where it could not be read."""
        with self._lock:
            self._reader = None
            stack = self._stack.pop_all()
        with contextlib.suppress(KVMissError), stack:
            if why is not None:
                raise why
