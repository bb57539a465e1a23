"""Attention that reads blocks of codes: `paged_decode_attention` and `paged_selected_attention` over the same rows."""

import dataclasses
import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from ragkit.errors import KernelInputError
from ragkit.kernels.backend import Backend
from ragkit.kernels.paged_decode_attention import (
    DecodeTile,
    launch_paged_decode_attention,
    paged_decode_attention,
    paged_decode_attention_torch,
)
from ragkit.kernels.paged_rows import FIELD_ROWS, HIDDEN
from ragkit.kernels.paged_selected_attention import paged_selected_attention, paged_selected_attention_torch
from ragkit.kernels.quantize_kv import quantize_kv_torch
from ragkit.kernels.quantized_blocks import QuantizedBlocks
from ragkit.kernels.testing import assert_matches, guarded

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BLOCK = 64
KINDS = ((8, 64), (4, 32))  # bits and group of the int8 and int4 codecs
SCALE = 0.125


@dataclass
class Rows:
    """Rows of several requests in scattered blocks, as codes and as plain numbers.

    Attributes:
        tables: what both kernels take between the pools and the queries' positions.
        plain: the pools of numbers from which the codes were made; NaN where no row is.
    """

    keys: QuantizedBlocks
    values: QuantizedBlocks
    plain: tuple[Tensor, Tensor]
    tables: tuple[Tensor, Tensor, Tensor]
    cos: Tensor
    sin: Tensor
    lengths: tuple[int, ...]


