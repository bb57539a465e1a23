"""Segment files: immutable, named by their sha256, with a CRC per megabyte in the catalogue.

A vector segment is an Arrow IPC file of one batch with columns `row_id` (int64) and `vector` (fixed-size list of
float32). The catalogue keeps where both buffers lie, so that a query maps them with numpy alone: importing pyarrow
costs a cold query more than reading the vectors does.
"""

from __future__ import annotations

import os
import threading
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from ragkit.errors import StoreCorruptError
from ragkit.store import faults
from ragkit.store.files import GROUP_BYTES, FileDigest, digest_file, place_durably, temporary_path
from ragkit.store.rows import SegmentRow

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ragkit.store.records import RowIds, Vectors

VECTOR_SEGMENT = "arrow"
KV_SEGMENT = "kv"

_verified: set[tuple[str, int, int, int, int]] = set()
_verified_mutex = threading.Lock()


def segment_path(folder: Path, sha256: str, kind: str) -> Path:
    """Return where a segment lies in the store folder."""
    return folder / "segments" / sha256[:2] / f"{sha256}.{kind}"


def write_vector_segment(folder: Path, row_ids: RowIds, vectors: Vectors) -> SegmentRow:
    """Write (rows, dim) float32 vectors durably and return their catalogue row, with `segment_id` 0.

    `row_ids` ascend.
    """
    import pyarrow as pa

    rows, dim = vectors.shape
    ids = pa.array(row_ids, type=pa.int64())
    flat = pa.array(vectors.reshape(-1), type=pa.float32())
    batch = pa.record_batch([ids, pa.FixedSizeListArray.from_arrays(flat, dim)], names=["row_id", "vector"])
    temporary = temporary_path(folder / "segments")
    try:
        faults.checkpoint("segment:write", temporary)
        with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
            writer.write_batch(batch)
        vectors_offset = _vectors_offset(temporary)
        digest = digest_file(temporary)
        place_durably(temporary, segment_path(folder, digest.sha256, VECTOR_SEGMENT))
    finally:
        temporary.unlink(missing_ok=True)
    first, last = int(row_ids[0]), int(row_ids[-1])
    listed = b"" if last - first + 1 == rows else row_ids.astype("<i8").tobytes()
    return _row(digest, VECTOR_SEGMENT, rows)._replace(
        first_row=first, last_row=last, dim=dim, vectors_offset=vectors_offset, row_ids=listed
    )


def write_kv_segment(folder: Path, parts: Iterable[bytes | memoryview], rows: int) -> SegmentRow:
    """Write one KV segment from its bytes and return its catalogue row, with `segment_id` 0."""
    temporary = temporary_path(folder / "segments")
    try:
        faults.checkpoint("segment:write", temporary)
        with temporary.open("wb") as file:
            for part in parts:
                file.write(part)
        digest = digest_file(temporary)
        place_durably(temporary, segment_path(folder, digest.sha256, KV_SEGMENT))
    finally:
        temporary.unlink(missing_ok=True)
    return _row(digest, KV_SEGMENT, rows)


def map_vector_segment(folder: Path, segment: SegmentRow) -> tuple[RowIds, Vectors]:
    """Return the row ids (rows,) and the memory-mapped vectors (rows, dim) of a segment, dead rows included.

    The file's CRCs are verified the first time that this process maps it.

    Raises:
        StoreCorruptError: the file is missing, short, or its bytes rotted.
    """
    import numpy as np

    path = segment_path(folder, segment.sha256, segment.kind)
    try:
        content: NDArray[np.uint8] = np.memmap(path, dtype=np.uint8, mode="r")
        verify_once(path, segment, content)
    except (OSError, ValueError) as error:
        raise _damaged(path, f"it cannot be read ({error})") from error
    start, stop = segment.vectors_offset, segment.vectors_offset + segment.rows * segment.dim * 4
    return segment_row_ids(segment), content[start:stop].view(np.float32).reshape(segment.rows, segment.dim)


def segment_row_ids(segment: SegmentRow) -> RowIds:
    """Return the ascending row ids of a vector segment, (rows,), dead rows included."""
    import numpy as np

    if not segment.row_ids:
        return np.arange(segment.first_row, segment.last_row + 1, dtype=np.int64)
    return np.frombuffer(segment.row_ids, dtype="<i8").astype(np.int64)


def verify_once(path: Path, segment: SegmentRow, content: NDArray[np.uint8]) -> None:
    """Raise `StoreCorruptError` unless every group of the mapped file has the recorded CRC; a success is remembered."""
    status = path.stat()
    identity = (segment.sha256, status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
    if identity in _verified:
        return
    if content.size != segment.bytes:
        raise _damaged(path, f"it has {content.size} bytes, {segment.bytes} were written")
    for group, expected in enumerate(_group_crcs(segment)):
        start = group * GROUP_BYTES
        if zlib.crc32(content[start : start + GROUP_BYTES].data) != expected:
            raise _damaged(path, f"bytes {start} to {start + GROUP_BYTES} do not match their checksum")
    with _verified_mutex:
        _verified.add(identity)


def forget_verified() -> None:
    """Verify every segment again when it is next mapped."""
    with _verified_mutex:
        _verified.clear()


def live_mask(segment: SegmentRow) -> NDArray[np.bool_]:
    """Return which rows of a segment are live, (rows,)."""
    import numpy as np

    if not segment.live:
        return np.ones(segment.rows, dtype=np.bool_)
    bits = np.frombuffer(segment.live, dtype=np.uint8)
    return np.unpackbits(bits, count=segment.rows, bitorder="little").astype(np.bool_)


def with_live(segment: SegmentRow, mask: NDArray[np.bool_]) -> SegmentRow:
    """Return the catalogue row of a segment whose live rows are those of `mask`."""
    import numpy as np

    return segment._replace(live_rows=int(mask.sum()), live=np.packbits(mask, bitorder="little").tobytes())


def _vectors_offset(path: Path) -> int:
    """Return where the float32 values of the file's only batch start."""
    import pyarrow as pa

    with pa.memory_map(str(path)) as source:
        base = source.read_buffer(1).address
        batch = pa.ipc.open_file(source).get_batch(0)
        return int(batch.column(1).flatten().buffers()[-1].address - base)


def _row(digest: FileDigest, kind: str, rows: int) -> SegmentRow:
    crcs = b"".join(crc.to_bytes(4, "little") for crc in digest.group_crcs)
    return SegmentRow(0, digest.sha256, kind, digest.size, rows, rows, 0, 0, 0, 0, b"", b"", crcs)


def _group_crcs(segment: SegmentRow) -> list[int]:
    crcs = segment.group_crcs
    return [int.from_bytes(crcs[start : start + 4], "little") for start in range(0, len(crcs), 4)]


def _damaged(path: Path, reason: str) -> StoreCorruptError:
    place = os.path.join(*path.parts[-3:])
    return StoreCorruptError(
        f"the segment {place} is damaged: {reason}; run `ragkit verify` to see which sources it holds and "
        "`ragkit verify --repair` to mark them for reading again"
    )
