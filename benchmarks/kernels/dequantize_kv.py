"""Dequantisation into a pool at the shape of Llama 3 8B, from the groups of the int8 and int4 codecs."""

from __future__ import annotations

import torch
from kernel_case import KernelCase
from kernel_inputs import compiled, empty_pool, kv_rows, model_shape, scattered_blocks

from ragkit.kernels.backend import Backend
from ragkit.kernels.dequantize_kv import dequantize_kv, dequantize_kv_torch
from ragkit.kernels.quantize_kv import quantize_kv
from ragkit.kernels.testing import assert_matches

GROUPS = {"int8 keys": (8, 64, 1), "int8 values": (8, 1, 64), "int4 keys": (4, 32, 1), "int4 values": (4, 1, 32)}


def cases(device: torch.device) -> list[KernelCase]:
    """Return keys and values of 32K and 128K tokens from 8 and 4 bits; on a CPU of 70."""
    sizes = (32768, 131072) if device.type == "cuda" else (70,)
    return [_case(name, tokens, *groups, device) for tokens in sizes for name, groups in GROUPS.items()]


def _case(name: str, tokens: int, bits: int, token_group: int, channel_group: int, device: torch.device) -> KernelCase:
    shape = model_shape(device)
    channel_group = min(channel_group, shape.head_dim // 2)
    heads = kv_rows(tokens, shape, device)
    codes = quantize_kv(heads, bits=bits, token_group=token_group, channel_group=channel_group, backend=Backend.TRITON)
    rows, slots = empty_pool(tokens, shape, device).flatten(0, 1), scattered_blocks(tokens, device)[1]

    def run() -> None:
        dequantize_kv(codes, rows, slots, token_group=token_group, backend=Backend.TRITON)

    def check() -> None:
        expected = torch.empty_like(heads, dtype=torch.float32)
        dequantize_kv_torch(codes, expected, token_group=token_group)
        run()
        assert_matches(rows[slots], expected)

    return KernelCase(
        name=f"dequantize_kv, {name}",
        shape=f"{tokens:,} tokens, {shape.kv_heads} heads of {shape.head_dim}",
        run=run,
        check=check,
        work=tokens * (shape.kv_bytes + 8) + sum(part.nbytes for part in codes),
        kind="bandwidth",
        baseline_name="torch.compile",
        baseline=compiled(lambda: dequantize_kv_torch(codes, rows, slots, token_group=token_group), device),
    )
