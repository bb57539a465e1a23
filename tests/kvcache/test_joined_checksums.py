import random
import zlib

import numpy as np
import pytest

from ragkit.kvcache.joined_checksums import _appended, _joined, damaged_page

PAGE = 64


def pages(count, rest=0):
    data = random.Random(count).randbytes(count * PAGE + rest)
    return bytearray(data), [zlib.crc32(data[at : at + PAGE]) for at in range(0, len(data), PAGE)]


def found(data, crcs):
    return damaged_page(memoryview(data), crcs, PAGE)


@pytest.mark.parametrize("count", [1, 2, 64, 256])
def test_the_checksum_of_pages_behind_each_other_follows_from_their_own(count):
    data, crcs = pages(count)
    assert _joined(np.array(crcs, dtype=np.uint32), PAGE) == zlib.crc32(data)


@pytest.mark.parametrize("zeros", [1, 7, 16384])
def test_appending_zeros_is_what_zlib_makes_of_them(zeros):
    crcs = [zlib.crc32(b"one"), zlib.crc32(b"another"), 0, 0xFFFFFFFF]
    plain = zlib.crc32(bytes(zeros))
    appended = _appended(zeros, np.array(crcs, dtype=np.uint32))
    assert appended.tolist() == [zlib.crc32(bytes(zeros), crc) ^ plain for crc in crcs]


@pytest.mark.parametrize("count", [0, 1, 2, 3, 255, 256, 257, 700])
@pytest.mark.parametrize("rest", [0, 1, PAGE - 1])
def test_whole_pages_are_found_whole(count, rest):
    assert found(*pages(count, rest)) is None


@pytest.mark.parametrize(("count", "rest"), [(1, 0), (3, 5), (257, 0), (600, 63)])
def test_the_first_damaged_page_is_named_wherever_a_bit_flips(count, rest):
    data, crcs = pages(count, rest)
    for page in {0, count // 2, len(crcs) - 1}:
        broken = data.copy()
        broken[-1] ^= 128  # a later one is damaged as well
        broken[page * PAGE] ^= 1
        assert found(broken, crcs) == page


def test_a_wrong_checksum_names_its_page():
    data, crcs = pages(40)
    crcs[17] ^= 1 << 31
    assert found(data, crcs) == 17


def test_a_damaged_last_byte_of_a_page_is_seen():
    data, crcs = pages(300)
    for page in (0, 255, 256, 299):
        broken = data.copy()
        broken[(page + 1) * PAGE - 1] ^= 4
        assert found(broken, crcs) == page


def test_many_pages_take_few_calls(monkeypatch):
    data, crcs = pages(1024)
    calls = []
    checksum = zlib.crc32
    found(data, crcs)  # makes its tables
    monkeypatch.setattr(zlib, "crc32", lambda *given: calls.append(given) or checksum(*given))
    assert found(data, crcs) is None
    assert len(calls) == 4
