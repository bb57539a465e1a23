"""Content hashes of weight files, remembered by path, size, modification time and inode."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from pathlib import Path

from ragkit.errors import ModelError
from ragkit.models.cache import cache_home

_log = logging.getLogger(__name__)
_MEMORY_FILE = "fingerprints.json"


def weights_fingerprint(folder: Path, *, rehash: bool = False) -> str:
    """Return the hex digest of the weights in a model folder: equal bytes give equal digests, anywhere.

    Args:
        folder: a folder with `*.safetensors` files.
        rehash: read the bytes even where a remembered hash fits the files' size, time and inode.

    Raises:
        ModelError: there are no weights, or they cannot be read.
    """
    files = _weight_files(folder)
    remembered = _remembered()
    digest = hashlib.sha256(b"ragkit-weights-1\0")
    fresh: dict[str, str] = {}
    for file in files:
        stamp = _stamp(file)
        known = None if rehash else remembered.get(stamp)
        value = known or file_sha256(file)
        if known is None:
            fresh[stamp] = value
        digest.update(f"{file.name}\0{value}\0".encode())
    if fresh:
        _remember({**remembered, **fresh})
    return digest.hexdigest()


def weights_stamp(folder: Path) -> str:
    """Return what tells weight files that were changed or replaced since, without reading them.

    Raises:
        ModelError: there are no weights.
    """
    return "\n".join(_stamp(file) for file in _weight_files(folder))


def file_sha256(path: Path) -> str:
    """Return the hex sha256 of a file's bytes."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from error


def _weight_files(folder: Path) -> list[Path]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelError(f"{folder} holds no safetensors weights")
    return files


def _stamp(path: Path) -> str:
    real = path.resolve()
    status = real.stat()
    return f"{real}|{status.st_size}|{status.st_mtime_ns}|{status.st_ino}"


def _remembered() -> dict[str, str]:
    try:
        content = json.loads((cache_home() / _MEMORY_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        _log.warning("the remembered weight hashes are unreadable and are computed again: %s", error)
        return {}
    return content if isinstance(content, dict) else {}


def _remember(hashes: dict[str, str]) -> None:
    # Only a memory: where it cannot be written, the next call hashes again.
    home = cache_home()
    try:
        descriptor, name = tempfile.mkstemp(prefix=f".{_MEMORY_FILE}.", dir=home)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(hashes, file, indent=1)
        Path(name).replace(home / _MEMORY_FILE)
    except OSError as error:
        _log.warning("weight hashes could not be remembered in %s: %s", home, error)
