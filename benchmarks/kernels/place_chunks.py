"""Placing one layer of 64 stored chunks at the shape of Llama 3 8B, by codec."""

from __future__ import annotations

from collections.abc import Callable

import torch
from kernel_case import KernelCase
from kernel_inputs import kv_rows, model_shape
from torch import Tensor

from ragkit.kernels.backend import Backend
from ragkit.kernels.place_chunks import ChunkFormat, PlacementTable, place_chunks, place_chunks_torch
from ragkit.kernels.quantize_kv import quantize_kv
from ragkit.kernels.testing import assert_matches
from ragkit.kvcache.codec import join_sections

BITS = {"bf16": 0, "int8": 8, "int4": 4}
GROUPS = {8: (64, 64), 4: (32, 32)}  # of tokens for keys, of channels for values


def cases(device: torch.device) -> list[KernelCase]:
    """Return 64 chunks of 512 tokens by codec; on a CPU two of 70."""
    return [_case(name, bits, device) for name, bits in BITS.items()]


def _case(name: str, bits: int, device: torch.device) -> KernelCase:
    shape = model_shape(device)
    count, tokens = (64, 512) if device.type == "cuda" else (2, 70)
    token_group, channels = GROUPS.get(bits, (1, 1))
    channels = min(channels, shape.head_dim // 2)
    form = ChunkFormat.codes(bits, token_group, channels) if bits else ChunkFormat.numbers(shape.dtype)
    layers = []
    for _ in range(count):
        keys, values = kv_rows(tokens, shape, device), kv_rows(tokens, shape, device)
        parts = [keys, values]
        if bits:
            parts = [
                *quantize_kv(keys, bits=bits, token_group=token_group, channel_group=1, backend=Backend.TRITON),
                *quantize_kv(values, bits=bits, token_group=1, channel_group=channels, backend=Backend.TRITON),
            ]
        layers.append(join_sections(parts))
    size = layers[0].numel()
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    stored = torch.cat([layers[index] for index in order.argsort().tolist()])
    firsts = range(0, count * tokens, tokens)
    table = PlacementTable.build(firsts, [tokens] * count, (order * size).unsqueeze(0), device)
    keys, values = torch.empty(
        (2, count * tokens, shape.kv_heads, shape.head_dim), dtype=shape.dtype, device=device
    ).unbind()

    def check() -> None:
        expected = torch.empty_like(keys), torch.empty_like(values)
        place_chunks_torch(stored, table, 0, form, *expected)
        place_chunks(stored, table, 0, form, keys, values, backend=Backend.TRITON)
        assert_matches(keys, expected[0])
        assert_matches(values, expected[1])

    return KernelCase(
        name=f"place_chunks, {name}",
        shape=f"{count} chunks of {tokens:,} tokens, {shape.kv_heads} heads of {shape.head_dim}",
        run=lambda: place_chunks(stored, table, 0, form, keys, values, backend=Backend.TRITON),
        check=check,
        work=stored.nbytes + keys.nbytes + values.nbytes,
        kind="bandwidth",
        baseline_name="" if bits else "one copy of the same bytes",
        baseline=None if bits else _copy(stored),
    )


def _copy(stored: Tensor) -> Callable[[], object]:
    target = torch.empty_like(stored)
    return lambda: target.copy_(stored)
