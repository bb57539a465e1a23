"""Selected-query attention at the shape of Llama 3 8B: a share of the prompt's rows and a question behind them."""

from __future__ import annotations

import torch
from kernel_case import KernelCase, attention_flops, selected_positions
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ragkit.kernels.backend import Backend
from ragkit.kernels.selected_attention import selected_attention, selected_attention_torch
from ragkit.kernels.testing import assert_matches

QUESTION = 60


def cases(device: torch.device) -> list[KernelCase]:
    """Return 15% and 5% of 8K, 16K and 32K rows; on a CPU one small case."""
    if device.type == "cpu":
        return [_case(100, 0.15, 10, 4, 2, 64, device)]
    return [_case(rows, share, QUESTION, 32, 8, 128, device) for share in (0.15, 0.05) for rows in (8192, 16384, 32768)]


def _case(
    rows: int, share: float, question: int, q_heads: int, kv_heads: int, head_dim: int, device: torch.device
) -> KernelCase:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    positions = selected_positions(rows, share, question, device)
    queries = torch.randn(len(positions), q_heads, head_dim, device=device, dtype=dtype)
    keys, values = (torch.randn(rows, kv_heads, head_dim, device=device, dtype=dtype) for _ in range(2))
    scale = head_dim**-0.5
    # The baseline reads a mask and keys repeated for every query head, both made beforehand.
    mask = torch.arange(rows, device=device) <= positions.unsqueeze(1)
    heads = [part.repeat_interleave(q_heads // part.shape[1], dim=1) for part in (queries, keys, values)]
    heads = [part.transpose(0, 1).unsqueeze(0) for part in heads]

    def run() -> Tensor:
        return selected_attention(queries, keys, values, positions, scale=scale, backend=Backend.TRITON)

    def check() -> None:
        wide = (part.float() for part in (queries, keys, values))
        assert_matches(run(), selected_attention_torch(*wide, positions, scale=scale), reduced=4)

    return KernelCase(
        name="selected_attention",
        shape=f"{share:.0%} + {question} of {rows:,} rows, {q_heads}/{kv_heads} heads of {head_dim}",
        run=run,
        check=check,
        work=attention_flops(positions, q_heads, head_dim),
        kind="compute",
        baseline_name="SDPA with a boolean mask",
        baseline=lambda: scaled_dot_product_attention(*heads, attn_mask=mask, scale=scale),
    )
