"""Placing one layer of 64 stored chunks at the shape of Llama 3 8B, by codec."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

import torch
from kernel_case import KernelCase
from kernel_inputs import kv_rows, model_shape
from torch import Tensor
from torch.nn import functional

from ragkit.kernels.backend import Backend
from ragkit.kernels.place_chunks import place_chunks, place_chunks_torch
from ragkit.kernels.placement_table import PlacementTable
from ragkit.kernels.testing import assert_matches
from ragkit.kvcache.codecs import make_codec
from ragkit.kvcache.layout import KVLayout, LayerSpec
from ragkit.models.model_config import RopeConfig

CODECS = ("bf16", "int8", "int4", "entropy2")
DISTINCT = 4  # chunks that are encoded; the others are copies of them


def cases(device: torch.device) -> list[KernelCase]:
    """Return 64 chunks of 512 tokens by codec; on a CPU four of 70."""
    return [_case(name, device) for name in CODECS]


def _case(name: str, device: torch.device) -> KernelCase:
    shape = model_shape(device)
    count, tokens = (64, 512) if device.type == "cuda" else (4, 70)
    layout = KVLayout((LayerSpec(shape.kv_heads, shape.head_dim, RopeConfig()),), shape.dtype)
    codec = make_codec(name, layout)
    pairs = [(kv_rows(tokens, shape, device), kv_rows(tokens, shape, device)) for _ in range(DISTINCT)]
    layers = [functional.pad(codec.encode([pair])[0], (0, 63)) for pair in pairs]
    layers = [layer[: len(layer) // 64 * 64] for layer in layers] * (count // DISTINCT)
    starts = [0, *accumulate(len(layer) for layer in layers)]
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
    stored, form = torch.cat(layers), codec.format(0)
    places = torch.tensor([[starts[index] for index in order]])
    table = PlacementTable.build(range(0, count * tokens, tokens), [tokens] * count, places, device)
    keys, values = torch.empty((2, count * tokens, shape.kv_heads, shape.head_dim), dtype=shape.dtype, device=device)

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
        baseline_name="one copy of the same bytes" if name == "bf16" else "",
        baseline=_copy(stored) if name == "bf16" else None,
    )


def _copy(stored: Tensor) -> Callable[[], object]:
    target = torch.empty_like(stored)
    return lambda: target.copy_(stored)
