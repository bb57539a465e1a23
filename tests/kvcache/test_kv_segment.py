import dataclasses
import json
import random
import struct
import zlib

import pytest
import torch
from kv_samples import key_of, ref_of

from ragkit.kvcache.chunk_kv import EncodedKV
from ragkit.kvcache.kv_segment import (
    PAGE_BYTES,
    RECORD_ALIGNMENT,
    FileSource,
    KVMissError,
    MemorySource,
    MissReason,
    RecordReader,
    record_token_ids,
    segment_parts,
    write_record,
)

LAYER_BYTES = (3 * PAGE_BYTES + 100, 5, 2 * PAGE_BYTES)


def sample(name="a", layer_bytes=LAYER_BYTES):
    generator = torch.Generator().manual_seed(len(name))
    layers = [torch.randint(0, 256, (size,), generator=generator, dtype=torch.uint8) for size in layer_bytes]
    return EncodedKV.pack(ref_of(name), "codec", layers, recompute_ms=12.5)


def read(record, encoded):
    return RecordReader(MemorySource(bytes(record)), encoded.ref, encoded.codec_id, len(encoded.extents)).load()


def reason_of(record, encoded):
    with pytest.raises(KVMissError) as caught:
        read(record, encoded)
    return caught.value.reason


def test_a_record_gives_back_the_chunk():
    encoded = sample()
    loaded = read(write_record(encoded), encoded)
    assert torch.equal(loaded.data, encoded.data)
    assert loaded.extents == encoded.extents
    assert loaded.recompute_ms == 12.5


def test_a_record_gives_back_the_draft_of_a_chunk():
    layers = [torch.full((size,), size % 256, dtype=torch.uint8) for size in (100, 70, 9000, 64)]
    encoded = EncodedKV.pack(ref_of("drafted"), "codec", layers[2:], 1.0, layers[:2])
    loaded = read(write_record(encoded), encoded)
    assert loaded.draft_extents == ((0, 100), (128, 198))
    assert loaded.extents == ((256, 9256), (9280, 9344))
    assert torch.equal(loaded.data, encoded.data)


def test_a_record_says_of_which_tokens_it_is():
    encoded = sample()
    assert record_token_ids(MemorySource(write_record(encoded)), "a") == encoded.ref.token_ids != ()


@pytest.mark.parametrize("place", [0, 9, 30, 200])
def test_a_damaged_header_says_of_no_tokens(place):
    record = bytearray(write_record(sample()))
    record[place] ^= 1
    with pytest.raises(KVMissError, match="the stored KV of a is not used") as caught:
        record_token_ids(MemorySource(bytes(record)), "a")
    assert caught.value.reason is MissReason.HEADER


@pytest.mark.parametrize("layer_bytes", [(), (0,), (1,), (PAGE_BYTES,), (PAGE_BYTES - 1, 1)])
def test_edge_sizes_come_back(layer_bytes):
    encoded = sample("edge", layer_bytes)
    assert torch.equal(read(write_record(encoded), encoded).data, encoded.data)


def test_records_and_their_data_are_page_aligned():
    chunks = [sample("a"), sample("bb", (7,)), sample("ccc", ())]
    parts, entries = segment_parts(chunks)
    content = b"".join(parts)
    assert [entry.offset % RECORD_ALIGNMENT for entry in entries] == [0, 0, 0]
    first = bytes(chunks[0].data[:64].tolist())
    assert content.index(first) % RECORD_ALIGNMENT == 0
    assert all(zlib.crc32(content[e.offset : e.offset + e.bytes]) == e.crc32 for e in entries)


def test_a_chunk_is_found_within_a_segment_file(tmp_path):
    chunks = [sample("a"), sample("bb"), sample("ccc")]
    parts, entries = segment_parts(chunks)
    path = tmp_path / "segment.kv"
    path.write_bytes(b"".join(parts))
    with FileSource(path, entries[1].offset, entries[1].bytes) as source:
        loaded = RecordReader(source, chunks[1].ref, "codec", 3).load()
    assert torch.equal(loaded.data, chunks[1].data)


