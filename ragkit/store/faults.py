"""The fault-injecting layer: every durable step of the store passes `checkpoint` just before it happens.

Tests set `RAGKIT_CRASH_AT=N` (the process dies at the N-th step, as by a power cut) or `RAGKIT_ENOSPC_AT=N` (the
N-th step finds the disk full). Without them a checkpoint costs two look-ups.
"""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path

CRASH_EXIT_CODE = 86

_log = logging.getLogger(__name__)
_steps = 0


def checkpoint(step: str, path: Path) -> None:
    """Return, unless this is the step at which the environment asks for a fault.

    Raises:
        OSError: ENOSPC, at the step named by `RAGKIT_ENOSPC_AT`.
    """
    global _steps
    crash_at = os.environ.get("RAGKIT_CRASH_AT")
    full_at = os.environ.get("RAGKIT_ENOSPC_AT")
    if crash_at is None and full_at is None:
        return
    _steps += 1
    if crash_at is not None and _steps == int(crash_at):
        _log.warning("fault injection: dying at step %d (%s %s)", _steps, step, path.name)
        os._exit(CRASH_EXIT_CODE)
    if full_at is not None and _steps == int(full_at):
        raise OSError(errno.ENOSPC, f"no space left on device (injected at step {_steps}, {step})", str(path))


def steps_taken() -> int:
    """Return how many checkpoints this process has passed while a fault was asked for."""
    return _steps


def restart() -> None:
    """Count from zero again."""
    global _steps
    _steps = 0
