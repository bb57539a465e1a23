"""Change propagation over the chunks of one prompt at the shape of Llama 3 8B."""

from __future__ import annotations

import torch
from kernel_case import KernelCase
from kernel_inputs import ModelShape, compiled, empty_pool, kv_rows, model_shape, rotary_tables, rotated
from kernel_inputs import scattered_blocks as scattered
from torch import Tensor

from ragkit.kernels.backend import Backend
from ragkit.kernels.propagate_change import propagate_change, propagate_change_torch
from ragkit.kernels.propagation_plan import PropagationPlan, plan_propagation
from ragkit.kernels.testing import assert_matches

CHUNK = 256
SIGMA = 96.0
STRENGTHS = {"key_strength": 0.5, "value_strength": 1.0}


def cases(device: torch.device) -> list[KernelCase]:
    """Return 15% and 5% of 32K rows: into the pool alone, with a rotated copy, and of pooled rows; small on a CPU."""
    rows, shares = (32768, (0.15, 0.05)) if device.type == "cuda" else (2 * CHUNK, (0.15,))
    forms = ((False, False), (True, False), (True, True))
    return [_case(rows, share, *form, device) for share in shares for form in forms]


def _case(rows: int, share: float, copies: bool, pooled: bool, device: torch.device) -> KernelCase:
    shape = model_shape(device)
    selected = torch.randperm(rows, device=device)[: int(rows * share)].sort().values
    starts = torch.arange(0, rows + 1, CHUNK, device=device)
    plan = plan_propagation(selected, starts, torch.searchsorted(selected, starts), SIGMA)
    cached, fresh = ([kv_rows(count, shape, device) for _ in range(2)] for count in (rows, len(selected)))
    slots, pools = scattered(rows, device)[1], [empty_pool(rows, shape, device) for _ in range(2)]
    options: dict[str, object] = dict(STRENGTHS)
    placed: list[Tensor] = []
    if copies:
        cos, sin = rotary_tables(rows, shape, device)
        placed = [torch.empty_like(part) for part in cached]
        options |= {"cos": cos, "sin": sin, "rotated_keys": placed[0], "plain_values": placed[1]}
    places = scattered(rows, device)[1] if pooled else None
    lying = cached if places is None else [torch.empty_like(part).index_copy_(0, places, part) for part in cached]

    def run() -> None:
        propagate_change(*lying, *fresh, plan, slots, *pools, **options, places=places, backend=Backend.TRITON)

    def check() -> None:
        run()
        got = [*(pool.flatten(0, 1)[slots] for pool in pools), *(part.clone() for part in placed)]
        wide = [[part.float() for part in group] for group in (cached, fresh)]
        expected = [pool.float() for pool in pools]
        changed = {"rotated_keys": placed[0].float(), "plain_values": placed[1].float()} if copies else {}
        propagate_change_torch(*wide[0], *wide[1], plan, slots, *expected, **(options | changed))
        references = [*(pool.flatten(0, 1)[slots] for pool in expected), *changed.values()]
        for mine, reference in zip(got, references, strict=True):
            assert_matches(mine, reference, reduced=2)

    return KernelCase(
        name="propagate_change" + (", rotated copy" if copies else "") + (" of pooled rows" if pooled else ""),
        shape=f"{len(selected):,} of {rows:,} rows recomputed, chunks of {CHUNK}, {shape.heads}",
        run=run,
        check=check,
        work=_bytes(rows, len(selected), copies, shape),
        kind="bandwidth",
        baseline_name="torch.compile of one padded matrix product and index writes",
        baseline=compiled(_padded(cached, fresh, plan, slots, pools, options), device),
    )


def _bytes(rows: int, selected: int, copies: bool, shape: ModelShape) -> float:
    """Return what must be read and written: each cached and fresh row once, each result once or twice."""
    moved = 2 * shape.kv_bytes * (rows * (3 if copies else 2) + selected)
    return moved + rows * (8 + 4) + copies * rows * shape.head_dim * 4


def _padded(
    cached: list[Tensor],
    fresh: list[Tensor],
    plan: PropagationPlan,
    slots: Tensor,
    pools: list[Tensor],
    options: dict[str, object],
) -> object:
    """Return the same for chunks of one length, whose weights and recomputed rows are padded to one size."""
    first = [block.entries.start for block in plan.blocks]
    counts = [block.weights.shape[1] for block in plan.blocks]
    weights = cached[0].new_zeros(len(counts), CHUNK, max(counts))
    for index, block in enumerate(plan.blocks):
        weights[index, :, : counts[index]] = block.weights.to(weights.dtype)
    entries = torch.tensor(first, device=slots.device)[:, None] + torch.arange(max(counts), device=slots.device)
    entries = entries.clamp_max(len(plan.selected) - 1)

    def run() -> None:
        for index, (old, new, pool) in enumerate(zip(cached, fresh, pools, strict=True)):
            change = (new - old[plan.selected]) * tuple(STRENGTHS.values())[index]
            moves = torch.bmm(weights, change[entries].flatten(2))
            rows = old + moves.view(old.shape)
            rows[plan.selected] = new
            pool.flatten(0, 1)[slots] = rows
            if "cos" in options:
                target = options["plain_values"] if index else options["rotated_keys"]
                target.copy_(rows if index else rotated(rows, options["cos"], options["sin"]))

    return run