def test_one_layer_is_read_without_the_others():
    class Counting(MemorySource):
        total = 0

        def read_into(self, offset, target):
            Counting.total += len(target)
            return super().read_into(offset, target)

    encoded = sample()
    reader = RecordReader(Counting(write_record(encoded)), encoded.ref, "codec", 3)
    Counting.total = 0
    assert torch.equal(reader.layer(1), encoded.layer(1))
    assert Counting.total == PAGE_BYTES
    assert torch.equal(reader.layer(0), encoded.layer(0))
    assert torch.equal(reader.layer(2), encoded.layer(2))


def test_the_data_is_read_into_the_memory_that_is_given():
    encoded = sample()
    memory = torch.full((encoded.nbytes + 2,), 7, dtype=torch.uint8)
    reader = RecordReader(MemorySource(write_record(encoded)), encoded.ref, "codec", 3)
    loaded = reader.load(lambda size: memory[1 : 1 + size])
    assert loaded.data.data_ptr() == memory.data_ptr() + 1
    assert torch.equal(memory[1:-1], encoded.data)
    assert memory[0] == memory[-1] == 7


@pytest.mark.parametrize("layer_bytes", [(), (5,), (PAGE_BYTES,), (3 * PAGE_BYTES + 7, 64)])
def test_a_whole_record_is_compared_with_its_own_checksum_alone(monkeypatch, layer_bytes):
    encoded = sample("whole", layer_bytes)
    record = write_record(encoded)
    monkeypatch.setattr("ragkit.kvcache.kv_segment.damaged_page", lambda *_: 0)  # every page would be damaged
    known = RecordReader(MemorySource(record), encoded.ref, "codec", len(layer_bytes), zlib.crc32(record))
    assert torch.equal(known.load().data, encoded.data)
    with pytest.raises(KVMissError, match="page 0"):
        RecordReader(MemorySource(record), encoded.ref, "codec", len(layer_bytes), 1).load()


@pytest.mark.parametrize("checksum", [None, "of the record"])
def test_a_flipped_bit_is_found_with_and_without_a_checksum_of_the_record(checksum):
    encoded = sample("whole", (3 * PAGE_BYTES + 7,))
    record = bytearray(write_record(encoded))
    crc = None if checksum is None else zlib.crc32(bytes(record))
    zero = RECORD_ALIGNMENT - 1  # between the header and the data: it may be anything
    assert record[zero] == 0
    record[zero] = 9
    assert torch.equal(
        RecordReader(MemorySource(bytes(record)), encoded.ref, "codec", 1, crc).load().data, encoded.data
    )
    record[RECORD_ALIGNMENT + 2 * PAGE_BYTES + 5] ^= 4
    with pytest.raises(KVMissError, match=r"page 2 of the KV of .* is damaged"):
        RecordReader(MemorySource(bytes(record)), encoded.ref, "codec", 1, crc).load()


def test_every_truncation_is_a_miss():
    encoded = sample("cut", (300, 40))
    record = write_record(encoded)
    end_of_data = RECORD_ALIGNMENT + encoded.nbytes
    for length in [0, 1, 23, 24, 100, RECORD_ALIGNMENT - 1, RECORD_ALIGNMENT, end_of_data - 1]:
        assert reason_of(record[:length], encoded) is MissReason.SHORT
    assert torch.equal(read(record[:end_of_data], encoded).data, encoded.data)  # what is cut off are zeros


def test_every_flipped_bit_is_a_miss_or_harmless():
    encoded = sample("flip", (300, 40))
    record = write_record(encoded)
    reasons = set()
    for place in [*range(260), *range(260, len(record), 41)]:
        damaged = bytearray(record)
        damaged[place] ^= 1 << (place % 8)
        try:
            assert torch.equal(read(damaged, encoded).data, encoded.data)  # only padding may change unnoticed
            assert record[place] == 0
        except KVMissError as error:
            reasons.add(error.reason)
    assert reasons == {MissReason.HEADER, MissReason.CHECKSUM, MissReason.SHORT}


