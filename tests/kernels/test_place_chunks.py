import pytest
import torch

from ragkit.errors import KernelInputError
from ragkit.kernels.backend import Backend
from ragkit.kernels.dequantize_kv import dequantize_kv
from ragkit.kernels.place_chunks import place_chunks, place_chunks_torch
from ragkit.kernels.placement_table import ChunkFormat, PlacementTable
from ragkit.kernels.quantize_kv import quantize_kv_torch
from ragkit.kernels.testing import CANARY, canaried
from ragkit.kvcache.codec_entropy import EntropyCodec
from ragkit.kvcache.layout import KVLayout, LayerSpec
from ragkit.models.model_config import RopeConfig

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FORMATS = {
    "fp32": ChunkFormat.numbers(torch.float32),
    "bf16": ChunkFormat.numbers(torch.bfloat16),
    "fp16": ChunkFormat.numbers(torch.float16),
    "int8": ChunkFormat.codes(8, 64, 8),
    "int4": ChunkFormat.codes(4, 32, 4),
    "int4 in small groups": ChunkFormat.codes(4, 4, 8),
    "streams": ChunkFormat.streams(),
}


def _encoded(x, form):
    """The bytes of one layer: sections behind each other, each at a multiple of 16."""
    keys, values = x
    if form == ChunkFormat.streams():
        layout = KVLayout((LayerSpec(*keys.shape[1:], RopeConfig()),), torch.float32)
        (data,) = EntropyCodec("entropy", layout, 1).encode([(keys, values)])
        return data
    if form.number is not None:
        parts = [keys.to(form.number), values.to(form.number)]
    else:
        parts = [
            *quantize_kv_torch(keys, bits=form.bits, token_group=form.token_group, channel_group=1),
            *quantize_kv_torch(values, bits=form.bits, token_group=1, channel_group=form.channel_group),
        ]
    out = [part.contiguous().view(torch.uint8).flatten() for part in parts]
    return torch.cat([torch.nn.functional.pad(part, (0, -len(part) % 16)) for part in out])


class Stored:
    """Two layers of chunks in one buffer, in another order than in the prompt, with gaps of garbage between them."""

    def __init__(self, sizes, form, device, rng, heads=3, head_dim=16, first_row=5):
        layers, self.starts, end = [], [], 48
        self.encoded = {}
        for chunk in reversed(range(len(sizes))):
            for layer in range(2):
                x = torch.randn(2, sizes[chunk], heads, head_dim, device=device, generator=rng)
                self.encoded[layer, chunk] = (end, _encoded(x, form))
                end += -(-len(self.encoded[layer, chunk][1]) // 64) * 64 + 64
        self.bytes = torch.full((end,), 0xFF, dtype=torch.uint8, device=device)  # NaN as a float of any size
        for start, data in self.encoded.values():
            self.bytes[start : start + len(data)] = data
        starts = [[self.encoded[layer, chunk][0] for chunk in range(len(sizes))] for layer in range(2)]
        firsts = [first_row + sum(sizes[:chunk]) for chunk in range(len(sizes))]
        layers = torch.tensor(starts, dtype=torch.int64).view(2, len(sizes))
        self.table = PlacementTable.build(firsts, sizes, layers, device)
        self.rows = first_row + sum(sizes)
        self.first_row = first_row


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, torch.bfloat16) for name in FORMATS),
        ("bf16", torch.float32),
        ("int4", torch.float16),
    ],
)
def test_every_row_is_the_definitions_and_no_other_is_touched(name, dtype, device, rng):
    stored = Stored((17, 0, 64, 1, 70), FORMATS[name], device, rng)
    shape = (stored.rows + 2, 3, 16)
    for layer in (0, 1):
        keys, check_keys = canaried(shape, dtype, device)
        values, check_values = canaried(shape, dtype, device)
        expected = [torch.full(shape, CANARY, dtype=dtype, device=device) for _ in range(2)]
        place_chunks(stored.bytes, stored.table, layer, FORMATS[name], keys, values, backend=Backend.TRITON)
        place_chunks_torch(stored.bytes, stored.table, layer, FORMATS[name], *expected)
        check_keys()
        check_values()
        for got, wanted in zip((keys, values), expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=torch.finfo(dtype).eps, atol=1e-6)
            assert bool((got[: stored.first_row] == CANARY).all())
            assert bool((got[stored.rows :] == CANARY).all())


@pytest.mark.parametrize("number", DTYPES)
def test_numbers_of_the_same_type_are_copied_bit_by_bit(number, device, rng):
    form = ChunkFormat.numbers(number)
    stored = Stored((40,), form, device, rng, first_row=0)
    keys, values = (torch.empty(40, 3, 16, dtype=number, device=device) for _ in range(2))
    place_chunks(stored.bytes, stored.table, 1, form, keys, values, backend=Backend.TRITON)
    _, data = stored.encoded[1, 0]
    assert torch.equal(torch.cat((keys, values)).view(torch.uint8).flatten(), data[: keys.nbytes * 2])


