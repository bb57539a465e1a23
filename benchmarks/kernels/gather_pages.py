"""Packing the pages that a window attends to, at the shape of Llama 3 8B: one list of all heads, and one of each."""

from __future__ import annotations

from collections.abc import Callable

import torch
from kernel_case import KernelCase
from kernel_inputs import BLOCK_SIZE, compiled, kv_rows, model_shape, rotary_tables, rotated
from torch import Tensor

from ragkit.kernels.backend import Backend
from ragkit.kernels.gather_pages import PageLists, gather_pages, gather_pages_torch
from ragkit.kernels.testing import assert_matches


def cases(device: torch.device) -> list[KernelCase]:
    """Return 128 of 2,048 pages; on a CPU a few small ones."""
    sizes = (2048, 128) if device.type == "cuda" else (8, 3)
    return [_case(*sizes, per_head, device) for per_head in (False, True)]


def _case(pages: int, listed: int, per_head: bool, device: torch.device) -> KernelCase:
    shape = model_shape(device)
    pools = [kv_rows(pages * BLOCK_SIZE, shape, device).unflatten(0, (pages, BLOCK_SIZE)) for _ in range(2)]
    rows = shape.kv_heads if per_head else 1
    chosen = torch.stack([torch.randperm(pages, device=device)[:listed].sort().values for _ in range(rows)])
    starts = torch.arange(0, listed * BLOCK_SIZE, BLOCK_SIZE, dtype=torch.int32, device=device)[None]
    lists = PageLists(chosen.int(), starts)
    tables = rotary_tables(listed * BLOCK_SIZE, shape, device)

    def run() -> tuple[Tensor, Tensor]:
        return gather_pages(*pools, lists, *tables, dtype=shape.dtype, backend=Backend.TRITON)

    def check() -> None:
        expected = gather_pages_torch(*pools, lists, *tables, dtype=torch.float32)
        for mine, reference in zip(run(), expected, strict=True):
            assert_matches(mine, reference)

    return KernelCase(
        name="gather_pages" + (", a list a head" if per_head else ""),
        shape=f"{listed} of {pages:,} pages of {BLOCK_SIZE}, {shape.kv_heads} heads of {shape.head_dim}",
        run=run,
        check=check,
        work=listed * BLOCK_SIZE * 4 * shape.kv_bytes,
        kind="bandwidth",
        baseline_name="torch.compile of indexing and rotation",
        baseline=_indexed(pools, chosen, tables, device),
    )


def _indexed(
    pools: list[Tensor], chosen: Tensor, tables: tuple[Tensor, Tensor], device: torch.device
) -> Callable[[], object]:
    def run() -> tuple[Tensor, Tensor]:
        if len(chosen) == 1:
            keys, values = (pool[chosen[0]].flatten(0, 1) for pool in pools)
        else:
            head = torch.arange(len(chosen), device=device)[:, None]
            keys, values = (pool[chosen, :, head].flatten(1, 2).transpose(0, 1) for pool in pools)
        return rotated(keys, *tables), values.contiguous()

    return compiled(run, device)
