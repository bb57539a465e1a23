"""Quantisation of one layer's keys or values at the shape of Llama 3 8B, in the groups of the int8 and int4 codecs."""

from __future__ import annotations

import torch
from kernel_case import KernelCase
from kernel_inputs import compiled, kv_rows, model_shape

from ragkit.kernels.backend import Backend
from ragkit.kernels.dequantize_kv import dequantize_kv_torch
from ragkit.kernels.quantize_kv import quantize_kv, quantize_kv_torch

GROUPS = {"int8 keys": (8, 64, 1), "int8 values": (8, 1, 64), "int4 keys": (4, 32, 1), "int4 values": (4, 1, 32)}


def cases(device: torch.device) -> list[KernelCase]:
    """Return keys and values of 32K tokens with 8 and 4 bits; on a CPU of 70."""
    return [_case(name, *groups, device) for name, groups in GROUPS.items()]


def _case(name: str, bits: int, token_group: int, channel_group: int, device: torch.device) -> KernelCase:
    shape = model_shape(device)
    tokens = 32768 if device.type == "cuda" else 70
    heads = kv_rows(tokens, shape, device)
    channel_group = min(channel_group, shape.head_dim // 2)
    options = {"bits": bits, "token_group": token_group, "channel_group": channel_group}
    codes = quantize_kv(heads, **options, backend=Backend.TRITON)

    def check() -> None:
        # The promise: an error of half a scale at most, beyond what fp32 rounds.
        back = torch.empty_like(heads, dtype=torch.float32)
        dequantize_kv_torch(quantize_kv(heads, **options, backend=Backend.TRITON), back, token_group=token_group)
        scale = codes.scale.float().repeat_interleave(token_group, 0)[:tokens].repeat_interleave(channel_group, 2)
        worst = float((((back - heads.float()).abs() - 2e-7 * heads.float().abs()) / scale).max())
        assert worst <= 0.5002, f"an error of {worst} scales, expected half of one"

    return KernelCase(
        name=f"quantize_kv, {name}",
        shape=f"{tokens:,} tokens, {shape.kv_heads} heads of {shape.head_dim}",
        run=lambda: quantize_kv(heads, **options, backend=Backend.TRITON),
        check=check,
        work=tokens * shape.kv_bytes + sum(part.nbytes for part in codes),
        kind="bandwidth",
        baseline_name="torch.compile",
        baseline=compiled(lambda: quantize_kv_torch(heads, **options), device),
    )
