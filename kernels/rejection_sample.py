# ruff: noqa: ANN001, ANN202 (Triton reads the annotations of kernels, and pointers have none)
# mypy: disable-error-code="no-untyped-def"
"""Which drafted tokens of a chain stand, and the token behind them, from the model's logits alone.

    p_i = softmax(logits_i / temperature)
    drawn drafts:       x_i ~ q_i stands where u_i q_i(x_i) < p_i(x_i); else one is drawn from norm(max(p_i - q_i, 0))
    certain drafts:     a token is drawn from p_i, and x_i stands where it is that token
    temperature 0:      x_i stands where it is the most likely token

Behind the first draft that falls nothing stands. Behind the last one a token is drawn from p. The result has the
model's own distribution, and follows from the uniform numbers: the host waits for nothing but two integers a request.

Source: speculative sampling, arXiv 2211.17192, theorem 1; tokens are drawn by inverting the cumulative distribution.
Cost: reads the logits of each row once for its sum, and once more to draw; bandwidth bound, far below a step.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ragkit.errors import KernelInputError
from ragkit.kernels.backend import Backend, next_power_of_2, resolve_backend, tl
from ragkit.kernels.launched import launched

_MOST_LOGITS = 8192  # of a row, treated at a time


class ChainOutcome(NamedTuple):
    """What stands of a chain.

    Attributes:
        accepted: (requests,) int64, drafted tokens that stand.
        tokens: (requests,) int64, the token behind them.
    """

    accepted: Tensor
    tokens: Tensor


def rejection_sample(
    logits: Tensor,
    drafts: Tensor,
    lengths: Tensor,
    temperatures: Tensor,
    uniforms: Tensor,
    probabilities: Tensor | None = None,
    *,
    backend: Backend | None = None,
) -> ChainOutcome:
    """Return how many tokens of each request's chain stand, and what follows them.

    Args:
        logits: (requests, nodes + 1, vocab_size), after the last token and after each drafted one; contiguous.
        drafts: (requests, nodes) int64.
        lengths: (requests,) int64, drafted tokens of each request; logits behind them are ignored.
        temperatures: (requests,) fp32; 0 takes the most likely token.
        uniforms: (requests, nodes + 1, 2) fp32 in [0, 1): whether a draft stands, and which token is drawn.
        probabilities: (requests, nodes, vocab_size) fp32, contiguous: q of drawn drafts; None where none was drawn.
        backend: an implementation to insist on.

    Raises:
        KernelInputError: shapes or types do not fit.
    """
    _check_inputs(logits, drafts, lengths, temperatures, uniforms, probabilities)
    if resolve_backend(logits, backend) is Backend.TORCH:
        return rejection_sample_torch(logits, drafts, lengths, temperatures, uniforms, probabilities)
    requests, rows, vocab = logits.shape
    tokens = torch.empty((requests, rows), dtype=torch.int64, device=logits.device)
    stands = torch.empty((requests, rows), dtype=torch.uint8, device=logits.device)
    if requests:
        block = min(_MOST_LOGITS, next_power_of_2(vocab))
        _rejection_sample_kernel[(requests, rows)](
            logits, drafts, lengths, temperatures, uniforms, logits if probabilities is None else probabilities,
            tokens, stands, vocab, IS_DRAWN=probabilities is not None, BLOCK=block,
            num_warps=max(1, min(16, block // 512)),
        )  # fmt: skip
    return _settled(tokens, stands)


def rejection_sample_torch(
    logits: Tensor,
    drafts: Tensor,
    lengths: Tensor,
    temperatures: Tensor,
    uniforms: Tensor,
    probabilities: Tensor | None = None,
) -> ChainOutcome:
    """Return what `rejection_sample` returns: the definition, in fp64."""
    requests, rows, _ = logits.shape
    likely = logits.argmax(-1)
    greedy = (temperatures == 0).unsqueeze(1)
    scaled = logits.double() / torch.where(greedy, 1.0, temperatures.double().unsqueeze(1)).unsqueeze(2)
    target = scaled.softmax(-1)
    index = torch.arange(rows, device=logits.device)
    is_draft = index < lengths.unsqueeze(1)
    padded = torch.cat((drafts, drafts.new_zeros(requests, 1)), dim=1)
    remaining = target
    tested = torch.zeros_like(is_draft)
    if probabilities is not None:
        proposal = torch.cat((probabilities.double(), torch.zeros_like(target[:, :1])), dim=1)
        proposal = torch.where(is_draft.unsqueeze(2), proposal, 0.0)
        p, q = (part.gather(2, padded.unsqueeze(2)).squeeze(2) for part in (target, proposal))
        tested = (uniforms[..., 0].double() * q < p) & is_draft
        left = (target - proposal).clamp(min=0)
        remaining = torch.where((left.sum(-1, keepdim=True) > 0), left, target)
    reached = remaining.cumsum(-1)
    goal = uniforms[..., 1:].double() * reached[..., -1:]
    drawn = torch.searchsorted(reached, goal, right=True).squeeze(2).clamp(max=logits.shape[2] - 1)
    tokens = torch.where(greedy, likely, drawn)
    same = (tokens == padded) & is_draft
    stands = torch.where(greedy, same, tested) if probabilities is not None else same
    return _settled(tokens, stands)


def _settled(tokens: Tensor, stands: Tensor) -> ChainOutcome:
    """Return the outcome from what each row says; the last row has no draft."""
    accepted = (stands[:, :-1] > 0).cumprod(1).sum(1)
    return ChainOutcome(accepted, tokens.gather(1, accepted.unsqueeze(1)).squeeze(1))


def _check_inputs(
    logits: Tensor,
    drafts: Tensor,
    lengths: Tensor,
    temperatures: Tensor,
    uniforms: Tensor,
    probabilities: Tensor | None,
) -> None:
    if logits.dim() != 3 or not logits.shape[1] or not logits.shape[2] or not logits.is_contiguous():
        raise KernelInputError(f"logits must be (requests, nodes + 1, vocab_size), got {tuple(logits.shape)}")
    requests, rows, vocab = logits.shape
    expected = {
        "drafts": (drafts, (requests, rows - 1), torch.int64),
        "lengths": (lengths, (requests,), torch.int64),
        "temperatures": (temperatures, (requests,), torch.float32),
        "uniforms": (uniforms, (requests, rows, 2), torch.float32),
    }
    if probabilities is not None:
        expected["probabilities"] = (probabilities, (requests, rows - 1, vocab), torch.float32)
    for name, (tensor, shape, dtype) in expected.items():
        if tensor.shape != shape or tensor.dtype != dtype or not tensor.is_contiguous():
            raise KernelInputError(
                f"{name} must be {shape} {dtype}, contiguous, got {tuple(tensor.shape)} {tensor.dtype}"
            )


@launched(do_not_specialize=("vocab",))
def _rejection_sample_kernel(
    logit_ptr, draft_ptr, length_ptr, temperature_ptr, uniform_ptr, probability_ptr, token_ptr, stands_ptr, vocab,
    IS_DRAWN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # This program says of one row which token it gives, and whether the token drafted there stands.
    request, row = tl.program_id(0).to(tl.int64), tl.program_id(1)
    rows = tl.num_programs(1)
    at = request * rows + row
    is_draft = row < tl.load(length_ptr + request)
    temperature = tl.load(temperature_ptr + request)
    draft = tl.load(draft_ptr + request * (rows - 1) + row, mask=is_draft, other=-1)
    logit_at = logit_ptr + at * vocab
    probability_at = probability_ptr + (request * (rows - 1) + row) * vocab
    rate = 1.4426950408889634 / tl.where(temperature > 0, temperature, 1.0)  # powers of two
    index = tl.arange(0, BLOCK)
    proposed_tokens = tl.where(is_draft, vocab, 0)  # that q is known of

    highest = float("-inf")
    total = 0.0
    token = vocab
    for start in range(0, vocab, BLOCK):
        logit = tl.load(logit_at + start + index, mask=start + index < vocab, other=float("-inf")).to(tl.float32)
        of_block = tl.max(logit, axis=0)
        first = start + tl.min(tl.where(logit == of_block, index, BLOCK), axis=0)
        token = tl.where(of_block > highest, first, token)
        new_highest = tl.maximum(highest, of_block)
        base = tl.where(new_highest == float("-inf"), 0.0, new_highest)
        total = total * tl.exp2((highest - base) * rate) + tl.sum(tl.exp2((logit - base) * rate), axis=0)
        highest = new_highest
    stands = token == draft

    if temperature > 0:
        takes_rest = is_draft & IS_DRAWN
        mass = total
        if IS_DRAWN:
            test = tl.load(uniform_ptr + at * 2)
            wanted = tl.load(logit_at + draft, mask=is_draft, other=0.0).to(tl.float32)
            proposed = tl.load(probability_at + draft, mask=is_draft, other=0.0)
            stands = is_draft & (test * proposed * total < tl.exp2((wanted - highest) * rate))
            rest = 0.0
            for start in range(0, vocab, BLOCK):
                inside = start + index < vocab
                logit = tl.load(logit_at + start + index, mask=inside, other=float("-inf")).to(tl.float32)
                other = tl.load(probability_at + start + index, mask=start + index < proposed_tokens, other=0.0)
                rest += tl.sum(tl.maximum(tl.exp2((logit - highest) * rate) - other * total, 0.0), axis=0)
            takes_rest = takes_rest & (rest > 0)
            mass = tl.where(takes_rest, rest, total)
        goal = tl.load(uniform_ptr + at * 2 + 1) * mass
        before = 0.0
        token = vocab
        last = 0  # the last token that can be drawn, for a goal that rounding puts behind all
        for start in range(0, vocab, BLOCK):
            inside = start + index < vocab
            logit = tl.load(logit_at + start + index, mask=inside, other=float("-inf")).to(tl.float32)
            own = tl.exp2((logit - highest) * rate)
            if IS_DRAWN:
                other = tl.load(probability_at + start + index, mask=start + index < proposed_tokens, other=0.0)
                own = tl.where(takes_rest, tl.maximum(own - other * total, 0.0), own)
            reached = before + tl.cumsum(own, axis=0)
            found = tl.min(tl.where((reached > goal) & (own > 0), start + index, vocab), axis=0)
            token = tl.minimum(token, found)
            last = tl.maximum(last, tl.max(tl.where(own > 0, start + index, 0), axis=0))
            before += tl.sum(own, axis=0)
        token = tl.where(token < vocab, token, last)
        if not IS_DRAWN:
            stands = token == draft

    tl.store(token_ptr + at, token.to(tl.int64))
    tl.store(stands_ptr + at, stands.to(tl.uint8))
