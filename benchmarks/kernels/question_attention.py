"""Attention of a question over a long prompt, and the mass each row receives, at the shape of Llama 3 8B."""

from __future__ import annotations

from collections.abc import Callable

import torch
from kernel_case import KernelCase
from kernel_inputs import compiled, kv_rows, model_shape, normal, rotary_tables, rotated
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ragkit.kernels.backend import Backend
from ragkit.kernels.question_attention import question_attention, question_attention_torch
from ragkit.kernels.testing import assert_matches


def cases(device: torch.device) -> list[KernelCase]:
    """Return questions of 24 and 64 tokens behind 8K and 32K rows, with and without mass; on a CPU small ones."""
    lengths, questions = ((8192, 32768), (24, 64)) if device.type == "cuda" else ((200,), (8,))
    return [
        _case(rows, tokens, with_mass, device)
        for rows in lengths
        for tokens in questions
        for with_mass in (False, True)
    ]


def _case(rows: int, tokens: int, with_mass: bool, device: torch.device) -> KernelCase:
    shape = model_shape(device)
    queries = normal(tokens, shape.q_heads, shape.head_dim, shape=shape, device=device)
    inputs = [queries, kv_rows(rows, shape, device), kv_rows(rows, shape, device), *rotary_tables(rows, shape, device)]
    options = {"first_position": rows - tokens, "scale": shape.head_dim**-0.5, "with_mass": with_mass}

    def run() -> tuple[Tensor, Tensor]:
        return question_attention(*inputs, **options, backend=Backend.TRITON)

    def check() -> None:
        out, mass = run()
        expected = question_attention_torch(*(part.float() for part in inputs), **options)
        assert_matches(out, expected[0], reduced=4)
        assert_matches(mass.to(out.dtype), expected[1], reduced=4)

    return KernelCase(
        name="question_attention" + (", mass" if with_mass else ""),
        shape=f"{tokens} tokens over {rows:,} rows, {shape.heads}",
        run=run,
        check=check,
        # Keys once or twice, values once, and the angles as often as the keys.
        work=rows * shape.kv_bytes * (3 if with_mass else 2) + rows * shape.head_dim * 4 * (2 if with_mass else 1),
        kind="bandwidth",
        baseline_name="torch.compile of softmax over all scores" if with_mass else "rotation compiled, then SDPA",
        baseline=(_materialised if with_mass else _attended)(inputs, rows - tokens, device),
    )


def _materialised(inputs: list[Tensor], first: int, device: torch.device) -> Callable[[], object]:
    """Return what holds all scores in memory at once."""
    queries, keys, values, cos, sin = inputs
    tokens, q_heads, head_dim = queries.shape
    kv_heads = keys.shape[1]
    hidden = torch.arange(len(keys), device=device) > first + torch.arange(tokens, device=device)[:, None]

    def run() -> tuple[Tensor, Tensor]:
        grouped = queries.view(tokens, kv_heads, -1, head_dim).permute(1, 2, 0, 3).flatten(1, 2)
        scores = torch.bmm(grouped, rotated(keys, cos, sin).permute(1, 2, 0)).float() * head_dim**-0.5
        shaped = scores.view(kv_heads, -1, tokens, len(keys)).masked_fill(hidden, float("-inf"))
        weights = shaped.softmax(dim=-1)
        out = torch.bmm(weights.flatten(1, 2).to(values.dtype), values.transpose(0, 1))
        return out.view(q_heads, tokens, head_dim).transpose(0, 1), weights.sum((0, 1, 2))

    return compiled(run, device)


def _attended(inputs: list[Tensor], first: int, device: torch.device) -> Callable[[], object]:
    """Return torch's fused attention over keys that are rotated for it each time."""
    queries, keys, values, cos, sin = inputs
    tokens, q_heads, head_dim = queries.shape
    kv_heads = keys.shape[1]
    seen = torch.arange(len(keys), device=device) <= first + torch.arange(tokens, device=device)[:, None]
    # Query heads that share a key head stand behind each other as if they were tokens: nothing is repeated.
    seen = seen.repeat(q_heads // kv_heads, 1)
    grouped = queries.view(tokens, kv_heads, -1, head_dim).permute(1, 2, 0, 3).flatten(1, 2).unsqueeze(0)
    rotate = compiled(lambda: rotated(keys, cos, sin), device)

    def run() -> Tensor:
        heads = [part.transpose(0, 1).unsqueeze(0) for part in (rotate(), values)]
        return scaled_dot_product_attention(grouped, *heads, attn_mask=seen)

    return run
