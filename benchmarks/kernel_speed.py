"""Every kernel against a ceiling of the same card in the same run, and against the strongest simple baseline.

    python benchmarks/kernel_speed.py [--only STEM ... [--name RESULT]]
    python benchmarks/kernel_speed.py --device cpu      small shapes in Triton's interpreter: does the script work?

Ceilings: GB/s of a copy within the card's memory (read and written), for kernels that move bytes; useful TFLOP/s of
torch's fastest attention on the dense causal problem of 32,768 tokens at the shape of Llama 3 8B, for attention.
Each file of `benchmarks/kernels` is named like its kernel and gives cases; a case is compared with its reference before
it is timed. Timed on the device by events, after warm-up; caches are flushed before each run.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from kernel_case import KernelCase
from report import markdown_table, percentiles, write_result
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

CASES = Path(__file__).resolve().parent / "kernels"
SECONDS = 0.5  # of timed runs a case
LEAST_RUNS, MOST_RUNS = 5, 100
FLUSH_BYTES = 1 << 29  # several times the cache; the host queues the next run while it is written
COPY_BYTES = 2 << 30
DENSE_ROWS, Q_HEADS, KV_HEADS, HEAD_DIM = 32768, 32, 8, 128
COLUMNS = {
    "kernel": "Kernel", "shape": "Shape", "p20": "p20 ms", "p50": "p50 ms", "p80": "p80 ms", "rate": "Rate",
    "unit": "Unit", "percent": "% of ceiling", "baseline": "Baseline", "baseline_ms": "Baseline ms",
    "speed_up": "Times faster",
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    stems = sorted(path.stem for path in CASES.glob("*.py"))
    parser.add_argument("--only", nargs="+", metavar="STEM", choices=stems, help=f"of {', '.join(stems)}")
    parser.add_argument("--name", help="name of the result; kernel_speed with those of --only unless given")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true", help="run each case once or twice; nothing is written")
    arguments = parser.parse_args()
    if arguments.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is imported
        arguments.tiny = True
    device = torch.device(arguments.device)
    clock = Clock(device, arguments.tiny)
    with torch.inference_mode():
        ceilings = measure_ceilings(clock)
        print(ceilings, flush=True)
        rows = []
        for stem in arguments.only or stems:
            rows += measure_module(stem, clock, ceilings)
            if clock.is_lost():
                print(f"the device is lost since a case of {stem}: nothing after it was measured", flush=True)
                break
    failed = [row for row in rows if "failed" in row]
    print(markdown_table(rows, COLUMNS))
    if not arguments.tiny:
        name = arguments.name or "_".join(["kernel_speed", *(arguments.only or [])])
        print(f"\nraw numbers: {write_result(name, {'ceilings': ceilings, 'cases': rows})}")
    if failed:
        sys.exit(f"{len(failed)} of {len(rows)} cases failed: " + "; ".join(row["kernel"] for row in failed))


class Clock:
    """Times runs on one device.

    Args:
        device: where they run.
        tiny: time each but twice.
    """

    def __init__(self, device: torch.device, tiny: bool) -> None:
        self.device = device
        self.tiny = tiny
        self._flush = torch.empty(1024 if tiny else FLUSH_BYTES, dtype=torch.uint8, device=device)

    def milliseconds(self, run: Callable[[], object]) -> list[float]:
        """Return the milliseconds of each of several runs, caches flushed before each."""
        if self.device.type == "cpu":
            return [wall_milliseconds(run) for _ in range(2)]
        for _ in range(3):  # compiles, and warms up
            run()
        torch.cuda.synchronize()
        once = wall_milliseconds(lambda: (run(), torch.cuda.synchronize())) / 1e3
        runs = 2 if self.tiny else int(min(MOST_RUNS, max(LEAST_RUNS, SECONDS / once)))
        events = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(runs)]
        for start, end in events:
            self._flush.zero_()
            start.record()
            run()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in events]

    def is_lost(self) -> bool:
        """Return whether a run's fault left the device unusable for this process."""
        try:
            self._flush[:1].zero_()
            if self.device.type == "cuda":
                torch.cuda.synchronize()
        except RuntimeError:
            return True
        return False

    def median(self, run: Callable[[], object]) -> float:
        """Return the median milliseconds of a run."""
        return percentiles(self.milliseconds(run))["p50"]


def wall_milliseconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return (time.perf_counter() - started) * 1e3


