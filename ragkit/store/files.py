"""Durable files: written under a temporary name, synced, renamed into place, and the folder synced."""

from __future__ import annotations

import hashlib
import os
import secrets
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ragkit.store import faults

TEMPORARY_PREFIX = ".tmp-"
GROUP_BYTES = 1 << 20  # one CRC for each of these, so that a damaged stretch is named and reads can stay local


@dataclass(frozen=True, slots=True)
class FileDigest:
    """What identifies a file's bytes: size, sha256 of all, CRC-32 of each group of `GROUP_BYTES`."""

    size: int
    sha256: str
    group_crcs: tuple[int, ...]


def digest_file(path: Path) -> FileDigest:
    """Return the digest of a file, read once."""
    digest, crcs, size = hashlib.sha256(), [], 0
    with path.open("rb") as file:
        while group := file.read(GROUP_BYTES):
            digest.update(group)
            crcs.append(zlib.crc32(group))
            size += len(group)
    return FileDigest(size, digest.hexdigest(), tuple(crcs))


def temporary_path(folder: Path) -> Path:
    """Return a fresh name in `folder` that `gc` recognises as unfinished."""
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{TEMPORARY_PREFIX}{secrets.token_hex(8)}"


def place_durably(temporary: Path, target: Path) -> None:
    """Move a finished temporary file to `target` so that after a power cut either all of it is there or nothing."""
    faults.checkpoint("file:fsync", temporary)
    _sync(temporary)
    if not target.parent.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        sync_folder(target.parent.parent)
    faults.checkpoint("file:rename", target)
    temporary.replace(target)
    faults.checkpoint("folder:fsync", target.parent)
    sync_folder(target.parent)


def write_file_atomically(target: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file beside `target` and put it durably in place; on failure nothing remains."""
    temporary = temporary_path(target.parent)
    try:
        faults.checkpoint("file:write", temporary)
        write(temporary)
        place_durably(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def folder_bytes(folder: Path) -> int:
    """Return the size of every file below `folder`; files that vanish meanwhile count nothing."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(root, name)).st_size
            except FileNotFoundError:
                continue
    return total


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