def test_half_written_data_is_a_miss():
    encoded = sample()
    record = bytearray(write_record(encoded))
    record[len(record) // 2 :] = bytes(len(record) - len(record) // 2)
    assert reason_of(record, encoded) is MissReason.CHECKSUM


def test_swapped_files_are_misses():
    mine, other = sample("a"), sample("b")
    assert reason_of(write_record(other), mine) is MissReason.OTHER_KEY


def test_a_colliding_key_with_other_tokens_is_a_miss():
    mine = sample("a")
    other = dataclasses.replace(mine, ref=dataclasses.replace(ref_of("b"), key=key_of("a")))
    assert reason_of(write_record(other), mine) is MissReason.OTHER_TOKENS
    longer = dataclasses.replace(mine, ref=dataclasses.replace(mine.ref, token_ids=(*mine.ref.token_ids, 1)))
    assert reason_of(write_record(longer), mine) is MissReason.OTHER_TOKENS


def test_another_codec_or_number_of_layers_is_a_miss():
    encoded = sample()
    record = MemorySource(write_record(encoded))
    for codec_id, layers in (("other", 3), ("codec", 2)):
        with pytest.raises(KVMissError) as caught:
            RecordReader(record, encoded.ref, codec_id, layers)
        assert caught.value.reason is MissReason.OTHER_CODEC


@pytest.mark.parametrize("text", [b"{}", b"[1]", b"nonsense", b'{"key": 1}'])
def test_a_header_of_right_checksum_and_no_sense_is_a_miss(text):
    header = len(text).to_bytes(4, "little") + text
    record = struct.pack("<8sIIII", b"RAGKITKV", 1, len(header), zlib.crc32(header), 0) + header
    assert reason_of(record + bytes(5000), sample()) in (MissReason.HEADER, MissReason.OTHER_KEY)


def record_with(settings):
    """A record of no tokens and no data with a right checksum and these settings."""
    encoded = EncodedKV.pack(dataclasses.replace(ref_of("none"), token_ids=()), "codec", [])
    own = {"key": encoded.ref.key.digest, "codec": "codec", "tokens": 0, "extents": [], "bytes": 0, "recompute_ms": 0}
    text = settings if isinstance(settings, bytes) else json.dumps(own | settings).encode()
    header = len(text).to_bytes(4, "little") + text
    return struct.pack("<8sIIII", b"RAGKITKV", 1, len(header), zlib.crc32(header), 0) + header + bytes(5000), encoded


@pytest.mark.parametrize(
    "settings",
    [
        {"tokens": 10**30}, {"tokens": -(10**30)}, {"tokens": -5}, {"bytes": float("inf")}, {"bytes": -1},
        {"recompute_ms": 10**400}, {"draft_extents": [[0, 10**30]]}, {"draft_extents": [[0.0, 0.0]]},
        {"draft_extents": ["ab"]}, b"[" * 3000,
    ],
)  # fmt: skip
def test_numbers_that_no_record_has_are_a_miss(settings):
    assert read(*record_with({})).nbytes == 0
    assert reason_of(*record_with(settings)) is MissReason.HEADER


@pytest.mark.parametrize("settings", [{"tokens": 10**30}, {"tokens": float("inf")}, {"tokens": "a"}, b"[" * 3000])
def test_a_number_of_tokens_that_no_record_has_says_of_none(settings):
    with pytest.raises(KVMissError, match="its header makes no sense"):
        record_token_ids(MemorySource(record_with(settings)[0]), "a")


def test_a_claimed_size_beyond_the_file_asks_for_no_memory():
    record = struct.pack("<8sIIII", b"RAGKITKV", 1, 2**32 - 1, 0, 0) + bytes(100)
    assert reason_of(record, sample()) is MissReason.SHORT


def test_random_bytes_are_a_miss():
    content = random.Random(0).randbytes(9000)
    assert reason_of(content, sample()) is MissReason.HEADER


def test_a_missing_file_is_a_miss(tmp_path):
    with pytest.raises(KVMissError) as caught:
        FileSource(tmp_path / "gone.kv", 0, 10)
    assert caught.value.reason is MissReason.UNREADABLE
