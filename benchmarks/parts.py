"""Deal a benchmark's items out to several processes of the same script, which share one device.

Work that is bound by launches or by one core leaves most of a device idle; processes beside one another fill it. The
script takes `--part I/N` and `--raw FILE`: it does every Nth item and writes what it found to FILE as JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ragkit.models.resolve import resolve

Item = TypeVar("Item")

_LOOK_S = 0.2  # between two looks at the processes


def add_part_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of a script whose items are dealt out."""
    parser.add_argument("--processes", type=int, default=1, help="share the items among so many on one device")
    parser.add_argument("--part", default="0/1", help="I/N: only every Nth item from the Ith on")
    parser.add_argument("--raw", help="write only what was measured of the items, to this file")
    parser.add_argument("--time-limit", type=float, default=math.inf, help="seconds, then what is done is reported")


def measured_rows(
    script: str, arguments: argparse.Namespace, measure: Callable[[argparse.Namespace], list[dict[str, Any]]]
) -> list[dict[str, Any]] | None:
    """Return one row an item in the order of their `index`, from one process or several; at least one.

    None where the rows of a part were written to `--raw`, which is all that such a run does.
    """
    if arguments.processes > 1:
        resolve(arguments.model)  # fetched and converted once
        parts = run_parts(script, sys.argv[1:], arguments.processes)
        rows = sorted((row for part in parts for row in part), key=lambda row: row["index"])
    else:
        rows = measure(arguments)
    if arguments.raw:
        Path(arguments.raw).write_text(json.dumps(rows), encoding="utf-8")
        return None
    if not rows:
        sys.exit("no item fits the model's window")
    return rows


def dealt(items: Sequence[Item], part: str) -> Sequence[Item]:
    """Return the items of `part`, which is `I/N` with I from 0."""
    number, of = (int(one) for one in part.split("/"))
    return items[number::of]


def run_parts(script: str, arguments: Sequence[str], processes: int) -> list[Any]:
    """Return what each of `processes` runs of `script` wrote; what the first one says on stderr is passed on.

    The run ends with the stderr of the first that fails; the others are ended with it, and all
    of them where this process is told to end.
    """
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        running: list[subprocess.Popen[bytes]] = []
        try:
            for number in range(processes):
                running.append(_start(script, arguments, number, processes, folder))
            _wait(running, folder)
        finally:
            for one in running:
                one.kill()
                one.wait()
        return [json.loads(_raw(folder, number).read_text(encoding="utf-8")) for number in range(processes)]


def _start(script: str, arguments: Sequence[str], number: int, of: int, folder: Path) -> subprocess.Popen[bytes]:
    own = ["--processes", "1", "--part", f"{number}/{of}", "--raw", str(_raw(folder, number))]
    threads = str(max(1, (os.cpu_count() or 1) // of))  # else each would start one for every core
    # Prompts differ in length: without expandable segments each process would hold twice what it needs of a GPU.
    own_memory = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    environment = {"OMP_NUM_THREADS": threads} | own_memory | dict(os.environ)
    with _log(folder, number).open("wb") as log:
        return subprocess.Popen(
            [sys.executable, script, *arguments, *own], stdout=subprocess.DEVNULL, stderr=log, env=environment
        )


def _wait(running: Sequence[subprocess.Popen[bytes]], folder: Path) -> None:
    with _log(folder, 0).open("rb") as first:
        while True:
            states = [one.poll() for one in running]
            sys.stderr.write(first.read().decode("utf-8", errors="replace"))
            sys.stderr.flush()
            for number, state in enumerate(states):
                if state:  # of the first, all is said already
                    said = _log(folder, number).read_text(encoding="utf-8", errors="replace") if number else ""
                    sys.exit(f"{said}part {number} of {len(running)} failed with exit status {state}")
            if all(state == 0 for state in states):
                return
            time.sleep(_LOOK_S)


def _raw(folder: Path, number: int) -> Path:
    return folder / f"{number}.json"


def _log(folder: Path, number: int) -> Path:
    return folder / f"{number}.log"
