"""The `.kv` format: one record a chunk; a segment is records behind each other, each starting on an aligned page.

    record = prelude (24 bytes) | header | zeros up to a multiple of 4 KiB | data | zeros up to a multiple of 4 KiB
    prelude = magic (8) | format version (u32) | header bytes (u32) | CRC-32 of the header (u32) | zero (u32)
    header = JSON of the settings | token ids (i32 each) | CRC-32 of each 16 KiB page of the data (u32 each)

All numbers are little-endian. The data is an `EncodedKV`'s buffer unchanged, so loading it is one read into the
memory where it stays, and a single layer is read through the pages that hold it. Nothing is believed: lengths are
compared with the file before memory is asked for, and every difference from what was asked for is a miss with a reason.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import chain
from pathlib import Path
from struct import Struct, pack
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ragkit.errors import KVCacheError
from ragkit.kvcache.chunk_kv import LAYER_ALIGNMENT, ChunkRef, EncodedKV
from ragkit.kvcache.joined_checksums import damaged_page
from ragkit.kvcache.kv_key import KV_FORMAT_VERSION
from ragkit.store.records import KVEntry

RECORD_ALIGNMENT = 4096  # a page of memory and of a disk
PAGE_BYTES = 16384  # one CRC each: small enough to read one layer alone, large enough to check at memory speed
RECORD_OVERHEAD = 4 * RECORD_ALIGNMENT  # bytes that a record of the usual size takes beside its data, at most

_CACHE_PROBES = 3
USUAL_FRONT = 2 * RECORD_ALIGNMENT  # bytes that prelude and header of a window of pages take at most, read at once
_MAGIC = b"RAGKITKV"
_PRELUDE = Struct("<8sIIII")
_SENSELESS = (KeyError, OverflowError, RecursionError, TypeError, ValueError)  # what a header of no sense raises


class MissReason(StrEnum):
    """Why a chunk's KV has to be computed."""

    ABSENT = "absent"  # never stored here, or evicted
    UNREADABLE = "unreadable"  # the file is gone or cannot be read
    SHORT = "short"  # it ends too early
    HEADER = "header"  # its header is damaged or no header at all
    CHECKSUM = "checksum"  # its numbers are damaged
    OTHER_KEY = "other_key"  # it holds the KV of another key
    OTHER_TOKENS = "other_tokens"  # its key collides: the tokens differ
    OTHER_CODEC = "other_codec"  # it was written by another codec or for another shape


class KVMissError(KVCacheError):
    """A stored KV cannot be used. Caught by `KVStore`: the chunk is computed instead.

    Attributes:
        reason: why.
        place: the file or object that it should have been in; empty where nothing says so.
    """

    code = "kv_miss"

    def __init__(self, reason: MissReason, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.place = ""


@contextlib.contextmanager
def misses_in(place: str) -> Iterator[None]:
    """Give misses that come from within the block the name of the file or object that was read."""
    try:
        yield
    except KVMissError as error:
        error.place = place
        raise


class ByteSource(Protocol):
    """Where a record's bytes come from; offsets count from the record's start."""

    @property
    def size(self) -> int:
        """Bytes of the record that are really there."""
        ...

    def read_into(self, offset: int, target: memoryview) -> int:
        """Fill `target` from `offset` and return how many bytes there were."""
        ...

    def will_read(self, offset: int, nbytes: int) -> None:
        """Have these bytes come nearer, without waiting for them."""
        ...


class FileSource:
    """A record within a local file, read by position: safe from several threads. A context manager.

    Raises:
        KVMissError: the file is gone or cannot be read.
    """

    def __init__(self, path: Path, offset: int, size: int) -> None:
        self._offset = offset
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
            self.size = max(0, min(size, os.fstat(self._descriptor).st_size - offset))
        except OSError as error:
            raise KVMissError(MissReason.UNREADABLE, f"{path.name} cannot be read: {error.strerror}") from error

    def read_into(self, offset: int, target: memoryview) -> int:
        """Fill `target` from `offset` and return how many bytes there were."""
        done = 0
        try:
            while done < len(target):
                count = os.preadv(self._descriptor, [target[done:]], self._offset + offset + done)
                if count == 0:
                    break
                done += count
        except OSError as error:
            raise KVMissError(MissReason.UNREADABLE, f"a KV segment cannot be read: {error.strerror}") from error
        return done

    def will_read(self, offset: int, nbytes: int) -> None:
        """Have the system read these bytes into its cache."""
        will_read(self._descriptor, self._offset + offset, nbytes)

    def is_cached(self) -> bool:
        """Return whether the record seems to be in the page cache; False where the file system does not say."""
        if not hasattr(os, "RWF_NOWAIT"):
            return False
        # A probe that fails has the system read what lies around it, so the same places cannot be asked twice.
        places = [random.randrange(max(self.size, 1)) for _ in range(_CACHE_PROBES)]
        try:
            return all(os.preadv(self._descriptor, [bytearray(1)], self._offset + at, os.RWF_NOWAIT) for at in places)
        except OSError:  # EAGAIN: it would have to be read
            return False

    def __enter__(self) -> FileSource:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)


