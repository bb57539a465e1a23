import itertools

import pytest
import torch
from kv_samples import chunk_of, ref_of

from ragkit.kvcache import encoded_rows
from ragkit.kvcache.codec import encode_chunk
from ragkit.kvcache.codecs import make_codec
from ragkit.kvcache.copy_queue import CopyQueue
from ragkit.kvcache.encoded_rows import EncodedRows, StoredRows
from ragkit.kvcache.layout import KVLayout, LayerSpec
from ragkit.kvcache.pool import KVPool
from ragkit.models.model_config import RopeConfig

CPU = torch.device("cpu")
LAYOUT = KVLayout((LayerSpec(2, 16, RopeConfig()),) * 11, torch.float32)
SIZES = (20, 7, 33)


class Recorded(CopyQueue):
    """A queue that writes down what happens in which order."""

    def __init__(self):
        super().__init__(CPU)
        self.events = []

    def add(self, job):
        number = len(self._jobs)
        return super().add(lambda: (self.events.append(number), job()))


def rows_of(codec_name="bf16", queue=None):
    codec = make_codec(codec_name, LAYOUT)
    chunks = [chunk_of(ref_of(name, size), LAYOUT) for name, size in zip("abc", SIZES, strict=True)]
    encoded = [encode_chunk(codec, chunk, "chunk") for chunk in chunks]
    firsts = (5, 25, 32)
    stored = [StoredRows(e.data, e.extents, row, e.num_tokens) for e, row in zip(encoded, firsts, strict=True)]
    decoded = [codec.decode([one.layer(layer) for layer in range(11)], one.num_tokens) for one in encoded]
    return EncodedRows(stored, codec, queue or CopyQueue(CPU), CPU), decoded


def empty():
    return torch.full((70, 2, 16), 7.0), torch.full((70, 2, 16), 7.0)


@pytest.mark.parametrize("layer_bytes", [100, 5000, 10_000_000])
@pytest.mark.parametrize("num_layers", [1, 2, 11, 32])
def test_groups_cover_every_layer_in_order_and_start_small(num_layers, layer_bytes):
    groups = encoded_rows._groups(num_layers, layer_bytes, False)
    assert [layer for start, stop in groups for layer in range(start, stop)] == list(range(num_layers))
    assert groups[0] == (0, 1)
    sizes = [stop - start for start, stop in groups]
    assert all(after <= 2 * before for before, after in itertools.pairwise(sizes))
    if layer_bytes > encoded_rows._COPY_BYTES:
        assert set(sizes) == {1}
    assert encoded_rows._groups(num_layers, layer_bytes, True) == [(0, num_layers)]


@pytest.mark.parametrize("codec", ["bf16", "int8", "entropy2"])
def test_layers_are_placed_in_any_order_and_other_rows_are_left_alone(codec, monkeypatch):
    monkeypatch.setattr(encoded_rows, "_COPY_BYTES", 4000)
    encoded, decoded = rows_of(codec)
    for layer in (10, 0, 3, 3):
        keys, values = empty()
        encoded.place(layer, keys, values)
        assert torch.equal(keys[5:65], torch.cat([chunk[layer][0] for chunk in decoded]))
        assert torch.equal(values[5:65], torch.cat([chunk[layer][1] for chunk in decoded]))
        assert bool((keys[:5] == 7).all() and (keys[65:] == 7).all())


def test_copies_are_issued_in_order_and_a_few_ahead(monkeypatch):
    monkeypatch.setattr(encoded_rows, "_COPY_BYTES", 1)
    queue = Recorded()
    first, _ = rows_of(queue=queue)
    second, _ = rows_of("int4", queue)
    assert queue.events == []
    queue.start()
    assert queue.events == [0, 1, 2]
    first.place(2, *empty())
    assert queue.events == list(range(6))
    first.place(0, *empty())
    assert queue.events == list(range(6))
    second.place(4, *empty())
    assert queue.events == list(range(19))
    second.place(10, *empty())
    assert queue.events == list(range(22))


def test_what_nobody_asked_for_goes_behind_the_rest_and_still_comes(monkeypatch):
    monkeypatch.setattr(encoded_rows, "_COPY_BYTES", 1)
    queue = Recorded()
    draft, _ = rows_of("int4", queue)
    rows, _ = rows_of(queue=queue)
    draft.place(1, *empty())
    assert queue.events == [0, 1, 2, 3, 4]
    draft.postpone()
    rows.place(0, *empty())
    assert queue.events == [0, 1, 2, 3, 4, 11, 12, 13, 14]
    rows.place(10, *empty())
    assert queue.events[5:] == [*range(11, 22), 5, 6, 7]
    draft.place(9, *empty())
    assert queue.events[5:] == [*range(11, 22), *range(5, 11)]


def test_some_chunks_go_into_a_pool():
    encoded, decoded = rows_of("int4")
    pool = KVPool(LAYOUT, 4, CPU, 16)
    slots = torch.randperm(64, generator=torch.Generator().manual_seed(0))[: 20 + 33]
    encoded.place_into_pool(pool, [0, 2], slots)
    for layer in (0, 10):
        for side, got in enumerate(pool.rows(layer, slots)):
            assert torch.equal(got, torch.cat([decoded[index][layer][side] for index in (0, 2)]))


def test_the_bytes_of_a_chunk_are_a_copy_with_extents_of_their_own():
    encoded, decoded = rows_of("int8")
    copied = encoded.bytes_of(1)
    codec = make_codec("int8", LAYOUT)
    layers = codec.decode([copied.data[start:stop] for start, stop in copied.extents], SIZES[1])
    assert copied.extents[0][0] == 0
    assert all(torch.equal(a, b) for x, y in zip(layers, decoded[1], strict=True) for a, b in zip(x, y, strict=True))
    copied.data.zero_()
    keys, values = empty()
    encoded.place(0, keys, values)
    assert torch.equal(keys[25:32], decoded[1][0][0])
