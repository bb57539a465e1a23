"""Attention of drafted tokens over the blocks of a pool at the shape of Llama 3 8B, beside a decoding step's."""

from __future__ import annotations

import torch
from kernel_case import KernelCase
from kernel_inputs import BLOCK_SIZE, empty_pool, kv_rows, model_shape, normal, quantized, rotary_tables
from torch import Tensor

from ragkit.kernels.backend import Backend
from ragkit.kernels.paged_decode_attention import paged_decode_attention
from ragkit.kernels.paged_verify_attention import paged_verify_attention, paged_verify_attention_torch
from ragkit.kernels.testing import assert_matches


def cases(device: torch.device) -> list[KernelCase]:
    """Return 1 to 32 tokens over long rows, as numbers and as codes; on a CPU two small requests of each."""
    if device.type != "cuda":
        return [_case(2, 4, 128, bits, device) for bits in (0, 8, 4)]
    sizes = [(1, drafted, 131072, 0) for drafted in (1, 2, 4, 8, 16, 32)]
    sizes += [(1, 8, 8192, 0), (1, 8, 32768, 0), (8, 8, 8192, 0), (1, 8, 131072, 8), (1, 8, 131072, 4)]
    return [_case(*size, device) for size in sizes]


def _case(requests: int, drafted: int, rows: int, bits: int, device: torch.device) -> KernelCase:
    shape = model_shape(device)
    entries = rows // BLOCK_SIZE
    own = [
        normal(requests * drafted, heads, shape.head_dim, shape=shape, device=device)
        for heads in (shape.q_heads, shape.kv_heads, shape.kv_heads)
    ]
    pools = [empty_pool(requests * rows, shape, device) for _ in range(2)]
    for pool in pools:
        pool.copy_(kv_rows(requests * rows, shape, device).view(pool.shape))
    tables = torch.randperm(requests * entries, device=device).int().view(requests, entries)
    positions = torch.arange(rows, device=device, dtype=torch.int32).view(1, entries, BLOCK_SIZE)
    positions = positions.repeat(requests, 1, 1)
    counts = torch.full((requests,), entries, device=device, dtype=torch.int32)
    # A tree of two branches behind the first token: the tokens of even number, and those of odd number.
    masks = [1 | sum(1 << other for other in range(index, 0, -2)) for index in range(drafted)]
    signed = [mask - (1 << 32) if mask >> 31 else mask for mask in masks]
    ancestors = torch.tensor(signed * requests, device=device, dtype=torch.int32)
    first = torch.full((requests,), rows, device=device)
    cos, sin = rotary_tables(rows, shape, device)
    stored = quantized(pools[0], pools[1], bits) if bits else pools
    scale = shape.head_dim**-0.5

    def run() -> Tensor:
        return paged_verify_attention(
            *own, *stored, tables, positions, counts, first, ancestors, cos, sin, scale=scale, backend=Backend.TRITON
        )

    def check() -> None:
        if rows * requests > 65536 and drafted > 8:
            return  # the definition's scores and repeated rows would not fit beside; smaller cases are checked
        wide = stored if bits else [pool.float() for pool in pools]
        expected = paged_verify_attention_torch(
            *(part.float() for part in own), *wide, tables, positions, counts, first, ancestors, cos, sin, scale=scale
        )
        assert_matches(run(), expected, reduced=4)

    def one_token() -> Tensor:
        return paged_decode_attention(
            own[0][:: drafted], *stored, tables, positions, counts, first - 1, cos, sin, scale=scale,
            backend=Backend.TRITON,
        )  # fmt: skip

    return KernelCase(
        name="paged_verify_attention" + (f", int{bits}" if bits else ""),
        shape=f"{requests} x {drafted} tokens over {rows:,} rows, {shape.heads}",
        run=run,
        check=check,
        # Keys, values and positions of all rows; the angles once, for all requests.
        work=sum(pool.nbytes for pool in stored) + requests * rows * 4 + rows * shape.head_dim * 4,
        kind="bandwidth",
        baseline_name="paged_decode_attention of one token",
        baseline=one_token,
    )
