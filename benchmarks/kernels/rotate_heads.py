"""Turning the keys of a prompt's earlier rows at the shape of Llama 3 8B."""

from __future__ import annotations

import torch
from kernel_case import KernelCase
from kernel_inputs import compiled, model_shape, normal, rotary_tables, rotated

from ragkit.kernels.backend import Backend
from ragkit.kernels.rotate_heads import rotate_heads, rotate_heads_torch
from ragkit.kernels.testing import assert_matches

PROMPT = 32768


def cases(device: torch.device) -> list[KernelCase]:
    """Return all rows of 32K tokens, and one chunk; on a CPU a small case."""
    return [_case(tokens, device) for tokens in ((PROMPT, 512) if device.type == "cuda" else (20,))]


def _case(tokens: int, device: torch.device) -> KernelCase:
    shape = model_shape(device)
    keys = normal(tokens, shape.kv_heads, shape.head_dim, shape=shape, device=device)
    cos, sin = rotary_tables(tokens, shape, device)
    where = torch.arange(tokens, device=device)

    def check() -> None:
        turned = rotate_heads(keys, cos, sin, where, backend=Backend.TRITON)
        assert_matches(turned, rotate_heads_torch(keys.float(), cos, sin, where))

    return KernelCase(
        name="rotate_heads",
        shape=f"{tokens:,} tokens, {shape.kv_heads} heads",
        run=lambda: rotate_heads(keys, cos, sin, where, backend=Backend.TRITON),
        check=check,
        work=keys.nbytes * 2 + cos.nbytes * 2 + where.nbytes,
        kind="bandwidth",
        baseline_name="torch.compile",
        baseline=compiled(lambda: rotated(keys, cos[where], sin[where]), device),
    )
