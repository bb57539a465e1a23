"""Comparing many pages with their CRC-32s in few calls.

zlib gives the interpreter's lock away while it works, and takes it again. Threads that check loaded chunks page by page
do so a hundred thousand times a second, and a thread that launches kernels meanwhile waits for the lock each time:
beside four of them, computing a chunk took twice as long as beside four that check 256 pages at once. What one call
over many pages must give follows from the pages' own CRCs: that of two texts behind each other is M(first) ^ second,
where M, which appends as many zeros as the second has bytes, is linear over GF(2) (as in zlib's crc32_combine).
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

_TOGETHER = 256  # pages a call: a power of two
_FEW = 4

_Tables = NDArray[np.uint32]  # (4, 256): what each byte of a CRC becomes


def damaged_page(data: memoryview, crcs: Sequence[int] | NDArray[np.uint32], page_bytes: int) -> int | None:
    """Return the first page of `data` whose CRC-32 is not the one given, or None.

    Args:
        data: (bytes,); the last page may be shorter.
        crcs: one for each page.
        page_bytes: of all other pages.
    """
    if len(crcs) <= _FEW:  # to join their CRCs takes longer
        return next((page for page, crc in enumerate(crcs) if crc != _crc(data, page, page_bytes)), None)
    whole = len(data) // page_bytes
    at = 0
    while at < len(crcs):
        count = min(_TOGETHER, whole - at)
        count = 1 << (count.bit_length() - 1) if count > 0 else 1  # what is left over goes by smaller powers of two
        part = data[at * page_bytes : (at + count) * page_bytes]
        if zlib.crc32(part) != _joined(np.array(crcs[at : at + count], dtype=np.uint32), page_bytes):
            return next(page for page in range(at, at + count) if crcs[page] != _crc(data, page, page_bytes))
        at += count
    return None


def _crc(data: memoryview, page: int, page_bytes: int) -> int:
    return zlib.crc32(data[page * page_bytes : (page + 1) * page_bytes])


def _joined(crcs: NDArray[np.uint32], page_bytes: int) -> int:
    """Return the CRC-32 of pages behind each other; their number is a power of two."""
    while len(crcs) > 1:
        crcs = _appended(page_bytes, crcs[::2]) ^ crcs[1::2]
        page_bytes *= 2
    return int(crcs[0])


def _appended(count: int, crcs: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Return M(crcs) for `count` zeros."""
    return _look_up(_tables(count), crcs)


def _look_up(tables: _Tables, crcs: NDArray[np.uint32]) -> NDArray[np.uint32]:
    found: NDArray[np.uint32] = tables[0, crcs & 255]
    for byte in range(1, 4):
        found = found ^ tables[byte, (crcs >> (8 * byte)) & 255]
    return found


@lru_cache(64)
def _tables(count: int) -> _Tables:
    # Starting from a CRC instead of none changes the result by M of it, whatever the bytes are.
    zeros = bytes(count)
    plain = zlib.crc32(zeros)
    bits = np.array([zlib.crc32(zeros, 1 << bit) ^ plain for bit in range(32)], dtype=np.uint32).reshape(4, 8)
    numbers = np.arange(256)
    tables = np.zeros((4, 256), dtype=np.uint32)
    for bit in range(8):
        tables ^= np.where(numbers >> bit & 1, bits[:, bit : bit + 1], 0).astype(np.uint32)
    return tables