def _blocks(numbers, written, bits, row_group, channel_group, device):
    """Codes of `written` rows of a pool; the largest code and NaN scales everywhere else, and around the pool."""
    pool = QuantizedBlocks.empty(numbers.shape, bits, row_group, channel_group, device)
    for part, garbage in ((pool.codes, 255), (pool.scales, math.nan), (pool.zeros, math.nan)):
        part.fill_(garbage)
    flat = pool.heads()
    for blocks, length in written:
        for first in range(0, length, BLOCK):
            own, count = int(blocks[first // BLOCK]), min(BLOCK, length - first)
            groups = own * (BLOCK // row_group) + torch.arange(-(-count // row_group), device=device)
            quantize_kv_torch(
                numbers[own, :count], bits=bits, token_group=row_group, channel_group=channel_group,
                out=flat, slots=groups,
            )  # fmt: skip
    codes = guarded(pool.codes, 255)
    return QuantizedBlocks(codes, guarded(pool.scales), guarded(pool.zeros), bits)


def _rows(lengths, bits, group, kv_heads, head_dim, device, rng):
    requests, entries = len(lengths), max(-(-length // BLOCK) for length in lengths) + 1
    blocks = requests * entries
    table = torch.randperm(blocks, device=device, generator=rng).int().view(requests, entries)
    positions = torch.full((requests, entries * BLOCK), HIDDEN, dtype=torch.int32, device=device)
    plain = [torch.full((blocks, BLOCK, kv_heads, head_dim), math.nan, device=device) for _ in range(2)]
    for index, length in enumerate(lengths):
        positions[index, :length] = torch.arange(length, device=device)
        rows = (table[index].long().unsqueeze(1) * BLOCK + torch.arange(BLOCK, device=device)).flatten()[:length]
        for pool in plain:
            pool.flatten(0, 1)[rows] = torch.randn(length, kv_heads, head_dim, device=device, generator=rng)
    plain[0][..., 1] = plain[0][..., 1] * 2 + 5  # keys before RoPE have such channels
    written = list(zip(table, lengths, strict=True))
    half = head_dim // 2
    keys = _blocks(plain[0], written, bits, group, 1, device)
    values = _blocks(plain[1], written, bits, 1, min(group, half & -half), device)
    counts = torch.tensor([-(-length // BLOCK) for length in lengths], dtype=torch.int32, device=device)
    angles = torch.rand(max(*lengths, 1), half, device=device, generator=rng) * 6
    return Rows(
        keys, values, (plain[0], plain[1]), (table, positions.view(requests, entries, BLOCK), counts),
        guarded(angles.cos()), guarded(angles.sin()), tuple(lengths),
    )  # fmt: skip


def _fields(rows, dtype, rng):
    """A field of every entry's rows, for keys and for values; NaN behind the entries of a request."""
    table, _, counts = rows.tables
    shape = (*table.shape, BLOCK // FIELD_ROWS, *rows.keys.shape[2:])
    fields = {}
    for name in ("key_field", "value_field"):
        field = torch.randn(shape, device=rng.device, generator=rng).to(dtype)
        field[torch.arange(shape[1], device=rng.device) >= counts.unsqueeze(1)] = math.nan
        fields[name] = guarded(field)
    return fields


class Decode:
    """One query a request, behind its last row."""

    def __init__(self, rows, q_heads, dtype, rng):
        size = (len(rows.lengths), q_heads, rows.keys.shape[3])
        self.queries = guarded(torch.randn(size, device=rng.device, generator=rng).to(dtype))
        self.positions = torch.tensor([max(length - 1, 0) for length in rows.lengths], device=rng.device)

    def attend(self, rows, pools=None, backend=Backend.TRITON, **fields):
        return paged_decode_attention(
            self.queries, *(pools or (rows.keys, rows.values)), *rows.tables, self.positions, rows.cos, rows.sin,
            **fields, scale=SCALE, backend=backend,
        )  # fmt: skip

    def expected(self, rows, pools=None, **fields):
        return paged_decode_attention_torch(
            self.queries.float(), *(pools or (rows.keys, rows.values)), *rows.tables, self.positions,
            rows.cos, rows.sin, **{name: field.float() for name, field in fields.items()}, scale=SCALE,
        )  # fmt: skip


class Selected:
    """Up to nine scattered queries a request."""

    def __init__(self, rows, q_heads, dtype, rng):
        chosen = [torch.randperm(length, device=rng.device, generator=rng)[:9].sort().values for length in rows.lengths]
        counts = [0, *(len(part) for part in chosen)]
        size = (sum(counts), q_heads, rows.keys.shape[3])
        self.queries = guarded(torch.randn(size, device=rng.device, generator=rng).to(dtype))
        self.positions = guarded(torch.cat(chosen).int(), 10**6)
        self.cu_queries = torch.tensor(counts, device=rng.device).cumsum(0).int()

    def attend(self, rows, pools=None, backend=Backend.TRITON, **fields):
        return paged_selected_attention(
            self.queries, *(pools or (rows.keys, rows.values)), *rows.tables, self.positions, self.cu_queries,
            rows.cos, rows.sin, **fields, scale=SCALE, backend=backend,
        )  # fmt: skip

    def expected(self, rows, pools=None, **fields):
        return paged_selected_attention_torch(
            self.queries.float(), *(pools or (rows.keys, rows.values)), *rows.tables, self.positions,
            self.cu_queries, rows.cos, rows.sin, **{name: field.float() for name, field in fields.items()},
            scale=SCALE,
        )  # fmt: skip


@pytest.fixture(params=[Decode, Selected])
def kernel(request):
    return request.param


def _compare(rows, attention, **fields):
    assert_matches(attention.attend(rows, **fields), attention.expected(rows, **fields), reduced=4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits", "group"), KINDS)
@pytest.mark.parametrize("lengths", [(1, 0, 31, 64), (65, 97)])
def test_matches_the_definition(kernel, lengths, bits, group, dtype, device, rng):
    rows = _rows(lengths, bits, group, 2, 32, device, rng)
    _compare(rows, kernel(rows, 6, dtype, rng))


@pytest.mark.parametrize(
    ("q_heads", "kv_heads", "head_dim"), [(8, 2, 64), (9, 3, 80), (4, 4, 96), (8, 4, 128), (20, 1, 64)]
)
@pytest.mark.parametrize(("bits", "group"), KINDS)
def test_matches_the_definition_for_every_head_size_and_group(
    kernel, q_heads, kv_heads, head_dim, bits, group, device, rng
):
    rows = _rows((70, 7), bits, group, kv_heads, head_dim, device, rng)
    _compare(rows, kernel(rows, q_heads, torch.float32, rng))


@pytest.mark.parametrize(("bits", "group"), [(8, 16), (4, 64), (4, 16)])
def test_matches_the_definition_for_other_groups(kernel, bits, group, device, rng):
    rows = _rows((150, 20), bits, group, 2, 64, device, rng)
    _compare(rows, kernel(rows, 4, torch.float32, rng))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits", "group", "head_dim"), [(8, 64, 32), (4, 32, 48)])
def test_matches_the_definition_with_a_field(kernel, head_dim, bits, group, dtype, device, rng):
    rows = _rows((70, 0, 64), bits, group, 2, head_dim, device, rng)
    _compare(rows, kernel(rows, 6, dtype, rng), **_fields(rows, dtype, rng))


@pytest.mark.parametrize("backend", list(Backend))
@pytest.mark.parametrize(("bits", "group", "bound"), [(8, 64, 0.02), (4, 32, 0.25)])
def test_differs_from_attention_over_the_numbers_by_what_quantisation_costs(
    kernel, bits, group, bound, backend, device, rng
):
    rows = _rows((150, 33), bits, group, 2, 64, device, rng)
    attention = kernel(rows, 6, torch.float32, rng)
    exact = attention.expected(rows, rows.plain)
    error = attention.attend(rows, backend=backend) - exact
    typical = float(error.square().mean().sqrt() / exact.square().mean().sqrt())
    assert bound / 20 <= typical <= bound
    assert float(error.abs().max() / exact.abs().max()) <= 2 * bound


@pytest.mark.parametrize("backend", list(Backend))
@pytest.mark.parametrize(("bits", "group"), KINDS)
def test_numbers_that_are_codes_already_give_the_same_as_plain_blocks(kernel, bits, group, backend, device, rng):
    rows = _rows((130, 70), bits, group, 2, 32, device, rng)
    attention = kernel(rows, 6, torch.float32, rng)
    every = torch.arange(rows.keys.codes.shape[0] * BLOCK, device=device)
    pools = [blocks.rows(every).view(blocks.shape) for blocks in (rows.keys, rows.values)]
    assert_matches(attention.attend(rows, backend=backend), attention.attend(rows, pools, backend), reduced=4)


@pytest.mark.parametrize("backend", list(Backend))
@pytest.mark.parametrize(("bits", "group"), KINDS)
def test_hidden_rows_count_for_nothing_whatever_their_codes(kernel, bits, group, backend, device, rng):
    rows = _rows((200,), bits, group, 2, 32, device, rng)
    attention = kernel(rows, 4, torch.float32, rng)
    table, positions, _ = rows.tables
    positions[0, 1, 10:50] = HIDDEN
    before = attention.attend(rows, backend=backend)
    own = int(table[0, 1])
    rows.keys.codes[own, 10:50], rows.values.codes[own, 10:50] = 255, 255
    rows.values.scales[own, 10:50], rows.values.zeros[own, 10:50] = math.nan, math.inf
    assert torch.equal(attention.attend(rows, backend=backend), before)
    assert_matches(before, attention.expected(rows), reduced=4)


@pytest.mark.parametrize("backend", list(Backend))
@pytest.mark.parametrize(("bits", "group"), KINDS)
def test_blocks_are_shared_by_requests_at_different_positions(kernel, bits, group, backend, device, rng):
    rows = _rows((128, 192), bits, group, 2, 32, device, rng)
    table = rows.tables[0]
    table[1, 1:3] = table[0, :2]  # the first request's rows, 64 positions later
    attention = kernel(rows, 4, torch.float32, rng)
    assert_matches(attention.attend(rows, backend=backend), attention.expected(rows), reduced=4)


@pytest.mark.parametrize("backend", list(Backend))
def test_a_request_that_sees_nothing_gives_zeros(kernel, backend, device, rng):
    rows = _rows((70, 5), 4, 32, 2, 32, device, rng)
    rows.tables[1][0] = HIDDEN
    attention = kernel(rows, 4, torch.float32, rng)
    got, expected = attention.attend(rows, backend=backend), attention.expected(rows)
    assert bool((expected == 0).flatten(1).all(1).any())
    assert torch.equal(got == 0, expected == 0)


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("with_field", [False, True])
@pytest.mark.parametrize("bits", [0, 8, 4])
def test_heads_that_share_a_program_keep_to_their_own_rows(heads, with_field, bits, device, rng):
    rows = _rows((70, 5), bits or 8, 32, 4, 32, device, rng)
    pools = (rows.keys, rows.values) if bits else [pool.nan_to_num(0.0) for pool in rows.plain]
    attention = Decode(rows, 12, torch.float32, rng)
    fields = _fields(rows, torch.float32, rng) if with_field else {}
    got = launch_paged_decode_attention(
        attention.queries, *pools, *rows.tables, attention.positions, rows.cos, rows.sin,
        **fields, scale=SCALE, tile=DecodeTile(heads, 32, 4, 2),
    )  # fmt: skip
    assert_matches(got, attention.expected(rows, pools, **fields), reduced=4)


def _changed(rows, **parts):
    return dataclasses.replace(rows, **parts)


def test_pools_that_are_not_stored_alike_are_refused(kernel, device, rng):
    rows = _rows((70, 5), 8, 64, 2, 32, device, rng)
    four = _rows((70, 5), 4, 64, 2, 32, device, rng)
    attention = kernel(rows, 4, torch.float32, rng)
    with pytest.raises(KernelInputError, match="both be numbers or both be codes"):
        attention.attend(rows, (rows.keys, rows.plain[1]))
    with pytest.raises(KernelInputError, match="equally many bits, got 8 and 4 bits"):
        attention.attend(_changed(rows, values=four.values))
    with pytest.raises(KernelInputError, match="channel by channel and values row by row"):
        attention.attend(_changed(rows, keys=rows.values))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda codes, scales: (codes.short(), scales, 8), "codes must be"),
        (lambda codes, scales: (codes, scales, 3), "codes must be"),
        (lambda codes, scales: (codes, scales[:1], 8), r"scales .* do not fit codes"),
        (lambda codes, scales: (codes, scales[..., :12], 8), r"scales .* do not fit codes"),
        (lambda codes, scales: (codes.transpose(1, 2), scales.transpose(1, 2), 8), r"scales .* do not fit codes"),
        (lambda codes, scales: (codes[..., :16], scales[..., :16], 8), "must be contiguous"),
    ],
)
def test_blocks_whose_parts_do_not_fit_are_refused(change, message, device):
    blocks = QuantizedBlocks.empty((3, 64, 2, 32), 8, 64, 1, device)
    codes, scales, bits = change(blocks.codes, blocks.scales)
    with pytest.raises(KernelInputError, match=message):
        QuantizedBlocks(codes, scales, scales, bits)
