"""The losses of tokens under the logits of a vocabulary as large as Qwen2.5's."""

from __future__ import annotations

import torch
from kernel_case import KernelCase
from kernel_inputs import compiled, model_shape, normal

from ragkit.kernels.backend import Backend
from ragkit.kernels.cross_entropy import cross_entropy, cross_entropy_torch
from ragkit.kernels.testing import assert_matches


def cases(device: torch.device) -> list[KernelCase]:
    """Return 2K tokens; on a CPU a small case."""
    tokens, vocab_size = (2048, 151_936) if device.type == "cuda" else (20, 500)
    logits = normal(tokens, vocab_size, shape=model_shape(device), device=device)
    targets = torch.arange(tokens, device=device)
    return [
        KernelCase(
            name="cross_entropy",
            shape=f"{tokens:,} x {vocab_size:,}",
            run=lambda: cross_entropy(logits, targets, backend=Backend.TRITON),
            check=lambda: assert_matches(
                cross_entropy(logits, targets, backend=Backend.TRITON), cross_entropy_torch(logits, targets)
            ),
            work=logits.nbytes,
            kind="bandwidth",
            baseline_name="torch.compile",
            baseline=compiled(lambda: cross_entropy_torch(logits, targets), device),
        )
    ]
