# ruff: noqa: ANN001, ANN201, ANN202 (Triton reads the annotations of kernels, and pointers have none)
# mypy: disable-error-code="no-untyped-def"
"""The rows of a request's blocks as attention reads them: corrected by a coarse field, and rotated to their positions.

    k'_j = R(p_j) (k_j + key_field[j // 16]),   v'_j = v_j + value_field[j // 16]      j: row within its block

Blocks belong to several requests and hold what the chunk's rows are on their own. What a request changes about them
stays beside them: a row's true position, `HIDDEN` where another row replaces it, and a field of one vector for every
`FIELD_ROWS` rows that moves the rows not recomputed with those that are.

A block holds numbers, or codes with x = code * scale + zero, which become numbers in registers (see QuantizedBlocks).

Source: blocks of PagedAttention, arXiv 2309.06180; rotation: RoFormer, arXiv 2104.09864, section 3.4.2; the field is
this project's own (change propagation).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ragkit.errors import KernelInputError
from ragkit.kernels.backend import jit, tl
from ragkit.kernels.quantized_blocks import QuantizedBlocks
from ragkit.kernels.rotation import rotate_into

HIDDEN = 2**31 - 1  # position of a row that no query may see
FIELD_ROWS = 16  # rows of a block that share one vector of a field

Blocks = Tensor | QuantizedBlocks  # (blocks, block_size, kv_heads, head_dim), contiguous


def visible_rows_torch(
    key_pool: Blocks,
    value_pool: Blocks,
    block_table: Tensor,
    row_positions: Tensor,
    last_position: int,
    cos: Tensor,
    sin: Tensor,
    key_field: Tensor | None = None,
    value_field: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return positions (rows,) int64, and keys and values (rows, kv_heads, head_dim) fp32: the definition.

    Args:
        key_pool, value_pool: (blocks, block_size, kv_heads, head_dim), keys un-rotated, numbers or codes.
        block_table: (entries,) blocks of one request.
        row_positions: (entries, block_size) position of each row, or `HIDDEN`.
        last_position: rows behind it are left out.
        cos, sin: (positions, head_dim / 2) fp32.
        key_field, value_field: (entries, block_size / FIELD_ROWS, kv_heads, head_dim).
    """
    positions = row_positions.flatten()
    seen = (positions <= last_position).nonzero().squeeze(1)
    at = positions[seen].long()
    size = row_positions.shape[1]
    slots = block_table.long()[seen // size] * size + seen % size
    keys, values = _rows(key_pool, slots), _rows(value_pool, slots)
    if key_field is not None and value_field is not None:
        keys = keys + key_field.flatten(0, 1)[seen // FIELD_ROWS].float()
        values = values + value_field.flatten(0, 1)[seen // FIELD_ROWS].float()
    turned = torch.empty_like(keys)
    rotate_into(turned, keys, cos[at], sin[at])
    return at, turned, values


def entry_bases(row_positions: Tensor) -> Tensor:
    """Return (requests, entries) int32: where the first row of each entry stands, if its rows stand behind each other.

    Hidden rows do not matter. It is -1 where rows are in another order.

    Args:
        row_positions: (requests, entries, block_size) int32, position of each row, or `HIDDEN`.
    """
    first = row_positions - torch.arange(row_positions.shape[2], dtype=torch.int32, device=row_positions.device)
    hidden = row_positions == HIDDEN
    low, high = first.masked_fill(hidden, HIDDEN).amin(-1), first.masked_fill(hidden, -1).amax(-1)
    return torch.where((low == high) | (low == HIDDEN), high.clamp(min=-1), -1)


def _rows(pool: Blocks, slots: Tensor) -> Tensor:
    return pool.rows(slots) if isinstance(pool, QuantizedBlocks) else pool.flatten(0, 1)[slots].float()


def parts_of(pool: Blocks) -> tuple[Tensor, Tensor, Tensor]:
    """Return what kernels get of a pool: its codes, scales and zeros, or its numbers three times."""
    return (pool.codes, pool.scales, pool.zeros) if isinstance(pool, QuantizedBlocks) else (pool, pool, pool)


def stored_as(key_pool: Blocks, value_pool: Blocks) -> tuple[int, int, int]:
    """Return the bits of a code, 0 for numbers, the rows that share a key's scale, and the channels a value's."""
    if isinstance(key_pool, QuantizedBlocks) and isinstance(value_pool, QuantizedBlocks):
        return key_pool.bits, key_pool.row_group, value_pool.channel_group
    return 0, key_pool.shape[1], 1


def check_paged_rows(
    queries: Tensor,
    requests: int,
    key_pool: Blocks,
    value_pool: Blocks,
    block_tables: Tensor,
    row_positions: Tensor,
    num_entries: Tensor,
    cos: Tensor,
    sin: Tensor,
    key_field: Tensor | None,
    value_field: Tensor | None,
) -> None:
    """Raise `KernelInputError` unless these are rows of `requests` requests that `queries` can attend to."""
    if queries.dim() != 3 or (queries.numel() and queries.stride()[1:] != (queries.shape[2], 1)):
        raise KernelInputError(f"queries must be (tokens, heads, head_dim), got {tuple(queries.shape)}")
    q_heads, head_dim = queries.shape[1:]
    if len(key_pool.shape) != 4 or key_pool.shape != value_pool.shape or key_pool.shape[3] != head_dim:
        raise KernelInputError(
            f"pools must be (blocks, block_size, kv_heads, {head_dim}) alike, "
            f"got {tuple(key_pool.shape)}, {tuple(value_pool.shape)}"
        )
    _check_stored_alike(key_pool, value_pool)
    block_size, kv_heads = key_pool.shape[1:3]
    if kv_heads == 0 or q_heads % kv_heads:
        raise KernelInputError(f"{q_heads} query heads cannot share {kv_heads} key heads")
    entries = block_tables.shape[-1]
    shapes = (block_tables.shape, row_positions.shape, num_entries.shape)
    if shapes != ((requests, entries), (requests, entries, block_size), (requests,)):
        raise KernelInputError(f"tables must be of {requests} requests, got {[tuple(shape) for shape in shapes]}")
    if block_tables.numel() and not (block_tables.is_contiguous() and row_positions.is_contiguous()):
        raise KernelInputError("block_tables and row_positions must be contiguous")
    if cos.shape != sin.shape or cos.shape[-1] * 2 != head_dim or not (cos.is_contiguous() and sin.is_contiguous()):
        raise KernelInputError(f"cos and sin must be (positions, {head_dim // 2}), got {tuple(cos.shape)}")
    if (key_field is None) != (value_field is None):
        raise KernelInputError("key_field and value_field are given together or not at all")
    expected = (requests, entries, block_size // FIELD_ROWS, kv_heads, head_dim)
    for field in (key_field, value_field):
        if field is not None and (field.shape != expected or block_size % FIELD_ROWS or not field.is_contiguous()):
            raise KernelInputError(f"a field must be {expected}, contiguous, got {tuple(field.shape)}")


def _check_stored_alike(key_pool: Blocks, value_pool: Blocks) -> None:
    if isinstance(key_pool, QuantizedBlocks) and isinstance(value_pool, QuantizedBlocks):
        rows, channels = key_pool.row_group, value_pool.channel_group
        if key_pool.bits != value_pool.bits or key_pool.channel_group != 1 or value_pool.row_group != 1:
            raise KernelInputError(
                "keys must be quantised channel by channel and values row by row, to equally many bits, "
                f"got {key_pool.bits} and {value_pool.bits} bits"
            )
        if rows & (rows - 1) or channels & (channels - 1):
            raise KernelInputError(f"rows and channels of a group must be powers of two, got {rows} and {channels}")
        return
    if isinstance(key_pool, QuantizedBlocks) or isinstance(value_pool, QuantizedBlocks):
        raise KernelInputError("keys and values must both be numbers or both be codes")
    if not (key_pool.is_contiguous() and value_pool.is_contiguous()):
        raise KernelInputError("pools must be contiguous")


@jit
def channels_of(dim, HALF: tl.constexpr, HALF_PADDED: tl.constexpr):
    """Return the channel of each column and whether it has one: columns are two halves of a head, padded alike."""
    if HALF == HALF_PADDED:
        return dim, dim < 2 * HALF
    return dim // HALF_PADDED * HALF + dim % HALF_PADDED, dim % HALF_PADDED < HALF


@jit
def load_angles(cos_ptr, sin_ptr, position, seen, half, HALF: tl.constexpr):
    """Return cosines and sines (ROWS, HALF_PADDED) of the rows' positions; zeros where a row is not seen."""
    mask = seen[:, None] & (half < HALF)[None, :]
    angle = tl.where(seen, position, 0)[:, None] * HALF + half[None, :]
    return tl.load(cos_ptr + angle, mask=mask, other=0.0), tl.load(sin_ptr + angle, mask=mask, other=0.0)


@jit
def load_near_angles(cos_ptr, sin_ptr, half, ROWS: tl.constexpr, HALF: tl.constexpr, ADDS_ANGLES: tl.constexpr):
    """Return cosines and sines (ROWS, HALF_PADDED) that `row_angles` adds, nothing if it does not."""
    near_cos, near_sin = tl.zeros((1, 1), tl.float32), tl.zeros((1, 1), tl.float32)
    if ADDS_ANGLES:
        near = tl.arange(0, ROWS)[:, None] * HALF + half[None, :]
        mask = (half < HALF)[None, :]
        at_zero = tl.load(cos_ptr)  # the factor of the table, which a product of two of its numbers has twice
        near_cos = tl.load(cos_ptr + near, mask=mask, other=0.0) / at_zero
        near_sin = tl.load(sin_ptr + near, mask=mask, other=0.0) / at_zero
    return near_cos, near_sin


@jit
def row_angles(
    cos_ptr, sin_ptr, base_ptr, first_row, last, position, seen, near_cos, near_sin, half,
    HALF: tl.constexpr, ADDS_ANGLES: tl.constexpr,
):  # fmt: skip
    """Return cosines and sines (ROWS, HALF_PADDED) of a tile's rows.

    They are looked up as `load_angles` does, or come of those of its first row: R(p + r) = R(p) R(r).

    Args:
        base_ptr: where the first row of the entry stands, below 0 if its rows do not stand behind each other.
        first_row: of the tile, in its entry.
        last: a position that no row seen is behind.
        near_cos, near_sin: what `load_near_angles` returns.
        ADDS_ANGLES: whether there are bases.
    """
    if ADDS_ANGLES:
        base = tl.load(base_ptr)
        if base >= 0:
            far = tl.minimum(base + first_row, last) * HALF + half  # of a tile that is seen the former
            far_cos = tl.load(cos_ptr + far, mask=half < HALF, other=0.0)[None, :]
            far_sin = tl.load(sin_ptr + far, mask=half < HALF, other=0.0)[None, :]
            cos = far_cos * near_cos - far_sin * near_sin
            sin = far_sin * near_cos + far_cos * near_sin
        else:
            cos, sin = load_angles(cos_ptr, sin_ptr, position, seen, half, HALF)
    else:
        cos, sin = load_angles(cos_ptr, sin_ptr, position, seen, half, HALF)
    return cos, sin


@jit
def load_key_halves(
    key_ptr, scale_ptr, zero_ptr, row_at, group_at, seen, half,
    HALF: tl.constexpr, BITS: tl.constexpr, BY_FOURS: tl.constexpr,
):  # fmt: skip
    """Return both halves (ROWS, HALF_PADDED) of one head's keys as they lie, fp32.

    Of a row not seen they may be anything. `row_at` and `group_at` are those of `load_rotated_keys`. A thread that
    holds sixteen codes of one row meets as many scales. `BY_FOURS`, fours of several rows share theirs: for kernels
    that read all codes so.
    """
    is_channel = half < HALF
    mask = seen[:, None] & is_channel[None, :]
    at = key_ptr + row_at[:, None] * (HALF if BITS == 4 else 2 * HALF)
    at += (half // 4 * 4 + half % 4 if BY_FOURS else half)[None, :]
    if BITS == 4:
        packed = tl.load(at, mask=mask, other=0)
        left, right = (packed & 15).to(tl.float32), (packed >> 4).to(tl.float32)
    else:
        left = tl.load(at, mask=mask, other=0).to(tl.float32)
        right = tl.load(at + HALF, mask=mask, other=0).to(tl.float32)
    if BITS > 0:
        group = group_at * (2 * HALF) + half
        scale = tl.load(scale_ptr + group, mask=is_channel, other=0.0).to(tl.float32)
        zero = tl.load(zero_ptr + group, mask=is_channel, other=0.0).to(tl.float32)
        left = left * scale[None, :] + zero[None, :]
        scale = tl.load(scale_ptr + group + HALF, mask=is_channel, other=0.0).to(tl.float32)
        zero = tl.load(zero_ptr + group + HALF, mask=is_channel, other=0.0).to(tl.float32)
        right = right * scale[None, :] + zero[None, :]
    return left, right


@jit
def load_value_halves(value_ptr, row_at, seen, half, HALF: tl.constexpr, BITS: tl.constexpr, NUMBER: tl.constexpr):
    """Return both halves (ROWS, HALF_PADDED) of one head's values, or of their codes, as NUMBERs.

    NUMBERs hold codes exactly. They are zeros where a row is not seen. `row_at` is that of `load_rotated_keys`.
    """
    mask = seen[:, None] & (half < HALF)[None, :]
    at = value_ptr + row_at[:, None] * (HALF if BITS == 4 else 2 * HALF)
    at += (half // 4 * 4 + half % 4 if BITS > 0 else half)[None, :]  # by fours, as keys
    if BITS == 4:
        packed = tl.load(at, mask=mask, other=0)
        # The interpreter turns bytes into bf16 by way of fp32 alone.
        return (packed & 15).to(tl.float32).to(NUMBER), (packed >> 4).to(tl.float32).to(NUMBER)
    first, second = tl.load(at, mask=mask, other=0), tl.load(at + HALF, mask=mask, other=0)
    if BITS == 8:
        first, second = first.to(tl.float32), second.to(tl.float32)
    return first.to(NUMBER), second.to(NUMBER)


@jit
def load_value_scales(scale_ptr, zero_ptr, row_at, group, seen, GROUPS: tl.constexpr):
    """Return scales and zeros fp32 of one half of one head's values, (1, ROWS) or (PAIRS, ROWS), zeros if not seen.

    Args:
        scale_ptr, zero_ptr: those of the first group of this half.
        row_at: as `load_rotated_keys` takes it.
        group: (PAIRS,) which group of the half each pair stands for.
        seen: (ROWS,)
        GROUPS: groups in a half.
    """
    if GROUPS == 1:
        at, mask = row_at[None, :] * 2, seen[None, :]
    else:
        at, mask = row_at[None, :] * (2 * GROUPS) + group[:, None], seen[None, :] & (group >= 0)[:, None]
    scale, zero = tl.load(scale_ptr + at, mask=mask, other=0.0), tl.load(zero_ptr + at, mask=mask, other=0.0)
    return scale.to(tl.float32), zero.to(tl.float32)


@jit
def load_rotated_keys(
    key_ptr, scale_ptr, zero_ptr, field_ptr, row_at, group_at, field_at, cos, sin, seen, half,
    HALF: tl.constexpr, BITS: tl.constexpr, HAS_FIELD: tl.constexpr, NUMBER: tl.constexpr,
):  # fmt: skip
    """Return both halves (ROWS, HALF_PADDED) of one head's keys as NUMBERs; of a row not seen they may be anything.

    Heads are counted over rows: `row_at` (ROWS,) is the place of each row's head, `group_at` that of the scales that
    all these rows share, `field_at` (ROWS,) that of each row's vector of the field.
    """
    left, right = load_key_halves(key_ptr, scale_ptr, zero_ptr, row_at, group_at, seen, half, HALF, BITS, False)
    if HAS_FIELD:
        mask = seen[:, None] & (half < HALF)[None, :]
        field = field_ptr + field_at[:, None] * (2 * HALF) + half[None, :]
        left += tl.load(field, mask=mask, other=0.0).to(tl.float32)
        right += tl.load(field + HALF, mask=mask, other=0.0).to(tl.float32)
    return (left * cos - right * sin).to(NUMBER), (right * cos + left * sin).to(NUMBER)


@jit
def load_values(
    value_ptr, scale_ptr, zero_ptr, field_ptr, row_at, field_at, seen,
    HALF: tl.constexpr, HALF_PADDED: tl.constexpr, BITS: tl.constexpr, CHANNEL_GROUP: tl.constexpr,
    HAS_FIELD: tl.constexpr, NUMBER: tl.constexpr,
):  # fmt: skip
    """Return one head's values (ROWS, 2 * HALF_PADDED) as NUMBERs, in the columns of `channels_of`.

    They are zeros where a row is not seen. `row_at` and `field_at` are those of `load_rotated_keys`.
    """
    if BITS > 0:
        GROUPS: tl.constexpr = HALF // CHANNEL_GROUP
        GROUPS_PADDED: tl.constexpr = HALF_PADDED // CHANNEL_GROUP
        group, is_group = channels_of(tl.arange(0, 2 * GROUPS_PADDED), GROUPS, GROUPS_PADDED)
        at = row_at[:, None] * (2 * GROUPS) + group[None, :]
        known = seen[:, None] & is_group[None, :]
        scale = _spread(tl.load(scale_ptr + at, mask=known, other=0.0), CHANNEL_GROUP)
        zero = _spread(tl.load(zero_ptr + at, mask=known, other=0.0), CHANNEL_GROUP)
        value = load_value_codes(value_ptr, row_at, seen, HALF, HALF_PADDED, BITS, tl.float32) * scale + zero
    else:
        channel, is_channel = channels_of(tl.arange(0, 2 * HALF_PADDED), HALF, HALF_PADDED)
        at = value_ptr + row_at[:, None] * (2 * HALF) + channel[None, :]
        value = tl.load(at, mask=seen[:, None] & is_channel[None, :], other=0.0)
    if HAS_FIELD:
        field = load_value_field(field_ptr, field_at, seen, HALF, HALF_PADDED, tl.float32)
        value = value.to(tl.float32) + field
    return value.to(NUMBER)


@jit
def load_value_codes(
    value_ptr, row_at, seen, HALF: tl.constexpr, HALF_PADDED: tl.constexpr, BITS: tl.constexpr, NUMBER: tl.constexpr
):
    """Return the codes of `load_values` as NUMBERs, which hold them exactly; zeros where a row is not seen."""
    ROWS: tl.constexpr = row_at.shape[0]
    channel, is_channel = channels_of(tl.arange(0, 2 * HALF_PADDED), HALF, HALF_PADDED)
    if BITS == 4 and ROWS < 32:
        # Triton 3.6 takes what was joined for operands of which a thread holds 8 rows in a row: a product of bf16 over
        # 16 rows is wrong then. Here each byte is read twice.
        mask = seen[:, None] & is_channel[None, :]
        packed = tl.load(value_ptr + row_at[:, None] * HALF + (channel % HALF)[None, :], mask=mask, other=0)
        return ((packed >> (channel // HALF * 4).to(tl.uint8)[None, :]) & 15).to(tl.float32).to(NUMBER)
    if BITS == 4:
        half = tl.arange(0, HALF_PADDED)
        at = value_ptr + row_at[:, None] * HALF + half[None, :]
        packed = tl.load(at, mask=seen[:, None] & (half < HALF)[None, :], other=0)
        codes = tl.join(packed & 15, packed >> 4).to(tl.float32).to(NUMBER)
        return codes.permute(0, 2, 1).reshape(ROWS, 2 * HALF_PADDED)
    at = value_ptr + row_at[:, None] * (2 * HALF) + channel[None, :]
    codes = tl.load(at, mask=seen[:, None] & is_channel[None, :], other=0)
    return codes.to(tl.float32).to(NUMBER)  # the interpreter turns bytes into bf16 by way of fp32 alone


@jit
def load_value_field(field_ptr, field_at, seen, HALF: tl.constexpr, HALF_PADDED: tl.constexpr, NUMBER: tl.constexpr):
    """Return what the field adds to the values of `load_values`, as NUMBERs; zeros where a row is not seen."""
    channel, is_channel = channels_of(tl.arange(0, 2 * HALF_PADDED), HALF, HALF_PADDED)
    at = field_ptr + field_at[:, None] * (2 * HALF) + channel[None, :]
    return tl.load(at, mask=seen[:, None] & is_channel[None, :], other=0.0).to(NUMBER)


@jit
def _spread(of_group, CHANNEL_GROUP: tl.constexpr):
    # The number of each group, fp32, in each of its columns.
    ROWS: tl.constexpr = of_group.shape[0]
    GROUPS: tl.constexpr = of_group.shape[1]
    wide = of_group.to(tl.float32)[:, :, None].broadcast_to(ROWS, GROUPS, CHANNEL_GROUP)
    return wide.reshape(ROWS, GROUPS * CHANNEL_GROUP)
