# ruff: noqa: ANN001, ANN201 (Triton reads the annotations of kernels, and pointers have none)
# mypy: disable-error-code="no-untyped-def"
"""The rows of a request's blocks as attention reads them: corrected by a coarse field, and rotated to their positions.

    k'_j = R(p_j) (k_j + key_field[j // 16]),   v'_j = v_j + value_field[j // 16]      j: row within its block

Blocks belong to several requests and hold what the chunk's rows are on their own. What a request changes about them
stays beside them: a row's true position, `HIDDEN` where another row replaces it, and a field of one vector for every
`FIELD_ROWS` rows that moves the rows not recomputed with those that are.

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


def _rows(pool: Blocks, slots: Tensor) -> Tensor:
    return pool.rows(slots) if isinstance(pool, QuantizedBlocks) else pool.flatten(0, 1)[slots].float()


def check_paged_rows(
    queries: Tensor,
    requests: int,
    key_pool: Tensor,
    value_pool: Tensor,
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
    if key_pool.dim() != 4 or key_pool.shape != value_pool.shape or key_pool.shape[3] != head_dim:
        raise KernelInputError(
            f"pools must be (blocks, block_size, kv_heads, {head_dim}) alike, "
            f"got {tuple(key_pool.shape)}, {tuple(value_pool.shape)}"
        )
    if not (key_pool.is_contiguous() and value_pool.is_contiguous()):
        raise KernelInputError("pools must be contiguous")
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


@jit
def load_rotated_keys(
    key_ptr, field_ptr, cos_ptr, sin_ptr, row_at, field_at, position, seen, half,
    HALF: tl.constexpr, HAS_FIELD: tl.constexpr,
):  # fmt: skip
    """Return both halves (ROWS, HALF_PADDED) of one head's keys, in the pool's type; zeros where a row is not seen."""
    mask = seen[:, None] & (half < HALF)[None, :]
    at = key_ptr + row_at[:, None] + half[None, :]
    first, second = tl.load(at, mask=mask, other=0.0), tl.load(at + HALF, mask=mask, other=0.0)
    left, right = first.to(tl.float32), second.to(tl.float32)
    if HAS_FIELD:
        field = field_ptr + field_at[:, None] + half[None, :]
        left += tl.load(field, mask=mask, other=0.0).to(tl.float32)
        right += tl.load(field + HALF, mask=mask, other=0.0).to(tl.float32)
    angle = tl.where(seen, position, 0)[:, None] * HALF + half[None, :]
    cos, sin = tl.load(cos_ptr + angle, mask=mask, other=0.0), tl.load(sin_ptr + angle, mask=mask, other=0.0)
    return (left * cos - right * sin).to(first.dtype), (right * cos + left * sin).to(first.dtype)


@jit
def load_values(value_ptr, field_ptr, row_at, field_at, seen, dim, HEAD_DIM: tl.constexpr, HAS_FIELD: tl.constexpr):
    """Return one head's values (ROWS, DIM_PADDED), in the pool's type; zeros where a row is not seen."""
    mask = seen[:, None] & (dim < HEAD_DIM)[None, :]
    value = tl.load(value_ptr + row_at[:, None] + dim[None, :], mask=mask, other=0.0)
    if HAS_FIELD:
        field = tl.load(field_ptr + field_at[:, None] + dim[None, :], mask=mask, other=0.0)
        value = (value.to(tl.float32) + field.to(tl.float32)).to(value.dtype)
    return value