@pytest.mark.parametrize("bits", [4, 8])
def test_codes_become_the_very_numbers_of_the_kernel_for_one_chunk(bits, device, rng):
    x = torch.randn(2, 70, 2, 32, device=device, generator=rng)
    form = ChunkFormat.codes(bits, 32, 8)
    data = _encoded(x, form)
    table = PlacementTable.build([0], [70], torch.zeros(1, 1, dtype=torch.int64), device)
    got = torch.empty(2, 70, 2, 32, dtype=torch.bfloat16, device=device)
    place_chunks(data, table, 0, form, got[0], got[1], backend=Backend.TRITON)
    for heads, part, groups in ((x[0], got[0], (32, 1)), (x[1], got[1], (1, 8))):
        quantized = quantize_kv_torch(heads, bits=bits, token_group=groups[0], channel_group=groups[1])
        expected = torch.empty_like(part)
        dequantize_kv(quantized, expected, token_group=groups[0], backend=Backend.TRITON)
        assert torch.equal(part, expected)


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("bits", [0, 4, 8])
def test_every_head_size_fits(head_dim, bits, device, rng):
    form = ChunkFormat.codes(bits, 32, 8) if bits else ChunkFormat.numbers(torch.bfloat16)
    stored = Stored((33, 9), form, device, rng, heads=2, head_dim=head_dim, first_row=0)
    got, expected = (
        [torch.zeros(stored.rows, 2, head_dim, dtype=torch.bfloat16, device=device) for _ in range(2)] for _ in range(2)
    )
    place_chunks(stored.bytes, stored.table, 0, form, *got, backend=Backend.TRITON)
    place_chunks_torch(stored.bytes, stored.table, 0, form, *expected)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0.01, atol=1e-6)


@pytest.mark.parametrize("backend", list(Backend))
@pytest.mark.parametrize("name", ["bf16", "int8", "int4", "streams"])
def test_rows_go_to_their_slots(backend, name, device, rng):
    stored = Stored((20, 7), FORMATS[name], device, rng)
    plain = [torch.zeros(stored.rows, 3, 16, device=device) for _ in range(2)]
    place_chunks(stored.bytes, stored.table, 1, FORMATS[name], *plain, backend=backend)
    pools = [torch.full((64, 3, 16), CANARY, device=device) for _ in range(2)]
    slots = torch.randperm(64, device=device, generator=rng)[: stored.rows]
    place_chunks(stored.bytes, stored.table, 1, FORMATS[name], *pools, slots, backend=backend)
    wanted = slots[stored.first_row :]
    untouched = torch.ones(64, dtype=torch.bool, device=device)
    untouched[wanted] = False
    for pool, rows in zip(pools, plain, strict=True):
        assert torch.equal(pool[wanted], rows[stored.first_row :])
        assert bool((pool[untouched] == CANARY).all())


@pytest.mark.parametrize("backend", list(Backend))
def test_a_request_without_chunks_writes_nothing(backend, device):
    table = PlacementTable.build([], [], torch.zeros(2, 0, dtype=torch.int64), device)
    keys = torch.full((4, 2, 16), CANARY, device=device)
    stored = torch.empty(0, dtype=torch.uint8, device=device)
    place_chunks(stored, table, 0, FORMATS["int8"], keys, keys.clone(), backend=backend)
    assert bool((keys == CANARY).all())


def test_what_does_not_fit_is_refused(device, rng):
    form = FORMATS["int8"]
    stored = Stored((20,), form, device, rng)
    rows = torch.empty(stored.rows, 3, 16, device=device)
    with pytest.raises(KernelInputError, match="rows up to 25, got 24"):
        place_chunks(stored.bytes, stored.table, 0, form, rows[:-1], rows[:-1])
    with pytest.raises(KernelInputError, match="number 2 was asked for"):
        place_chunks(stored.bytes, stored.table, 2, form, rows, rows)
    with pytest.raises(KernelInputError, match="multiple of 16 bytes"):
        place_chunks(stored.bytes[1:], stored.table, 0, form, rows, rows)
    with pytest.raises(KernelInputError, match="does not fit heads of 16"):
        place_chunks(stored.bytes, stored.table, 0, ChunkFormat.codes(8, 64, 16), rows, rows)
    odd = torch.empty(stored.rows, 1, 2, device=device)
    with pytest.raises(KernelInputError, match="streams of 4 channels do not fit"):
        place_chunks(stored.bytes, stored.table, 0, ChunkFormat.streams(), odd, odd)
    with pytest.raises(KernelInputError, match="slots must be"):
        place_chunks(stored.bytes, stored.table, 0, form, rows, rows, torch.zeros(3, dtype=torch.int64, device=device))
    with pytest.raises(KernelInputError, match="starts must be multiples of 16"):
        PlacementTable.build([0], [4], torch.tensor([[8]]), device)
    with pytest.raises(KernelInputError, match="as many first rows"):
        PlacementTable.build([0, 1], [4], torch.tensor([[16]]), device)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 5])
def test_every_part_of_a_table_starts_where_kernels_expect_it(count, device):
    sizes = [70] * count
    firsts = [70 * chunk for chunk in range(count)]
    starts = torch.arange(3 * count).view(3, count) * 16
    table = PlacementTable.build(firsts, sizes, starts, device)
    assert torch.equal(table.starts.cpu(), starts)
    assert table.chunks.tolist() == [list(pair) for pair in zip(firsts, sizes, strict=True)]
    assert table.tiles.tolist() == [[chunk, first] for chunk in range(count) for first in (0, 64)]
    assert all(part.data_ptr() % 16 == 0 for part in (table.starts, table.chunks, table.tiles) if part.numel())
