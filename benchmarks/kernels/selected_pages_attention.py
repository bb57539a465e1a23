"""Attention over listed pages at the shape of Llama 3 8B: one new token, and windows that read through a document."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from kernel_case import KernelCase, attention_flops
from kernel_inputs import BLOCK_SIZE, ModelShape, kv_rows, model_shape, normal, quantized, rotary_tables
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ragkit.kernels.backend import Backend
from ragkit.kernels.gather_pages import PageLists, gather_pages_torch
from ragkit.kernels.paged_decode_attention import paged_decode_attention
from ragkit.kernels.selected_pages_attention import selected_pages_attention, selected_pages_attention_torch
from ragkit.kernels.testing import assert_matches


@dataclass(frozen=True)
class Problem:
    """Queries over listed pages of a document.

    Attributes:
        tokens: queries.
        pages: of the document.
        listed: pages that are attended to.
        per_head: each key head has a list of its own.
        bits: of a stored number, 16 for numbers themselves.
    """

    tokens: int
    pages: int
    listed: int
    per_head: bool
    bits: int = 16


def cases(device: torch.device) -> list[KernelCase]:
    """Return one token over 4K, 16K and 64K rows, plain and as codes, and windows; on a CPU small cases."""
    if device.type == "cpu":
        problems = [Problem(1, 8, 3, False), Problem(1, 8, 3, True, 8), Problem(40, 8, 3, False)]
    else:
        problems = [
            *(Problem(1, 4096, listed, per_head) for listed in (64, 256, 1024) for per_head in (False, True)),
            *(Problem(1, 4096, listed, True, bits) for listed in (64, 256) for bits in (8, 4)),
            *(Problem(tokens, 4096, 72 + tokens // BLOCK_SIZE, True) for tokens in (512, 2048)),
        ]
    return [_case(problem, device) for problem in problems]


def _case(problem: Problem, device: torch.device) -> KernelCase:
    shape = model_shape(device)
    tokens, listed = problem.tokens, problem.listed
    queries = normal(tokens, shape.q_heads, shape.head_dim, shape=shape, device=device)
    pools = [kv_rows(problem.pages * BLOCK_SIZE, shape, device).unflatten(0, (-1, BLOCK_SIZE)) for _ in range(2)]
    stored = quantized(pools[0], pools[1], problem.bits) if problem.bits < 16 else tuple(pools)
    count = shape.kv_heads if problem.per_head else 1
    chosen = torch.stack([torch.randperm(problem.pages, device=device)[:listed].sort().values for _ in range(count)])
    starts = torch.arange(0, listed * BLOCK_SIZE, BLOCK_SIZE, dtype=torch.int32, device=device)[None]
    last_rows = torch.arange(listed * BLOCK_SIZE - tokens, listed * BLOCK_SIZE, dtype=torch.int32, device=device)
    inputs = [
        queries,
        *stored,
        PageLists(chosen.int(), starts),
        last_rows,
        *rotary_tables(listed * BLOCK_SIZE, shape, device),
    ]
    scale = shape.head_dim**-0.5

    def run() -> Tensor:
        return selected_pages_attention(*inputs, scale=scale, backend=Backend.TRITON)

    def check() -> None:
        wide = [part.float() if isinstance(part, Tensor) and part.is_floating_point() else part for part in inputs]
        assert_matches(run(), selected_pages_attention_torch(*wide, scale=scale), reduced=4)

    if tokens > 1:
        work = attention_flops(last_rows, shape.q_heads, shape.head_dim)
    else:
        work = sum(part.nbytes for part in stored) * listed / problem.pages
    name, baseline = _baseline(problem, inputs, shape, scale)
    return KernelCase(
        name="selected_pages_attention" + (f", {problem.bits} bits" if problem.bits < 16 else ""),
        shape=f"{tokens} tokens, {listed} of {problem.pages:,} pages of {BLOCK_SIZE}"
        f"{', a list a head' if problem.per_head else ''}, {shape.heads}",
        run=run,
        check=check,
        work=work,
        kind="compute" if tokens > 1 else "bandwidth",
        baseline_name=name,
        baseline=baseline,
    )


def _baseline(
    problem: Problem, inputs: list[object], shape: ModelShape, scale: float
) -> tuple[str, Callable[[], object]]:
    queries, key_pool, value_pool, lists, last_rows, cos, sin = inputs
    if problem.tokens == 1 and not problem.per_head:
        row = torch.arange(BLOCK_SIZE, dtype=torch.int32, device=queries.device)
        positions = (lists.positions[..., None] + row).contiguous()
        counts = torch.tensor([problem.listed], dtype=torch.int32, device=queries.device)
        return "paged_decode_attention", lambda: paged_decode_attention(
            queries, key_pool, value_pool, lists.pages, positions, counts, last_rows.long(), cos, sin, scale=scale,
            backend=Backend.TRITON,
        )  # fmt: skip
    rows = gather_pages_torch(key_pool, value_pool, lists, cos, sin, dtype=shape.dtype)
    keys, values = (part.transpose(0, 1).unsqueeze(0).contiguous() for part in rows)
    heads = queries.transpose(0, 1).unsqueeze(0).contiguous()
    mask = torch.arange(keys.shape[2], device=queries.device) <= last_rows.unsqueeze(1)

    def run() -> Tensor:
        return scaled_dot_product_attention(
            heads, keys, values, attn_mask=mask if problem.tokens > 1 else None, scale=scale, enable_gqa=True
        )

    return "SDPA on packed rotated rows, the copy not counted", run