def measure_ceilings(clock: Clock) -> dict[str, Any]:
    """Return the copy bandwidth, and every dense attention that runs here with the fastest by name."""
    copy = copy_rate(clock, (1 << 20) if clock.tiny else COPY_BYTES)
    dense = dense_attention(clock)
    best = max(dense, key=lambda name: dense[name])
    return {"copy_gb_per_s": copy, "dense_tflops": dense, "best_dense": best, "best_dense_tflops": dense[best]}


def copy_rate(clock: Clock, size: int) -> float:
    """Return GB/s of a copy of `size` bytes within the device's memory, read and written."""
    source = torch.zeros(size, dtype=torch.uint8, device=clock.device)
    target = torch.empty_like(source)
    return 2 * size / clock.median(lambda: target.copy_(source)) / 1e6


def dense_attention(clock: Clock) -> dict[str, float]:
    """Return useful TFLOP/s of torch's attention on the dense causal problem, by backend."""
    rows = 128 if clock.tiny else DENSE_ROWS
    dtype = torch.bfloat16 if clock.device.type == "cuda" else torch.float32
    queries = torch.randn(1, Q_HEADS, rows, HEAD_DIM, dtype=dtype, device=clock.device)
    shared = [torch.randn(1, KV_HEADS, rows, HEAD_DIM, dtype=dtype, device=clock.device) for _ in range(2)]
    repeated = [part.repeat_interleave(Q_HEADS // KV_HEADS, dim=1) for part in shared]
    work = 4.0 * HEAD_DIM * Q_HEADS * rows * (rows + 1) / 2
    backends = {"cuDNN": "CUDNN_ATTENTION", "flash": "FLASH_ATTENTION", "efficient": "EFFICIENT_ATTENTION"}
    if clock.device.type == "cpu":
        backends = {"flash": "FLASH_ATTENTION", "math": "MATH"}
    found = {}
    for name, backend in backends.items():
        for form, (keys, values), grouped in (("", repeated, False), (", shared keys", shared, True)):
            with sdpa_kernel(getattr(SDPBackend, backend)):
                try:
                    spent = clock.median(
                        lambda keys=keys, values=values, grouped=grouped: scaled_dot_product_attention(
                            queries, keys, values, is_causal=True, enable_gqa=grouped
                        )
                    )
                except RuntimeError as error:  # no kernel of this backend takes the problem
                    print(f"SDPA {name}{form}: {str(error).splitlines()[0]}", flush=True)
                    continue
            found[f"SDPA {name}{form}"] = work / spent / 1e9
    return found


def measure_module(stem: str, clock: Clock, ceilings: dict[str, Any]) -> list[dict[str, Any]]:
    """Return one row of the table for each case of `benchmarks/kernels/STEM.py`, checked first."""
    spec = importlib.util.spec_from_file_location(f"kernel_cases_{stem}", CASES / f"{stem}.py")
    if spec is None or spec.loader is None:
        raise ImportError(f"{CASES / stem}.py cannot be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    rows = []
    for case in module.cases(clock.device):
        try:
            row = measure_case(case, clock, ceilings)
        except Exception as error:  # the cases after it are still worth their time
            traceback.print_exc()
            row = {"kernel": case.name, "shape": case.shape, "failed": f"{type(error).__name__}: {error}"}
            rows.append(row)
            if clock.is_lost():
                break
            continue
        print(row, flush=True)
        rows.append(row)
    gc.collect()
    return rows


def measure_case(case: KernelCase, clock: Clock, ceilings: dict[str, Any]) -> dict[str, Any]:
    """Return one row of the table, after the case's own check."""
    case.check()
    row: dict[str, Any] = {"kernel": case.name, "shape": case.shape} | percentiles(clock.milliseconds(case.run))
    bandwidth = case.kind == "bandwidth"
    row["rate"] = case.work / row["p50"] / (1e6 if bandwidth else 1e9)
    row["unit"] = "GB/s" if bandwidth else "TFLOP/s"
    row["percent"] = 100 * row["rate"] / ceilings["copy_gb_per_s" if bandwidth else "best_dense_tflops"]
    if case.baseline is not None:
        row["baseline"], row["baseline_ms"] = case.baseline_name, clock.median(case.baseline)
        row["speed_up"] = row["baseline_ms"] / row["p50"]
    return row


if __name__ == "__main__":
    main()
