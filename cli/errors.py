"""From an exception to one line, a stable code and the process's exit code.

0 done, 1 failed, 2 wrong usage, 3 partly done, 4 the store is locked, damaged or out of space, 130 and 143 stopped by
SIGINT and SIGTERM. `RAGKIT_DEBUG=1` shows the traceback as well.
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from enum import IntEnum

import typer

from ragkit.errors import RagkitError


class ExitCode(IntEnum):
    """What the process tells its caller."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    PARTLY_DONE = 3
    STORE = 4
    INTERRUPTED = 130
    TERMINATED = 143


@dataclass(frozen=True, slots=True)
class Failure:
    """How a command failed."""

    code: str
    message: str
    exit_code: int


def failure_of(error: BaseException) -> Failure:
    """Return how to report `error`. What ragkit did not raise on purpose is reported as a bug, except a full disk."""
    if isinstance(error, RagkitError):
        return Failure(error.code, _one_line(str(error)) or type(error).__name__, error.exit_code)
    if isinstance(error, typer.TyperException):
        return Failure("usage", _usage_message(error), error.exit_code)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return Failure("store_space", f"the disk is full: {_one_line(str(error))}", ExitCode.STORE)
    if isinstance(error, OSError):
        return Failure("os", _one_line(str(error)), ExitCode.FAILED)
    if isinstance(error, MemoryError):
        return Failure("oom", "out of memory; use a smaller model or fewer documents at once", ExitCode.FAILED)
    text = f"{type(error).__name__}: {error}"
    hint = "" if debugging() else "; RAGKIT_DEBUG=1 shows where"
    return Failure("internal", f"this is a bug in ragkit: {_one_line(text)}{hint}", ExitCode.FAILED)


def debugging() -> bool:
    """Return whether tracebacks are wanted."""
    return os.environ.get("RAGKIT_DEBUG", "") not in ("", "0")


def _usage_message(error: typer.TyperException) -> str:
    message = _one_line(error.format_message()).rstrip(".").replace(": Value error, ", ": ")
    errors = getattr(error.__cause__, "errors", None)  # Typer checks values with pydantic, which keeps what was got
    given = repr(errors()[0]["input"]) if errors is not None else ""
    if given not in message:
        message += f", got {given}"
    context = getattr(error, "ctx", None)
    return f"{message}; `{context.command_path} --help` shows the usage" if context is not None else message


def _one_line(text: str) -> str:
    return " ".join(text.split())