def will_read(descriptor: int, offset: int, nbytes: int) -> None:
    """Have the system read bytes of a file into its cache, without waiting for them, where it can be asked to."""
    if hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError):  # whoever reads them finds out
            os.posix_fadvise(descriptor, offset, nbytes, os.POSIX_FADV_WILLNEED)


class MemorySource:
    """A record that lies in memory."""

    def __init__(self, content: bytes) -> None:
        self._content = memoryview(content)
        self.size = len(content)

    def read_into(self, offset: int, target: memoryview) -> int:
        """Fill `target` from `offset` and return how many bytes there were."""
        part = self._content[offset : offset + len(target)]
        # By numpy, which lets go of the interpreter's lock: a chunk has tens of megabytes, and others launch kernels.
        np.copyto(np.frombuffer(target, np.uint8)[: len(part)], np.frombuffer(part, np.uint8))
        return len(part)

    def will_read(self, offset: int, nbytes: int) -> None:
        """Do nothing: it is here."""


def write_record(encoded: EncodedKV) -> bytes:
    """Return the record of one chunk."""
    return b"".join(record_parts(encoded))


def record_parts(encoded: EncodedKV) -> list[bytes | memoryview]:
    """Return the record of one chunk in parts behind each other, its data where it lies: to copy it takes longer."""
    data = encoded.data.cpu().contiguous().numpy()
    view = data.data
    crcs = [zlib.crc32(view[start : start + PAGE_BYTES]) for start in range(0, len(view), PAGE_BYTES)]
    settings = {
        "key": encoded.ref.key.digest,
        "chunk_id": encoded.ref.chunk_id,
        "codec": encoded.codec_id,
        "tokens": len(encoded.ref.token_ids),
        "extents": encoded.extents,
        "draft_extents": encoded.draft_extents,
        "bytes": len(view),
        "recompute_ms": encoded.recompute_ms,
    }
    text = json.dumps(settings, separators=(",", ":")).encode()
    arrays = np.array(encoded.ref.token_ids, dtype="<i4").tobytes() + np.array(crcs, dtype="<u4").tobytes()
    header = len(text).to_bytes(4, "little") + text + arrays
    prelude = _PRELUDE.pack(_MAGIC, KV_FORMAT_VERSION, len(header), zlib.crc32(header), 0)
    front = prelude + header
    return [front, bytes(-len(front) % RECORD_ALIGNMENT), view, bytes(-len(view) % RECORD_ALIGNMENT)]


def record_token_ids(source: ByteSource, name: str) -> tuple[int, ...]:
    """Return the token ids that a record says it is of; its data is not read.

    Args:
        source: the record.
        name: what messages call it.

    Raises:
        KVMissError: it is none, or its header is damaged.
    """
    content = _front_of(source, name)[0][_PRELUDE.size :]
    split = 4 + int.from_bytes(content[:4], "little")
    try:
        count = int(json.loads(content[4:split])["tokens"])
        return tuple(np.frombuffer(content, dtype="<i4", count=count, offset=split).tolist())
    except _SENSELESS as error:
        raise _miss(MissReason.HEADER, name, f"its header makes no sense ({error})") from error


def segment_parts(chunks: Sequence[EncodedKV]) -> tuple[Iterator[bytes | memoryview], list[KVEntry]]:
    """Return the bytes of a segment of `chunks` and where each lies in it: what `StoreWriter.add_kv` takes."""
    records = [record_parts(chunk) for chunk in chunks]
    entries, offset = [], 0
    for chunk, record in zip(chunks, records, strict=True):
        nbytes, crc = sum(map(len, record)), 0
        for part in record:
            crc = zlib.crc32(part, crc)
        entries.append(KVEntry(chunk.ref.key.digest, chunk.ref.chunk_id, offset, nbytes, crc))
        offset += nbytes
    return chain.from_iterable(records), entries


