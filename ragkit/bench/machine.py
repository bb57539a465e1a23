"""What a measured figure depends on and cannot say itself: the machine and the releases of what ran."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

#: Packages whose release changes a figure; those that are not installed are left out.
VERSIONED = (
    "ragkit",
    "torch",
    "transformers",
    "sentence-transformers",
    "tokenizers",
    "triton",
    "faiss-cpu",
    "faiss-gpu",
    "numpy",
    "pyarrow",
    "selectolax",
    "pypdfium2",
    "lxml",
)
_NVIDIA_SMI = ("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")


def machine_facts() -> dict[str, Any]:
    """Return cpu, cores, memory, operating system, threads and GPUs."""
    return {
        "cpu": _proc_value("/proc/cpuinfo", "model name") or platform.processor() or "unknown",
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "threads": os.environ.get("OMP_NUM_THREADS", "all"),
        "gpus": _gpus(),
    }


def versions() -> dict[str, str]:
    """Return the release of Python, SQLite and each installed package of `VERSIONED`."""
    import sqlite3

    found = {"python": platform.python_version(), "sqlite": sqlite3.sqlite_version}
    for name in VERSIONED:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _gpus() -> list[str]:
    try:
        done = subprocess.run(_NVIDIA_SMI, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return []
    return done.stdout.splitlines()


def _proc_value(path: str, field: str) -> str | None:
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(field)), None)
