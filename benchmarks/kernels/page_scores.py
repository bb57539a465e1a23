"""Scores of the pages of documents up to a million tokens, in pages of 64, at the shape of Llama 3 8B."""

from __future__ import annotations

from collections.abc import Callable

import torch
from kernel_case import KernelCase
from kernel_inputs import ModelShape, compiled, model_shape, normal
from torch import Tensor

from ragkit.kernels.backend import Backend
from ragkit.kernels.page_scores import KeyBounds, Pooling, page_scores, page_scores_torch
from ragkit.kernels.testing import assert_matches


def cases(device: torch.device) -> list[KernelCase]:
    """Return one query over 2K and 16K pages by mean keys and by bounds, 8 and 512 of a window; on a CPU small cases.

    Eight are what a window votes by while a document is read. The last of the small ones has so many tiles of pages
    that they are merged by a launch of their own.
    """
    if device.type == "cpu":
        small = [_case(1, 40, parts, pooling, device) for parts in (0, 2) for pooling in Pooling]
        return [*small, _case(64, 528, 1, Pooling.VOTE, device)]
    return [
        *(
            _case(1, pages, parts, pooling, device)
            for pages in (2048, 16384)
            for parts in (0, 1, 4)
            for pooling in (Pooling.MAX, Pooling.VOTE)
        ),
        *(_case(8, pages, 1, Pooling.VOTE, device) for pages in (2048, 16384)),
        _case(512, 4096, 0, Pooling.MAX, device),
        _case(512, 4096, 0, Pooling.VOTE, device),
    ]


def _case(tokens: int, pages: int, bounded: int, pooling: Pooling, device: torch.device) -> KernelCase:
    """Return a case of one mean key a page, or of the bounds of `bounded` parts of each."""
    shape = model_shape(device)
    queries = normal(tokens, shape.q_heads, shape.head_dim, shape=shape, device=device)
    size = (pages, max(1, bounded), shape.kv_heads, shape.head_dim)
    sides = [normal(*size, shape=shape, device=device) for _ in range(2 if bounded else 1)]
    summaries = KeyBounds(torch.minimum(*sides), torch.maximum(*sides)) if bounded else sides[0]
    options = {"pooling": pooling, "per_head": False, "scale": shape.head_dim**-0.5}

    def run() -> Tensor:
        return page_scores(queries, summaries, **options, backend=Backend.TRITON)

    def check() -> None:
        assert_matches(run(), page_scores_torch(queries, summaries, **options), reduced=4)

    read = sum(side.nbytes for side in sides)
    # Every product once; those of a whole window are many for each byte.
    work = 2.0 * tokens * shape.q_heads * shape.head_dim * pages * len(sides) if tokens > 8 else read + 4 * pages
    return KernelCase(
        name=f"page_scores, {pooling}",
        shape=f"{tokens} tokens, {pages:,} pages of {f'{bounded} bounds' if bounded else 'a mean'}, {shape.heads}",
        run=run,
        check=check,
        work=work,
        kind="bandwidth" if tokens <= 8 else "compute",
        baseline_name="torch.compile of products and pooling",
        baseline=_materialised(queries, sides, shape, options, device),
    )


def _materialised(
    queries: Tensor, sides: list[Tensor], shape: ModelShape, options: dict[str, object], device: torch.device
) -> Callable[[], object]:
    """Return what holds the products of all voters in memory."""
    grouped = queries.unflatten(1, (shape.kv_heads, -1)).transpose(0, 1).flatten(1, 2).contiguous()
    signed = (grouped.clamp(max=0), grouped.clamp(min=0)) if len(sides) == 2 else (grouped,)

    def run() -> Tensor:
        products = [
            torch.bmm(part, side.permute(2, 3, 1, 0).flatten(2)) for part, side in zip(signed, sides, strict=True)
        ]
        scores = sum(product.float() for product in products).unflatten(2, (sides[0].shape[1], -1)).amax(dim=2)
        voters = (scores * options["scale"]).flatten(0, 1)
        return voters.amax(dim=0) if options["pooling"] is Pooling.MAX else voters.softmax(dim=1).sum(dim=0)

    return compiled(run, device)