@dataclass(frozen=True, slots=True)
class RecordHeader:
    """What a record says of itself, already compared with what was asked for.

    Attributes:
        extents: start and stop of each layer within the data.
        draft_extents: the same of the draft's layers, which stand before; empty without a draft.
        data_offset, data_bytes: where the data lies within the record.
        page_crcs: (pages,) uint32, CRC-32 of each page of the data.
        recompute_ms: what computing it took.
    """

    extents: tuple[tuple[int, int], ...]
    draft_extents: tuple[tuple[int, int], ...]
    data_offset: int
    data_bytes: int
    page_crcs: NDArray[np.uint32]
    recompute_ms: float


class RecordReader:
    """Reads one record of `source`, which must be the KV of `ref` encoded by `codec_id` with `num_layers` layers.

    Args:
        source: its bytes.
        ref: which KV it must be.
        codec_id: what must have encoded it.
        num_layers: layers that it must have.
        record_crc: CRC-32 of all its bytes, where somebody knows it: a record that is read whole is compared with that
            alone, which takes half of the processor's time.

    Raises:
        KVMissError: it is anything else.
    """

    def __init__(
        self, source: ByteSource, ref: ChunkRef, codec_id: str, num_layers: int, record_crc: int | None = None
    ) -> None:
        self._source = source
        self._ref = ref
        self._codec_id = codec_id
        self._record_crc = record_crc
        self.header = self._read_header(num_layers)

    def load(self, allocate: Callable[[int], Tensor] | None = None) -> EncodedKV:
        """Return the whole chunk; `allocate(bytes)` gives the uint8 memory that it is read into."""
        header = self.header
        data = allocate(header.data_bytes) if allocate else torch.empty(header.data_bytes, dtype=torch.uint8)
        target = data.numpy().data
        self._read(0, target)
        if self._record_crc is None or self._whole_crc(target) != self._record_crc:
            self._check(0, target)  # only zeros between the parts may be other ones
        return EncodedKV(self._ref, self._codec_id, data, header.extents, header.recompute_ms, header.draft_extents)

    def layer(self, index: int) -> Tensor:
        """Return the encoded bytes of one layer, reading only the pages that hold it."""
        start, stop = self.header.extents[index]
        first, last = self._pages_of(index)
        pages = torch.empty(max(last - first, 0), dtype=torch.uint8)
        self._fill(first, pages.numpy().data)
        return pages[start - first : stop - first]

    def will_read(self, index: int) -> None:
        """Have the bytes of a layer come nearer, without waiting for them."""
        first, last = self._pages_of(index)
        self._source.will_read(self.header.data_offset + first, last - first)

    def _pages_of(self, index: int) -> tuple[int, int]:
        """Return where in the data the pages that hold a layer begin and end."""
        start, stop = self.header.extents[index]
        last = -(-stop // PAGE_BYTES) * PAGE_BYTES
        return start // PAGE_BYTES * PAGE_BYTES, min(last, self.header.data_bytes)

    def _fill(self, start: int, target: memoryview) -> None:
        # `start` is the start of a page, and `target` ends with a page or with the data.
        self._read(start, target)
        self._check(start, target)

    def _read(self, start: int, target: memoryview) -> None:
        if self._source.read_into(self.header.data_offset + start, target) != len(target):
            raise KVMissError(MissReason.SHORT, f"the KV of {self._ref.key} ends too early")

    def _whole_crc(self, data: memoryview) -> int:
        """Return the CRC-32 of the record with these data, were it as it was written."""
        front = zlib.crc32(bytes(self.header.data_offset - len(self._front)), zlib.crc32(self._front))
        return zlib.crc32(bytes(-len(data) % RECORD_ALIGNMENT), zlib.crc32(data, front))

    def _check(self, start: int, target: memoryview) -> None:
        first, count = start // PAGE_BYTES, -(-len(target) // PAGE_BYTES)
        damaged = damaged_page(target, self.header.page_crcs[first : first + count], PAGE_BYTES)
        if damaged is not None:
            raise KVMissError(MissReason.CHECKSUM, f"page {first + damaged} of the KV of {self._ref.key} is damaged")

    def _read_header(self, num_layers: int) -> RecordHeader:
        self._front, data_offset = _front_of(self._source, str(self._ref.key))
        content = self._front[_PRELUDE.size :]
        try:
            return self._parse(content, data_offset, num_layers)
        except _SENSELESS as error:  # a right checksum over something that ragkit did not write
            raise self._miss(MissReason.HEADER, f"its header makes no sense ({error})") from error

    def _parse(self, content: bytes, data_offset: int, num_layers: int) -> RecordHeader:
        split = 4 + int.from_bytes(content[:4], "little")
        settings: dict[str, Any] = json.loads(content[4:split])
        end_of_tokens = split + 4 * settings["tokens"]
        self._compare(settings, content[split:end_of_tokens], num_layers)
        extents = tuple(map(tuple, settings["extents"]))
        draft_extents = tuple(map(tuple, settings.get("draft_extents", ())))  # old records know no drafts
        crcs = np.frombuffer(content, dtype="<u4", offset=end_of_tokens)
        data_bytes = int(settings["bytes"])
        if data_offset + data_bytes > self._source.size:
            raise self._miss(MissReason.SHORT, f"it has {self._source.size} bytes")
        places = [0, *chain.from_iterable(draft_extents), *chain.from_iterable(extents), data_bytes]
        are_pairs = {*map(len, draft_extents), *map(len, extents)} <= {2} and {*map(type, places)} == {int}
        if not are_pairs or places != sorted(places) or len(crcs) != -(-data_bytes // PAGE_BYTES):
            raise ValueError("its layers do not lie behind each other")
        return RecordHeader(extents, draft_extents, data_offset, data_bytes, crcs, float(settings["recompute_ms"]))

    def _compare(self, settings: dict[str, Any], token_ids: bytes, num_layers: int) -> None:
        if settings["key"] != self._ref.key.digest:
            raise self._miss(MissReason.OTHER_KEY, f"it is the KV of {settings['key']}")
        if token_ids != pack(f"<{len(self._ref.token_ids)}i", *self._ref.token_ids):
            raise self._miss(MissReason.OTHER_TOKENS, "it is of other tokens")
        if settings["codec"] != self._codec_id or len(settings["extents"]) != num_layers:
            layers = len(settings["extents"])
            raise self._miss(MissReason.OTHER_CODEC, f"it has {layers} layers, encoded by {settings['codec']}")

    def _miss(self, reason: MissReason, message: str) -> KVMissError:
        return _miss(reason, str(self._ref.key), message)


def _front_of(source: ByteSource, name: str) -> tuple[bytes, int]:
    """Return prelude and header, whose checksum was compared, and where the data begins."""
    front = _header_bytes(source, 0, max(_PRELUDE.size, min(USUAL_FRONT, source.size)), name)
    prelude = front[: _PRELUDE.size]
    magic, version, length, crc, _ = _PRELUDE.unpack(prelude)
    if magic != _MAGIC or version != KV_FORMAT_VERSION:
        raise _miss(MissReason.HEADER, name, "it is no KV record of this format")
    content = front[_PRELUDE.size : _PRELUDE.size + length]
    if len(content) < length:
        content += _header_bytes(source, len(front), _PRELUDE.size + length - len(front), name)
    if zlib.crc32(content) != crc:
        raise _miss(MissReason.HEADER, name, "its header does not match its checksum")
    return prelude + content, -(-(_PRELUDE.size + length) // RECORD_ALIGNMENT) * RECORD_ALIGNMENT


def _header_bytes(source: ByteSource, offset: int, length: int, name: str) -> bytes:
    if offset + length > source.size:  # before any memory is asked for
        raise _miss(MissReason.SHORT, name, f"it has {source.size} bytes")
    content = bytearray(length)
    if source.read_into(offset, memoryview(content)) != length:
        raise _miss(MissReason.SHORT, name, "it ends too early")
    return bytes(content)


def _miss(reason: MissReason, name: str, message: str) -> KVMissError:
    return KVMissError(reason, f"the stored KV of {name} is not used: {message}")


assert PAGE_BYTES % RECORD_ALIGNMENT == 0
assert RECORD_ALIGNMENT % LAYER_ALIGNMENT == 0
