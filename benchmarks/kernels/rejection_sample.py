"""Which drafts of a chain stand, over the vocabulary of Llama 3."""

from __future__ import annotations

import torch
from kernel_case import KernelCase
from torch import Tensor

from ragkit.kernels.backend import Backend
from ragkit.kernels.rejection_sample import ChainOutcome, rejection_sample, rejection_sample_torch


def cases(device: torch.device) -> list[KernelCase]:
    """Return chains of 8 tokens, greedy, drawn by the model alone and by a drafter; on a CPU small ones."""
    sizes = [(1, 8), (8, 8)] if device.type == "cuda" else [(2, 3)]
    return [_case(*size, kind, device) for size in sizes for kind in ("greedy", "certain drafts", "drawn drafts")]


def _case(requests: int, nodes: int, kind: str, device: torch.device) -> KernelCase:
    vocab, dtype = (128256, torch.bfloat16) if device.type == "cuda" else (700, torch.float32)
    logits = (torch.randn(requests, nodes + 1, vocab, device=device) * 3).to(dtype)
    probabilities, drafts = None, logits[:, :nodes].argmax(-1)
    if kind == "drawn drafts":
        noise = torch.randn(requests, nodes, vocab, device=device)
        probabilities = (logits[:, :nodes].float() + noise).softmax(-1)
        drafts = torch.multinomial(probabilities.flatten(0, 1), 1).view(requests, nodes)
    temperatures = torch.full((requests,), 0.0 if kind == "greedy" else 1.0, device=device)
    lengths = torch.full((requests,), nodes, device=device)
    uniforms = torch.rand(requests, nodes + 1, 2, device=device)
    inputs = (logits, drafts, lengths, temperatures, uniforms, probabilities)

    def run() -> ChainOutcome:
        return rejection_sample(*inputs, backend=Backend.TRITON)

    def check() -> None:
        got, expected = run(), rejection_sample_torch(*inputs)
        assert torch.equal(got.accepted, expected.accepted), (got.accepted, expected.accepted)
        if kind == "greedy":
            assert torch.equal(got.tokens, expected.tokens), (got.tokens, expected.tokens)

    def by_torch() -> Tensor:
        if kind == "greedy":
            return logits.argmax(-1)
        target = (logits.float() / temperatures.view(-1, 1, 1)).softmax(-1)
        if probabilities is not None:
            target = torch.cat(((target[:, :nodes] - probabilities).clamp_(min=0), target[:, nodes:]), dim=1)
        return torch.multinomial(target.flatten(0, 1), 1)

    reads = 1 if kind == "greedy" else 2 if probabilities is None else 3
    proposed = 0 if probabilities is None else 2 * probabilities.nbytes
    return KernelCase(
        name=f"rejection_sample, {kind}",
        shape=f"{requests} x {nodes} tokens of {vocab:,}",
        run=run,
        check=check,
        work=reads * logits.nbytes + proposed,
        kind="bandwidth",
        baseline_name="torch.argmax" if kind == "greedy" else "torch softmax and multinomial of every row",
        baseline=by_torch,
    )
