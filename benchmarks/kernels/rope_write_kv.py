"""RoPE and KV write at the shape of Llama 3 8B, on queries, keys and values of one fused projection."""

from __future__ import annotations

import torch
from kernel_case import KernelCase
from kernel_inputs import compiled, empty_pool, model_shape, normal, rotary_tables, rotated, scattered_blocks

from ragkit.kernels.backend import Backend
from ragkit.kernels.rope_write_kv import rope_write_kv, rope_write_kv_torch
from ragkit.kernels.testing import assert_matches

PROMPT = 32768


def cases(device: torch.device) -> list[KernelCase]:
    """Return a prefill of 32K tokens, and 15% of it at scattered positions, also copied there; on a CPU small cases."""
    some, prompt = (20, 64) if device.type == "cpu" else (int(0.15 * PROMPT), PROMPT)
    whole = [] if device.type == "cpu" else [_case(prompt, prompt, device)]
    return [*whole, _case(some, prompt, device), _copied(some, prompt, device)]


def _copied(tokens: int, positions: int, device: torch.device) -> KernelCase:
    shape = model_shape(device)
    sizes = [shape.q_heads, shape.kv_heads, shape.kv_heads]
    qkv = normal(tokens, sum(sizes), shape.head_dim, shape=shape, device=device)
    where = torch.randperm(positions, device=device)[:tokens].sort().values
    slots = scattered_blocks(positions, device)[1][where]
    cos, sin = rotary_tables(positions, shape, device)
    pools = [empty_pool(positions, shape, device) for _ in range(2)]
    copies = [torch.zeros((positions, shape.kv_heads, shape.head_dim), dtype=shape.dtype, device=device) for _ in "kv"]

    def run() -> None:
        rope_write_kv(
            *qkv.split(sizes, dim=1), where, slots, cos, sin, *pools, rotate_keys=False,
            rotated_keys=copies[0], plain_values=copies[1], backend=Backend.TRITON,
        )  # fmt: skip

    def check() -> None:
        wide = qkv.to(torch.float32, copy=True)
        expected = [torch.zeros_like(part, dtype=torch.float32) for part in (*pools, *copies)]
        rope_write_kv_torch(
            *wide.split(sizes, dim=1), where, slots, cos, sin, *expected[:2], rotate_keys=False,
            rotated_keys=expected[2], plain_values=expected[3],
        )  # fmt: skip
        run()
        for copy, reference in zip(copies, expected[2:], strict=True):
            assert_matches(copy, reference)

    head_bytes = shape.head_dim * shape.dtype.itemsize
    return KernelCase(
        name="rope_write_kv, copied",
        shape=f"{tokens:,} tokens, {shape.heads}",
        run=run,
        check=check,
        # Reads all heads; writes queries in place, and keys and values into the pool and behind each other.
        work=tokens * ((2 * shape.q_heads + 6 * shape.kv_heads) * head_bytes + shape.head_dim * 4 + 16),
        kind="bandwidth",
    )


def _case(tokens: int, positions: int, device: torch.device) -> KernelCase:
    shape = model_shape(device)
    sizes = [shape.q_heads, shape.kv_heads, shape.kv_heads]
    qkv = normal(tokens, sum(sizes), shape.head_dim, shape=shape, device=device)
    queries, keys, values = qkv.split(sizes, dim=1)
    where = torch.randperm(positions, device=device)[:tokens].sort().values
    slots = scattered_blocks(positions, device)[1][where]
    cos, sin = rotary_tables(positions, shape, device)
    pools = [empty_pool(positions, shape, device) for _ in range(2)]

    def run() -> None:  # rotates what it rotated before: the size of the numbers stays
        rope_write_kv(queries, keys, values, where, slots, cos, sin, *pools, rotate_keys=True, backend=Backend.TRITON)

    def check() -> None:
        wide = qkv.to(torch.float32, copy=True)
        expected = [torch.zeros_like(pool, dtype=torch.float32) for pool in pools]
        rope_write_kv_torch(*wide.split(sizes, dim=1), where, slots, cos, sin, *expected, rotate_keys=True)
        run()
        assert_matches(qkv, wide)
        for pool, reference in zip(pools, expected, strict=True):
            assert_matches(pool.flatten(0, 1)[slots], reference.flatten(0, 1)[slots])

    def baseline() -> None:
        pools[0].flatten(0, 1)[slots] = keys
        pools[1].flatten(0, 1)[slots] = values
        for heads in (queries, keys):
            heads.copy_(rotated(heads, cos[where], sin[where]))

    head_bytes = shape.head_dim * shape.dtype.itemsize
    return KernelCase(
        name="rope_write_kv",
        shape=f"{tokens:,} tokens, {shape.heads}",
        run=run,
        check=check,
        # Reads all heads; writes queries and keys in place, and keys and values into the pool.
        work=tokens * ((2 * shape.q_heads + 5 * shape.kv_heads) * head_bytes + shape.head_dim * 4 + 16),
        kind="bandwidth",
        baseline_name="torch.compile",
        baseline=compiled(baseline, device),
    )
