"""Cache-Craft's selector: a budget for each chunk by how much its context matters, spent where that context is read."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ragkit.kernels.host_copy import to_device
from ragkit.kvcache.token_selection import ChunkSpan, FreshRows, SelectionScene, all_positions


class CacheCraft:
    """Each chunk's tokens that attend most to earlier chunks, more of them in chunks that lean on earlier chunks more.

    For chunk i with a_i = sum_j inter(i, j) / (|i| |j|) over the chunks j before it and b_i = intra(i) / |i|^2, where
    inter and intra are sums of attention weights:

        CCI_i = 1 / (1 + exp(-a_i / b_i))              how much its context matters
        CFO_i = alpha * CCI_i * (1 - beta'_i)          the share of its tokens that is recomputed
        the CFO_i * |i| tokens of highest inter-attention are recomputed

    Cache-Craft keeps a chunk's KV as some past prompt made it, with the weights of that prompt and their mean over the
    layers. Here a chunk's KV is made behind the prefix alone, in no prompt, so there are no past weights. They are
    measured in the prompt at hand instead: all tokens are computed up to one check layer, as the deviation
    selectors do, and that layer's weights, which are those of full prefill there, stand for the mean over all layers.

    The prefix overlap beta' is the share of a chunk's past context that stands before it again. A chunk made behind
    the prefix has met no other chunk, so beta' is 0 and no order is to be penalised; where it stands right behind that
    prefix nothing is missing, beta' is 1 and nothing is spent on it (`ChunkSpan.is_exact`). Chunks that were computed
    behind neighbours count as having met none. Attention to the prefix is neither inter nor intra.

    The paper tunes alpha on a workload; here it follows from the request's budget, which the chunks' parts sum to:
    what would exceed a chunk goes to the others, and parts are rounded by their largest remainders, not all up. Its
    stopping of unfocused chunks in upper layers is left out, so that this recomputes what the others do.

    Source: Cache-Craft, arXiv 2502.15734, equations 3 to 14.

    Args:
        check_layer: index of the layer whose attention is measured.
    """

    name = "cache-craft"
    meets_coverage = False

    def __init__(self, check_layer: int = 1) -> None:
        self._check_layer = check_layer

    def choose(self, scene: SelectionScene) -> Tensor:
        """Return all positions, or none where the budget is zero."""
        positions = all_positions(scene)
        return positions if scene.budget else positions[:0]

    def narrow(self, scene: SelectionScene, layer: int, chosen: Tensor, fresh: FreshRows) -> Tensor | None:
        """Return each chunk's tokens of highest inter-attention at the check layer."""
        if layer != self._check_layer or scene.budget >= len(chosen):
            return None
        inter, density, intra = fresh.chunk_attention()
        sizes = _sizes(scene.spans)
        sums = [part.sum(1) for part in torch.stack((density, intra)).double().split(sizes, 1)]
        impacts = [
            context_impact(of_density / size, of_intra / size**2) if size else 0.5
            for (of_density, of_intra), size in zip(torch.stack(sums).tolist(), sizes, strict=True)
        ]
        return _highest_of_each(inter, sizes, chunk_budgets(scene.spans, impacts, scene.budget))


def context_impact(inter: float, intra: float) -> float:
    """Return a chunk's CCI, from 0.5 (it reads no earlier chunk) up to 1.

    Args:
        inter: mean attention weight of its tokens for tokens of earlier chunks, summed over these chunks.
        intra: mean attention weight of its tokens for its own.
    """
    if inter == 0:
        return 0.5
    return 1 / (1 + math.exp(-inter / intra)) if intra > 0 else 1.0


def chunk_budgets(spans: Sequence[ChunkSpan], impacts: Sequence[float], budget: int) -> list[int]:
    """Return how many tokens of each chunk are recomputed: their sum is `budget`, none is above its chunk's size.

    Chunks whose KV is exact already get what is left when all others are recomputed whole.

    Args:
        spans: the chunks.
        impacts: the CCI of each, above zero.
        budget: at most all tokens of `spans`.
    """
    sizes = _sizes(spans)
    parts = [0] * len(sizes)
    for is_exact in (False, True):
        members = [index for index, span in enumerate(spans) if span.is_exact is is_exact]
        shared = _proportional(
            [sizes[index] for index in members],
            [impacts[index] for index in members],
            min(budget, sum(sizes[index] for index in members)),
        )
        for index, part in zip(members, shared, strict=True):
            parts[index] = part
        budget -= sum(shared)
    return parts


def _proportional(sizes: Sequence[int], impacts: Sequence[float], budget: int) -> list[int]:
    """Return whole parts that sum to `budget`, part i near min(1, alpha * impacts[i]) * sizes[i] for one alpha."""
    parts = list(sizes)
    open_, left, alpha = list(range(len(sizes))), budget, 0.0
    while open_:
        alpha = left / max(sum(impacts[index] * sizes[index] for index in open_), 1e-30)
        within = [index for index in open_ if alpha * impacts[index] < 1]
        if len(within) == len(open_):
            break
        left -= sum(sizes[index] for index in open_ if index not in within)  # these are recomputed whole
        open_ = within
    shares = {index: alpha * impacts[index] * sizes[index] for index in open_}
    for index, share in shares.items():
        parts[index] = math.floor(share)
    rounded = sorted(open_, key=lambda index: (parts[index] - shares[index], index))
    for index in rounded[: left - sum(parts[index] for index in open_)]:
        parts[index] += 1
    return parts


def _highest_of_each(scores: Tensor, sizes: Sequence[int], parts: Sequence[int]) -> Tensor:
    """Return (tokens,) bool: of each chunk's tokens the `parts[c]` with the highest scores, of equal ones the earlier.

    Args:
        scores: (tokens,), chunk after chunk.
        sizes: tokens of each chunk.
        parts: how many of each are wanted.
    """
    counts, wanted = to_device(torch.tensor((sizes, parts)), scores.device)
    chunk = torch.arange(len(sizes), device=scores.device).repeat_interleave(counts, output_size=len(scores))
    order = scores.argsort(descending=True, stable=True)
    order = order[chunk[order].argsort(stable=True)]  # chunk after chunk, each from its highest score down
    rank = torch.arange(len(scores), device=scores.device) - (counts.cumsum(0) - counts)[chunk]
    kept = torch.empty_like(chunk, dtype=torch.bool)
    kept[order] = rank < wanted[chunk]
    return kept


def _sizes(spans: Sequence[ChunkSpan]) -> list[int]:
    return [span.stop - span.start for span in spans]
