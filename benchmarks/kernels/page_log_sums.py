"""Logits of pages by all their keys at the shape of Llama 3 8B, of numbers and of codes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from kernel_case import KernelCase
from kernel_inputs import BLOCK_SIZE, compiled, kv_rows, model_shape, normal, quantized
from torch import Tensor

from ragkit.kernels.backend import Backend
from ragkit.kernels.page_log_sums import page_log_sums, page_log_sums_torch
from ragkit.kernels.testing import assert_matches


def cases(device: torch.device) -> list[KernelCase]:
    """Return one query, eight and a question over 128K rows, and one over a million as codes; on a CPU small cases."""
    if device.type == "cpu":
        return [*(_case(1, 5, bits, device) for bits in (0, 4)), _listed(1, 5, 3, 4, device)]
    sizes = [(tokens, 2048, bits) for tokens in (1, 8) for bits in (0, 8, 4)]
    cases = [_case(*size, device) for size in (*sizes, (1, 8192, 8), (1, 16384, 4), (64, 2048, 4))]
    return [*cases, *(_listed(tokens, 2048, 114, 4, device) for tokens in (1, 8))]


def _listed(tokens: int, pages: int, count: int, bits: int, device: torch.device) -> KernelCase:
    """Return the case of some pages that are listed, as a selector finds them."""
    shape = model_shape(device)
    queries = normal(tokens, shape.q_heads, shape.head_dim, shape=shape, device=device)
    numbers = kv_rows(pages * BLOCK_SIZE, shape, device).unflatten(0, (pages, BLOCK_SIZE))
    keys = quantized(numbers, numbers, bits)[0]
    listed = torch.randperm(pages, device=device)[:count].sort().values.int().unsqueeze(0)
    scale = shape.head_dim**-0.5

    def run() -> Tensor:
        return page_log_sums(queries, keys, scale=scale, listed=listed, backend=Backend.TRITON)

    def check() -> None:
        expected = page_log_sums_torch(queries, keys, scale=scale, listed=listed)
        assert_matches(run().to(shape.dtype), expected, reduced=4)

    return KernelCase(
        name=f"page_log_sums of listed pages, int{bits}",
        shape=f"{tokens} tokens, {count} of {pages:,} pages of {BLOCK_SIZE}, {shape.heads}",
        run=run,
        check=check,
        work=keys.nbytes * count / pages + tokens * shape.q_heads * count * 4,
        kind="bandwidth",
    )


def _case(tokens: int, pages: int, bits: int, device: torch.device) -> KernelCase:
    shape = model_shape(device)
    queries = normal(tokens, shape.q_heads, shape.head_dim, shape=shape, device=device)
    numbers = kv_rows(pages * BLOCK_SIZE, shape, device).unflatten(0, (pages, BLOCK_SIZE))
    keys = quantized(numbers, numbers, bits)[0] if bits else numbers
    scale = shape.head_dim**-0.5

    def run() -> Tensor:
        return page_log_sums(queries, keys, scale=scale, backend=Backend.TRITON)

    def check() -> None:
        assert_matches(run().to(shape.dtype), page_log_sums_torch(queries, keys, scale=scale), reduced=4)

    def as_numbers() -> Tensor:
        return page_log_sums(queries, numbers, scale=scale, backend=Backend.TRITON)

    return KernelCase(
        name="page_log_sums" + (f", int{bits}" if bits else ""),
        shape=f"{tokens} tokens, {pages:,} pages of {BLOCK_SIZE}, {shape.heads}",
        run=run,
        check=check,
        work=keys.nbytes + tokens * shape.q_heads * pages * 4,
        kind="bandwidth",
        baseline_name="page_log_sums of the same keys as numbers"
        if bits
        else "torch.compile of products and logsumexp",
        baseline=as_numbers if bits else _materialised(queries, numbers, scale, device),
    )


def _materialised(queries: Tensor, keys: Tensor, scale: float, device: torch.device) -> Callable[[], object]:
    kv_heads = keys.shape[2]
    grouped = queries.unflatten(1, (kv_heads, -1)).transpose(0, 1).flatten(1, 2).contiguous()

    def run() -> Tensor:
        products = torch.bmm(grouped, keys.flatten(0, 1).permute(1, 2, 0)).float() * scale
        return products.unflatten(2, (len(keys), -1)).logsumexp(dim=3)

    return compiled(run, device)
