"""The error tree. A message says in one line what was wrong, what was got and what to do.

Foreign errors are translated where they enter (`raise ... from error`). The command line maps the tree to exit
codes: `UsageError` 2, `StoreError` 4, everything else 1. A `code` is stable and machine-readable.
"""

from __future__ import annotations

from collections.abc import Callable


class RagkitError(Exception):
    """Base of every error that ragkit raises on purpose."""

    code = "error"
    exit_code = 1


class UsageError(RagkitError, ValueError):
    """A value that the caller gave is impossible."""

    code = "usage"
    exit_code = 2


class ConfigError(UsageError):
    """An unknown or impossible setting; names the nearest valid one."""

    code = "config"


class MissingExtraError(RagkitError, ImportError):
    """An optional package is not installed; names the extra that brings it."""

    code = "missing_extra"


class OfflineError(RagkitError):
    """Something would have to be fetched, and fetching is switched off; names each missing file."""

    code = "offline"


class ReadError(RagkitError):
    """A source could not be turned into documents.

    Attributes:
        code: stable reason: unsupported, empty, needs_ocr, encrypted, corrupt, encoding, too_large, timeout, oom,
            crash, changed, unreadable.
        stage: read, parse, chunk, embed or commit.
    """

    def __init__(self, message: str, *, code: str, stage: str = "parse") -> None:
        super().__init__(message)
        self.code = code
        self.stage = stage

    def __reduce__(self) -> tuple[Callable[..., ReadError], tuple[str, str, str]]:
        """Return how a copy is made in another process, where workers read."""
        return _read_error, (str(self), self.code, self.stage)


def _read_error(message: str, code: str, stage: str) -> ReadError:
    return ReadError(message, code=code, stage=stage)


class ChunkingError(RagkitError):
    """A chunker broke its contract or met text that it cannot cut."""

    code = "chunking"


class ModelError(RagkitError):
    """A model could not be found, verified or loaded."""

    code = "model"


class RetrievalError(RagkitError):
    """Embedding or searching failed."""

    code = "retrieval"


class EmbedderMismatchError(RetrievalError):
    """The store was built with another embedder; offers `--reembed`."""

    code = "embedder_mismatch"
    exit_code = 4


class GenerationError(RagkitError):
    """The engine could not run a request."""

    code = "generation"


class KVCacheError(RagkitError):
    """A KV pool or store could not serve a request."""

    code = "kvcache"


class CacheCapacityError(KVCacheError):
    """Not enough KV blocks; says how many were asked for and how many are free."""

    code = "kv_capacity"


class KernelError(RagkitError):
    """A kernel could not run."""

    code = "kernel"


class KernelInputError(KernelError, ValueError):
    """Wrong shape, dtype or device; says what was got."""

    code = "kernel_input"


class KernelUnavailableError(KernelError):
    """The asked-for backend cannot run here."""

    code = "kernel_unavailable"


class StoreError(RagkitError):
    """The store is missing, locked, damaged or out of space."""

    code = "store"
    exit_code = 4


class StoreMissingError(StoreError):
    """There is no store in that folder."""

    code = "store_missing"


class StoreLockedError(StoreError):
    """Another process is writing; names it."""

    code = "store_locked"


class StoreCorruptError(StoreError):
    """Stored bytes do not match their checksum."""

    code = "store_corrupt"


class StoreFormatError(StoreError):
    """The store was written by a newer ragkit, or is no store."""

    code = "store_format"


class StoreSpaceError(StoreError):
    """The disk is full or writing failed; the last commit group was rolled back."""

    code = "store_space"


class JobError(RagkitError):
    """A batch job could not finish."""

    code = "job"
