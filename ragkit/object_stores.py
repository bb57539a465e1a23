"""What differs where files are objects (S3, Google Cloud Storage, Azure): no folders, and uploads appear when whole."""

from __future__ import annotations

from typing import Any

_PROTOCOLS = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oci", "r2"})
_ARROW = "fsspec.implementations.arrow"


def is_object_store(files: Any) -> bool:
    """Return whether an fsspec file system keeps objects, whose names only look like folders and files."""
    protocol = files.protocol
    return bool(_PROTOCOLS & {protocol} if isinstance(protocol, str) else _PROTOCOLS & set(protocol))


def appears_whole(files: Any) -> bool:
    """Return whether a file that is being uploaded appears at once when it is whole, so needs no other name first.

    Streams of pyarrow end an upload that is broken off as though it were complete.
    """
    return is_object_store(files) and type(files).__module__ != _ARROW


def make_folder(files: Any, path: str) -> None:
    """Make the folder `path` where there are folders.

    On stores of objects nothing is made: fsspec's packages for them would create a missing bucket, and with it a place
    that a mistyped URL happens to name.
    """
    if path and not is_object_store(files):
        files.makedirs(path, exist_ok=True)
