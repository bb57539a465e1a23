"""What the scripts share that compare ways to cut a kernel's work: the clock, the ceiling, the table at the end.

A way is timed alone with caches flushed (`Clock`), or as decoding runs it: `LayersInGraph`, a launch a layer and all
layers in one CUDA graph, each over KV of its own, which together do not fit the cache.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import torch
from kernel_speed import COPY_BYTES, Clock, copy_rate, wall_milliseconds
from report import markdown_table, percentiles, write_result
from torch import Tensor

from ragkit.kernels.testing import assert_matches

LAYERS = 32  # of Llama 3 8B
ROUNDS = 30  # of replays


def clock_and_ceiling(device: str) -> tuple[Clock, float]:
    """Return the clock of a device, tiny on a CPU, and the GB/s of a copy within its memory, which is printed."""
    clock = Clock(torch.device(device), tiny=device == "cpu")
    ceiling = copy_rate(clock, (1 << 20) if clock.tiny else COPY_BYTES)
    print(f"a copy moves {ceiling:.0f} GB/s, read and written", flush=True)
    return clock, ceiling


def num_layers(clock: Clock) -> int:
    """Return how many layers one graph holds."""
    return 2 if clock.tiny else LAYERS


class LayersInGraph:
    """A CUDA graph of one launch a layer; on a CPU they run one after the other.

    Args:
        launches: one a layer; their inputs are read anew by every replay.
        device: where they run.
    """

    def __init__(self, launches: Sequence[Callable[[], Tensor]], device: torch.device) -> None:
        self._launches = launches
        self.outputs: list[Tensor] = []
        self._graph: torch.cuda.CUDAGraph | None = None
        if device.type == "cuda":
            self._run()  # compiles
            torch.cuda.synchronize()
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._run()

    def _run(self) -> None:
        self.outputs = [launch() for launch in self._launches]

    def replay(self) -> None:
        """Run all layers; `outputs` are theirs."""
        if self._graph is None:
            self._run()
        else:
            self._graph.replay()

    def milliseconds(self) -> float:
        """Return what one replay takes."""
        if self._graph is None:
            return wall_milliseconds(self._run)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        self._graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    @property
    def layers(self) -> int:
        """How many there are."""
        return len(self._launches)


def microseconds_a_layer(graphs: Sequence[LayersInGraph], clock: Clock) -> list[float]:
    """Return the median of each graph over its layers; they take turns, so that all see the same clocks."""
    rounds: list[list[float]] = [[] for _ in graphs]
    for number in range(1 if clock.tiny else ROUNDS + 3):
        for graph, found in zip(graphs, rounds, strict=True):
            spent = graph.milliseconds()
            if number >= 3 or clock.tiny:
                found.append(spent)
    return [1e3 * percentiles(found)["p50"] / graph.layers for graph, found in zip(graphs, rounds, strict=True)]


def rows_in_graphs(
    ways: Sequence[tuple[dict[str, Any], Sequence[Callable[[], Tensor]]]],
    definitions: Sequence[Callable[[], Tensor]],
    queries: Sequence[Tensor],
    clock: Clock,
    work: float,
    ceiling: float,
) -> list[dict[str, Any]]:
    """Return the row of each way that gives what is defined, the quickest first, with `us`, a layer's microseconds.

    They are printed, and the others with what is wrong with them.

    Args:
        ways: a row of the table, and a launch for each layer.
        definitions: of each layer's result.
        queries: of each layer, which get other numbers when all graphs are recorded: what a replay reads too early
            makes another result.
        clock: of the device.
        work: bytes that a layer reads.
        ceiling: bandwidth in GB/s.
    """
    recorded = []
    for row, launches in ways:
        try:
            recorded.append((LayersInGraph(launches, clock.device), row))
        except Exception as error:  # too much shared memory, or a launch that no graph takes
            print(f"{row}: {type(error).__name__}: {str(error).splitlines()[0]}", flush=True)
    for part in queries:
        part.copy_(torch.randn(part.shape, device=part.device))
    expected = [definition() for definition in definitions]
    replays = 1 if clock.tiny else 3
    right = [(graph, row) for graph, row in recorded if _is_right(graph, expected, row, replays)]
    spent = microseconds_a_layer([graph for graph, _ in right], clock)
    rows = []
    for (_, row), us in zip(right, spent, strict=True):
        rate = work / us / 1e3
        rows.append(row | {"us": us, "gb_per_s": rate, "percent": 100 * rate / ceiling})
        print(rows[-1], flush=True)
    return sorted(rows, key=lambda row: row["us"])


def _is_right(graph: LayersInGraph, expected: Sequence[Tensor], row: dict[str, Any], replays: int) -> bool:
    """Return whether so many replays give what is expected; says so where not."""
    for _ in range(replays):
        for out in graph.outputs:
            out.zero_()
        graph.replay()
        try:
            for out, wanted in zip(graph.outputs, expected, strict=True):
                assert_matches(out, wanted, reduced=4)
        except AssertionError as error:
            print(f"{row}: {error}", flush=True)
            return False
    return True


def report_tiles(
    name: str, clock: Clock, ceiling: float, rows: Sequence[dict[str, Any]], arguments: argparse.Namespace
) -> None:
    """Print the table, and write the result `name` unless the clock is tiny."""
    print(markdown_table(rows, list(rows[0])))
    if not clock.tiny:
        path = write_result(name, {"copy_gb_per_s": ceiling, "tiles": list(rows), **vars(arguments)})
        print(f"raw numbers: {path}")
