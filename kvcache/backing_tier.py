"""What a tier outside of memory promises."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from ragkit.kvcache.chunk_kv import ChunkRef, EncodedKV
from ragkit.kvcache.kv_key import KVKey
from ragkit.kvcache.kv_segment import RecordReader


@dataclass(frozen=True, slots=True)
class KnownRecord:
    """What a tier knows of a record without reading it.

    Attributes:
        nbytes: its size.
        is_cached: whether the operating system has it in memory.
    """

    nbytes: int
    is_cached: bool = False


class BackingTier(Protocol):
    """A tier that keeps chunks for longer than a process. Thread-safe."""

    @property
    def name(self) -> str:
        """How the tier is called in reports."""
        ...

    @property
    def bytes_used(self) -> int:
        """Bytes that its records take."""
        ...

    @property
    def budget_bytes(self) -> int:
        """Most bytes that it keeps."""
        ...

    def holds(self, keys: Sequence[KVKey], *, remember: bool = False) -> set[KVKey]:
        """Return which of these keys it has a record of, whether it is whole or not.

        Args:
            keys: those that are asked for.
            remember: whether their places are kept for `open`, in place of those before, so that thousands of records
                are not looked up one by one. One that leaves meanwhile may still be opened until its bytes are gone.

        Raises:
            KVCacheError: the tier cannot be asked.
        """
        ...

    def known(self, keys: Sequence[KVKey]) -> Mapping[KVKey, KnownRecord]:
        """Return what is known of the records of these keys without asking another machine; maybe not of all.

        Nothing where that cannot be said now; `open` says why.
        """
        ...

    def open(self, ref: ChunkRef, codec_id: str, num_layers: int) -> AbstractContextManager[RecordReader]:
        """Give a reader of the chunk's record, whole or layer by layer.

        Raises:
            KVMissError: it is not here, or not what was asked for; later reads may raise it, too.
        """
        ...

    def save(self, chunks: Sequence[EncodedKV]) -> int:
        """Keep chunks, evicting others to stay within the budget, and return how many are kept.

        Raises:
            KVCacheError: the tier could not be written.
        """
        ...
