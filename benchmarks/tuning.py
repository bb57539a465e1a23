"""What the scripts share that compare ways to cut a kernel's work: the clock, the ceiling, the table at the end."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from kernel_speed import COPY_BYTES, Clock, copy_rate
from report import markdown_table, write_result


def clock_and_ceiling(device: str) -> tuple[Clock, float]:
    """Return the clock of a device, tiny on a CPU, and the GB/s of a copy within its memory, which is printed."""
    clock = Clock(torch.device(device), tiny=device == "cpu")
    ceiling = copy_rate(clock, (1 << 20) if clock.tiny else COPY_BYTES)
    print(f"a copy moves {ceiling:.0f} GB/s, read and written", flush=True)
    return clock, ceiling


def report_tiles(
    name: str, clock: Clock, ceiling: float, rows: Sequence[dict[str, Any]], arguments: argparse.Namespace
) -> None:
    """Print the table, and write the result `name` unless the clock is tiny."""
    print(markdown_table(rows, list(rows[0])))
    if not clock.tiny:
        path = write_result(name, {"copy_gb_per_s": ceiling, "tiles": list(rows), **vars(arguments)})
        print(f"raw numbers: {path}")
