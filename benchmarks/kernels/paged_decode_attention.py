"""Decode attention over the blocks of a pool at the shape of Llama 3 8B."""

from __future__ import annotations

import torch
from kernel_case import KernelCase
from kernel_inputs import (
    BLOCK_SIZE,
    ModelShape,
    empty_pool,
    kv_rows,
    model_shape,
    normal,
    quantized,
    rotary_tables,
    rotated,
)
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ragkit.kernels.backend import Backend
from ragkit.kernels.paged_decode_attention import paged_decode_attention, paged_decode_attention_torch
from ragkit.kernels.testing import assert_matches


def cases(device: torch.device) -> list[KernelCase]:
    """Return requests with rows as numbers and as codes of 8 and 4 bits; on a CPU two small requests of each."""
    if device.type != "cuda":
        return [_case(2, 128, bits, device) for bits in (0, 8, 4)]
    sizes = [(requests, rows, bits) for requests, rows in ((1, 8192), (1, 32768), (8, 8192)) for bits in (0, 8, 4)]
    return [_case(*size, device) for size in (*sizes, (1, 131072, 8), (1, 131072, 4))]


def _case(requests: int, rows: int, bits: int, device: torch.device) -> KernelCase:
    shape = model_shape(device)
    entries = rows // BLOCK_SIZE
    queries = normal(requests, shape.q_heads, shape.head_dim, shape=shape, device=device)
    pools = [empty_pool(requests * rows, shape, device) for _ in range(2)]
    for pool in pools:
        pool.copy_(kv_rows(requests * rows, shape, device).view(pool.shape))
    tables = torch.randperm(requests * entries, device=device).int().view(requests, entries)
    positions = torch.arange(rows, device=device, dtype=torch.int32).view(1, entries, BLOCK_SIZE)
    positions = positions.repeat(requests, 1, 1)
    counts = torch.full((requests,), entries, device=device, dtype=torch.int32)
    last = torch.full((requests,), rows - 1, device=device)
    cos, sin = rotary_tables(rows, shape, device)
    tables_and_angles = [tables, positions, counts, last, cos, sin]
    stored = quantized(pools[0], pools[1], bits) if bits else pools
    scale = shape.head_dim**-0.5

    def run() -> Tensor:
        return paged_decode_attention(queries, *stored, *tables_and_angles, scale=scale, backend=Backend.TRITON)

    def check() -> None:
        wide = stored if bits else [pool.float() for pool in pools]
        expected = paged_decode_attention_torch(queries.float(), *wide, *tables_and_angles, scale=scale)
        assert_matches(run(), expected, reduced=4)

    def as_numbers() -> Tensor:
        return paged_decode_attention(queries, *pools, *tables_and_angles, scale=scale, backend=Backend.TRITON)

    return KernelCase(
        name="paged_decode_attention" + (f", int{bits}" if bits else ""),
        shape=f"{requests} x {rows:,} rows, {shape.heads}",
        run=run,
        check=check,
        # Keys, values and positions of all rows; the angles once, for all requests.
        work=sum(pool.nbytes for pool in stored) + requests * rows * 4 + rows * shape.head_dim * 4,
        kind="bandwidth",
        baseline_name="paged_decode_attention of the same rows as numbers"
        if bits
        else "SDPA on rotated contiguous rows, the copy not counted",
        baseline=as_numbers if bits else _contiguous([queries, *pools, *tables_and_angles], requests, rows, shape),
    )


def _contiguous(inputs: list[Tensor], requests: int, rows: int, shape: ModelShape) -> object:
    queries, key_pool, value_pool, tables, _, _, _, cos, sin = inputs
    keys, values = (
        torch.stack([pool[table.long()].flatten(0, 1) for table in tables]) for pool in (key_pool, value_pool)
    )
    for part in keys:
        part.copy_(rotated(part, cos, sin))
    keys, values = (part.transpose(1, 2).contiguous() for part in (keys, values))
    heads = queries.view(requests, shape.q_heads, 1, shape.head_dim)
    assert keys.shape == (requests, shape.kv_heads, rows, shape.head_dim)

    return lambda: scaled_dot_product_attention(heads, keys, values, enable_gqa=True)
