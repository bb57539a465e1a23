"""Settings that hold for every test."""

from __future__ import annotations

import os
from pathlib import Path

# Triton reads this when a kernel is imported. Without a GPU the kernels' tests run in its interpreter.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")
