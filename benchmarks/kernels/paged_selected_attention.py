"""Selected-query attention over blocks at the shape of Llama 3 8B: recomputed rows lie in private blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from kernel_case import KernelCase, attention_flops, selected_positions
from kernel_inputs import quantized
from torch import Tensor

from ragkit.kernels.backend import Backend
from ragkit.kernels.paged_rows import FIELD_ROWS, HIDDEN
from ragkit.kernels.paged_selected_attention import paged_selected_attention, paged_selected_attention_torch
from ragkit.kernels.selected_attention import selected_attention
from ragkit.kernels.testing import assert_matches

BLOCK = 64
QUESTION = 60


@dataclass(frozen=True)
class Shape:
    """Requests alike: prompt rows, how many of them are recomputed, and the model's heads."""

    requests: int
    rows: int
    share: float
    question: int
    q_heads: int
    kv_heads: int
    head_dim: int


def cases(device: torch.device) -> list[KernelCase]:
    """Return one long request and four shorter ones as numbers, with and without a field, and as codes of 8 and 4 bits.

    On a CPU they are small.
    """
    if device.type == "cpu":
        shapes = [Shape(2, 100, 0.15, 10, 4, 2, 64)]
    else:
        shapes = [Shape(1, 32768, 0.15, QUESTION, 32, 8, 128), Shape(4, 8192, 0.15, QUESTION, 32, 8, 128)]
    kinds = ((0, False), (0, True), (8, False), (8, True), (4, False))
    return [_case(shape, bits, with_field, device) for shape in shapes for bits, with_field in kinds]


def _case(shape: Shape, bits: int, with_field: bool, device: torch.device) -> KernelCase:
    plain = _inputs(shape, with_field, device)
    positions, scale = plain["positions"], shape.head_dim**-0.5
    inputs: dict[str, Any] = dict(plain)
    if bits:
        inputs["key_pool"], inputs["value_pool"] = quantized(plain["key_pool"], plain["value_pool"], bits)

    def run() -> Tensor:
        return paged_selected_attention(**inputs, scale=scale, backend=Backend.TRITON)

    def check() -> None:
        # The last queries of the last request: the definition takes all heads' scores of a request at once.
        last = min(64, len(positions) // shape.requests)
        part = dict(inputs, queries=plain["queries"][-last:], positions=positions[-last:])
        part["cu_queries"] = torch.tensor([0] * shape.requests + [last], device=device, dtype=torch.int32)
        expected = paged_selected_attention_torch(**part, scale=scale)
        assert_matches(run()[-last:], expected.float(), reduced=4)

    def as_numbers() -> Tensor:
        return paged_selected_attention(**plain, scale=scale, backend=Backend.TRITON)

    baseline = as_numbers if bits else None if with_field else _packed(shape, plain, scale)
    return KernelCase(
        name="paged_selected_attention" + (f", int{bits}" if bits else "") + (", field" if with_field else ""),
        shape=f"{shape.requests} x {shape.share:.0%} + {shape.question} of {shape.rows:,} rows, "
        f"{shape.q_heads}/{shape.kv_heads} heads of {shape.head_dim}",
        run=run,
        check=check,
        work=attention_flops(positions, shape.q_heads, shape.head_dim),
        kind="compute",
        baseline_name="paged_selected_attention of the same rows as numbers"
        if bits
        else "selected_attention on a rotated copy, the copy not counted",
        baseline=baseline,
    )


def _inputs(shape: Shape, with_field: bool, device: torch.device) -> dict[str, Tensor]:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    heads = (shape.kv_heads, shape.head_dim)
    chosen = selected_positions(shape.rows, shape.share, shape.question, device)
    moved = chosen[: len(chosen) - shape.question].long()
    shared, private = -(-shape.rows // BLOCK), -(-len(moved) // BLOCK)
    entries = shared + private
    row_positions = torch.full((entries * BLOCK,), HIDDEN, dtype=torch.int32, device=device)
    row_positions[: shape.rows] = torch.arange(shape.rows, device=device)
    row_positions[moved] = HIDDEN  # recomputed rows stand in private blocks
    row_positions[shared * BLOCK : shared * BLOCK + len(moved)] = moved.int()
    angles = torch.outer(torch.arange(shape.rows).float(), 5e5 ** -torch.linspace(0, 1, shape.head_dim // 2)).to(device)
    tables = torch.randperm(shape.requests * entries, device=device).int().view(shape.requests, entries)
    inputs = {
        "queries": torch.randn(shape.requests * len(chosen), shape.q_heads, shape.head_dim, device=device, dtype=dtype),
        "key_pool": torch.randn(shape.requests * entries, BLOCK, *heads, device=device, dtype=dtype),
        "value_pool": torch.randn(shape.requests * entries, BLOCK, *heads, device=device, dtype=dtype),
        "block_tables": tables,
        "row_positions": row_positions.view(1, entries, BLOCK).repeat(shape.requests, 1, 1),
        "num_entries": torch.full((shape.requests,), entries, dtype=torch.int32, device=device),
        "positions": chosen.repeat(shape.requests),
        "cu_queries": torch.arange(shape.requests + 1, device=device, dtype=torch.int32) * len(chosen),
        "cos": angles.cos(),
        "sin": angles.sin(),
    }
    if with_field:
        for name in ("key_field", "value_field"):
            size = (shape.requests, entries, BLOCK // FIELD_ROWS, *heads)
            inputs[name] = torch.randn(size, device=device, dtype=dtype)
    return inputs


def _packed(shape: Shape, inputs: dict[str, Tensor], scale: float) -> object:
    """Return what attends with each request's queries to contiguous keys, as many as it has."""
    keys, values = (
        pool.flatten(0, 1)[: shape.rows].contiguous() for pool in (inputs["key_pool"], inputs["value_pool"])
    )
    queries = inputs["queries"].unflatten(0, (shape.requests, -1)).unbind()
    positions = inputs["positions"].unflatten(0, (shape.requests, -1))[0].contiguous()

    def run() -> None:
        for part in queries:
            selected_attention(part, keys, values, positions, scale=scale, backend=Backend.TRITON)

    return run
