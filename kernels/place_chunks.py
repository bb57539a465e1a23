# ruff: noqa: ANN001, ANN202 (Triton reads the annotations of kernels, and pointers have none)
# mypy: disable-error-code="no-untyped-def"
"""Put the stored KV of all chunks of a prompt into packed rows, one layer at a launch, however it is stored.

    row(c) + t  <-  x_ct                       stored as numbers
    row(c) + t  <-  code_ct * scale + zero     stored as codes (see quantize_kv for the groups)
    row(c) + t  <-  (level_ct + mean) * step   stored as streams (see place_streams)

The chunks' encoded bytes lie anywhere in one buffer; a table says where each layer of each chunk starts, so that a
layer is one launch however many chunks there are, and the host does nothing for any of them.

Source: groups of KIVI, arXiv 2402.02750, section 3; the numbers are those of dequantize_kv.
Cost: reads what is stored and writes the rows once; bandwidth bound.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ragkit.errors import KernelInputError
from ragkit.kernels.backend import Backend, ceil_div, jit, next_power_of_2, resolve_backend, tl
from ragkit.kernels.dequantize_kv import (
    dequantize_groups,
    dequantize_kv_torch,
    dequantize_rows,
    rows_of_a_program,
)
from ragkit.kernels.launched import launched
from ragkit.kernels.place_streams import launch_place_streams, place_streams_torch
from ragkit.kernels.placement_table import (
    SECTION_ALIGNMENT,
    TABLE_ROWS,
    ChunkFormat,
    PlacementTable,
    Section,
)
from ragkit.kernels.quantize_kv import QuantizedHeads
from ragkit.kernels.rans_tables import CHANNELS_PER_STREAM

_NUMBER_BYTES = 16384  # stored bytes of keys or values that one program reads


def place_chunks(
    stored: Tensor,
    table: PlacementTable,
    layer: int,
    form: ChunkFormat,
    keys: Tensor,
    values: Tensor,
    slots: Tensor | None = None,
    *,
    backend: Backend | None = None,
) -> None:
    """Write one layer of all chunks into `keys` and `values`.

    Args:
        stored: (bytes,) uint8, the encoded chunks; its start in memory and its size are multiples of 16.
        table: where they lie in it and where their rows go.
        layer: which row of `table.starts`.
        form: how the layer's bytes are to be read.
        keys, values: (rows, kv_heads, head_dim), contiguous, of any float type.
        slots: (rows,) int64, distinct rows of `keys` and `values` where row r goes; without it r goes to r.
        backend: an implementation to insist on.

    Raises:
        KernelInputError: shapes do not fit.
    """
    _check_inputs(stored, table, layer, form, keys, values, slots)
    if resolve_backend(keys, backend) is Backend.TORCH:
        place_chunks_torch(stored, table, layer, form, keys, values, slots)
        return
    if keys.numel() == 0 or len(table.tiles) == 0:
        return
    heads, head_dim = keys.shape[1:]
    if form.number is None and form.bits == 0:
        launch_place_streams(stored, table, layer, keys, values, slots)
        return
    target = keys if slots is None else slots
    if form.number is not None:
        width = heads * head_dim
        rows = min(TABLE_ROWS, max(1, _NUMBER_BYTES // next_power_of_2(width * form.number.itemsize)))
        _place_numbers_kernel[(len(table.tiles) * (TABLE_ROWS // rows), 2)](
            stored.view(form.number), table.starts, table.chunks, table.tiles, keys, values, target,
            layer, len(table.tokens),
            ITEM=form.number.itemsize, WIDTH=width, WIDTH_PADDED=next_power_of_2(width),
            ROWS=rows, PARTS=TABLE_ROWS // rows, HAS_SLOTS=slots is not None, num_warps=8,
        )  # fmt: skip
        return
    width = heads * head_dim * form.bits // 8
    rows = rows_of_a_program(width, min(form.token_group, TABLE_ROWS))
    _place_codes_kernel[(len(table.tiles) * (TABLE_ROWS // rows), 2)](
        stored, stored.view(torch.float16), table.starts, table.chunks, table.tiles, keys, values, target,
        layer, len(table.tokens),
        HEADS=heads, HEAD_DIM=head_dim, WIDTH=width, WIDTH_PADDED=next_power_of_2(width),
        TOKEN_GROUP=form.token_group, CHANNEL_GROUP=form.channel_group,
        VALUE_GROUPS_PADDED=next_power_of_2(rows * width // form.channel_group),
        ROWS=rows, PARTS=TABLE_ROWS // rows, FOUR_BITS=form.bits == 4, HAS_SLOTS=slots is not None, num_warps=4,
    )  # fmt: skip


def place_chunks_torch(
    stored: Tensor,
    table: PlacementTable,
    layer: int,
    form: ChunkFormat,
    keys: Tensor,
    values: Tensor,
    slots: Tensor | None = None,
) -> None:
    """Do what `place_chunks` does: the definition, chunk by chunk."""
    heads, head_dim = keys.shape[1:]
    if form.number is None and form.bits == 0:
        place_streams_torch(stored, table, layer, keys, values, slots)
        return
    starts = table.starts[layer].tolist()
    for start, first, tokens in zip(starts, table.first_rows, table.tokens, strict=True):
        sections = _split(stored, start, form.sections(tokens, heads, head_dim))
        for index, out in enumerate((keys, values)):
            if form.number is not None:
                numbers = sections[index].to(out.dtype)
            else:
                numbers = torch.empty((tokens, heads, head_dim), dtype=out.dtype, device=out.device)
                group = (form.token_group, 1)[index]
                dequantize_kv_torch(QuantizedHeads(*sections[3 * index : 3 * index + 3]), numbers, token_group=group)
            if slots is None:
                out[first : first + tokens] = numbers
            else:
                out[slots[first : first + tokens]] = numbers


def _split(stored: Tensor, start: int, sections: Sequence[Section]) -> list[Tensor]:
    parts = []
    for dtype, shape in sections:
        stop = start + torch.Size(shape).numel() * dtype.itemsize
        parts.append(stored[start:stop].view(dtype).view(shape))
        start = ceil_div(stop, SECTION_ALIGNMENT) * SECTION_ALIGNMENT
    return parts


def _check_inputs(
    stored: Tensor,
    table: PlacementTable,
    layer: int,
    form: ChunkFormat,
    keys: Tensor,
    values: Tensor,
    slots: Tensor | None,
) -> None:
    if keys.dim() != 3 or keys.shape != values.shape or keys.dtype != values.dtype:
        raise KernelInputError(
            f"keys and values must be (rows, kv_heads, head_dim) alike, got {tuple(keys.shape)}, {tuple(values.shape)}"
        )
    if not (keys.is_contiguous() and values.is_contiguous()):
        raise KernelInputError("keys and values must be contiguous")
    aligned = stored.data_ptr() % SECTION_ALIGNMENT == 0 and stored.numel() % SECTION_ALIGNMENT == 0
    if stored.dtype != torch.uint8 or stored.dim() != 1 or not stored.is_contiguous() or not aligned:
        raise KernelInputError("what is stored must be (bytes,) uint8 that starts and ends at a multiple of 16 bytes")
    if not 0 <= layer < len(table.starts):
        raise KernelInputError(f"the table has {len(table.starts)} layers, number {layer} was asked for")
    head_dim = keys.shape[2]
    if form.number is None and form.bits == 0 and (keys.shape[1] * head_dim) % CHANNELS_PER_STREAM:
        raise KernelInputError(f"streams of {CHANNELS_PER_STREAM} channels do not fit {keys.shape[1]} x {head_dim}")
    if form.bits and (
        form.bits not in (4, 8)
        or head_dim % 2
        or form.token_group & (form.token_group - 1)
        or (head_dim // 2) % form.channel_group
    ):
        raise KernelInputError(f"{form} does not fit heads of {head_dim}")
    if slots is None and table.end_row > len(keys):
        raise KernelInputError(f"the chunks take rows up to {table.end_row}, got {len(keys)}")
    if slots is not None and (slots.dim() != 1 or len(slots) < table.end_row or not slots.is_contiguous()):
        raise KernelInputError(f"slots must be ({table.end_row} or more,), got {tuple(slots.shape)}")


@jit
def _aligned(count):
    return (count + 15) // 16 * 16


# The layer and the number of chunks differ from call to call: no request waits for another compilation.
@launched(do_not_specialize=("layer", "num_chunks"))
def _place_numbers_kernel(
    number_ptr, start_ptr, chunk_ptr, tile_ptr, key_ptr, value_ptr, slot_ptr, layer, num_chunks,
    ITEM: tl.constexpr, WIDTH: tl.constexpr, WIDTH_PADDED: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr,
    HAS_SLOTS: tl.constexpr,
):  # fmt: skip
    # This program copies ROWS rows of the keys or of the values.
    tile, is_value = tl.program_id(0) // PARTS, tl.program_id(1)
    chunk = tl.load(tile_ptr + 2 * tile)
    first_row, tokens = tl.load(chunk_ptr + 2 * chunk), tl.load(chunk_ptr + 2 * chunk + 1)
    token = tl.load(tile_ptr + 2 * tile + 1) + tl.program_id(0) % PARTS * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH_PADDED)[None, :]
    is_token = token < tokens
    mask = is_token[:, None] & (column < WIDTH)
    start = tl.load(start_ptr + layer * num_chunks + chunk)
    start += is_value * _aligned(tokens.to(tl.int64) * (WIDTH * ITEM))
    source = number_ptr + tl.multiple_of(start // ITEM, 16 // ITEM)
    numbers = tl.load(source + token[:, None] * WIDTH + column, mask=mask, other=0.0)
    row = (first_row + token).to(tl.int64)
    if HAS_SLOTS:
        row = tl.load(slot_ptr + row, mask=is_token, other=0)
    out_ptr = value_ptr if is_value else key_ptr
    if ITEM == 4:
        numbers = numbers.to(tl.float32)
    tl.store(out_ptr + row[:, None] * WIDTH + column, numbers.to(out_ptr.dtype.element_ty), mask=mask)


@launched(do_not_specialize=("layer", "num_chunks"))
def _place_codes_kernel(
    code_ptr, half_ptr, start_ptr, chunk_ptr, tile_ptr, key_ptr, value_ptr, slot_ptr, layer, num_chunks,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, WIDTH_PADDED: tl.constexpr,
    TOKEN_GROUP: tl.constexpr, CHANNEL_GROUP: tl.constexpr, VALUE_GROUPS_PADDED: tl.constexpr,
    ROWS: tl.constexpr, PARTS: tl.constexpr, FOUR_BITS: tl.constexpr, HAS_SLOTS: tl.constexpr,
):  # fmt: skip
    # This program turns the codes of ROWS rows of the keys, which share their scales, or of the values.
    tile, is_value = tl.program_id(0) // PARTS, tl.program_id(1)
    chunk = tl.load(tile_ptr + 2 * tile)
    first_row, tokens = tl.load(chunk_ptr + 2 * chunk), tl.load(chunk_ptr + 2 * chunk + 1)
    first = tl.load(tile_ptr + 2 * tile + 1) + tl.program_id(0) % PARTS * ROWS
    start = tl.load(start_ptr + layer * num_chunks + chunk)
    count = tokens.to(tl.int64)
    code_bytes = _aligned(count * WIDTH)
    scale_bytes = _aligned((count + TOKEN_GROUP - 1) // TOKEN_GROUP * (HEADS * HEAD_DIM * 2))
    if is_value:
        start += code_bytes + 2 * scale_bytes
        scale_bytes = _aligned(count * (HEADS * HEAD_DIM // CHANNEL_GROUP * 2))
        dequantize_groups(
            code_ptr + tl.multiple_of(start, 16), half_ptr + tl.multiple_of((start + code_bytes) // 2, 8),
            half_ptr + tl.multiple_of((start + code_bytes + scale_bytes) // 2, 8), value_ptr, slot_ptr,
            first, first_row, tokens, HEADS, HEAD_DIM, WIDTH // HEADS, 1, CHANNEL_GROUP, VALUE_GROUPS_PADDED, ROWS,
            FOUR_BITS, HAS_SLOTS,
        )  # fmt: skip
    else:
        at = first // TOKEN_GROUP * (HEADS * HEAD_DIM)
        dequantize_rows(
            code_ptr + tl.multiple_of(start, 16), half_ptr + tl.multiple_of((start + code_bytes) // 2, 8) + at,
            half_ptr + tl.multiple_of((start + code_bytes + scale_bytes) // 2, 8) + at, key_ptr, slot_ptr,
            first, first_row, tokens, HEAD_DIM, WIDTH, WIDTH_PADDED, ROWS, FOUR_BITS, HAS_SLOTS, HEADS,
        )  # fmt: skip
