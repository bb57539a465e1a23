"""What tests of paged documents share."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from ragkit.generation.decoder import Decoder
from ragkit.kvcache.backing_tier import KnownRecord
from ragkit.kvcache.chunk_kv import ChunkRef, EncodedKV
from ragkit.kvcache.kv_key import KVKey, KVRecipe
from ragkit.kvcache.kv_segment import KVMissError, MemorySource, MissReason, RecordReader, write_record


def recipe_of(decoder: Decoder, codec_id: str) -> KVRecipe:
    """Return a recipe for a model whose weights have no file."""
    return KVRecipe("w" * 64, decoder.config, "t" * 32, decoder.dtype, codec_id)


class RecordsInMemory:
    """A backing tier whose records are byte strings that a test can damage."""

    name = "disk"
    budget_bytes = 1 << 40

    def __init__(self) -> None:
        self.records: dict[KVKey, bytes] = {}
        self.opened = self.saved = 0

    @property
    def bytes_used(self) -> int:
        return sum(map(len, self.records.values()))

    def holds(self, keys: Sequence[KVKey], *, remember: bool = False) -> set[KVKey]:
        return self.records.keys() & set(keys)

    def known(self, keys: Sequence[KVKey]) -> dict[KVKey, KnownRecord]:
        return {}

    @contextlib.contextmanager
    def open(self, ref: ChunkRef, codec_id: str, num_layers: int) -> Iterator[RecordReader]:
        if ref.key not in self.records:
            raise KVMissError(MissReason.ABSENT, f"no {ref.key}")
        self.opened += 1
        yield RecordReader(MemorySource(self.records[ref.key]), ref, codec_id, num_layers)

    def save(self, chunks: Sequence[EncodedKV]) -> int:
        self.saved += sum(bool(chunk.ref.token_ids) for chunk in chunks)  # windows, not what selectors keep
        self.records |= {chunk.ref.key: write_record(chunk) for chunk in chunks}
        return len(chunks)


class At:
    """A progress that does something when so many windows were read."""

    def __init__(self, windows, act):
        self.left, self.act = windows, act

    def start(self, *_):
        pass

    def advance(self, documents=0, **_):
        self.left -= documents
        if self.left == 0:
            self.act()


def interrupted(*_):
    """What somebody at the keyboard does to whatever runs."""
    raise KeyboardInterrupt
