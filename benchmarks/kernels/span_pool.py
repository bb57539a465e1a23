"""Pooling of chunks out of token states at the shapes of BERT-large and of an embedder of 4,096 dimensions."""

from __future__ import annotations

import torch
from kernel_case import KernelCase
from kernel_inputs import compiled

from ragkit.kernels.backend import Backend
from ragkit.kernels.span_pool import LEAST_NORM, span_pool, span_pool_torch
from ragkit.kernels.testing import assert_matches


def cases(device: torch.device) -> list[KernelCase]:
    """Return chunks of 1 to 511 tokens, 256 in the mean, that tile a stream of states; on a CPU a small case."""
    if device.type == "cpu":
        return [_case(6, 40, torch.float32, device)]
    return [_case(512, 1024, torch.bfloat16, device), _case(128, 4096, torch.bfloat16, device)]


def _case(spans: int, dim: int, dtype: torch.dtype, device: torch.device) -> KernelCase:
    most = 511 if device.type == "cuda" else 7
    generator = torch.Generator().manual_seed(dim)
    lengths = torch.randint(1, most + 1, (spans,), generator=generator).to(device)
    stops = lengths.cumsum(0)
    starts, tokens = stops - lengths, int(lengths.sum())
    states = torch.randn(tokens, dim, device=device).to(dtype)

    def segments() -> object:
        mean = torch.segment_reduce(states.float(), "mean", lengths=lengths, axis=0)
        return torch.nn.functional.normalize(mean, eps=LEAST_NORM)

    return KernelCase(
        name="span_pool",
        shape=f"{spans:,} chunks of {tokens:,} tokens, {dim:,} channels",
        run=lambda: span_pool(states, starts, stops, backend=Backend.TRITON),
        check=lambda: assert_matches(
            span_pool(states, starts, stops, backend=Backend.TRITON), span_pool_torch(states.float(), starts, stops)
        ),
        work=states.nbytes + spans * (4 * dim + 16),
        kind="bandwidth",
        baseline_name="torch.compile of segment_reduce",
        baseline=compiled(segments, device),
    )
