"""File systems behind URLs, by fsspec; where its package for a store is not installed, by pyarrow's own."""

from __future__ import annotations

import logging
import os
import re
from typing import Any, NoReturn
from urllib.parse import urlsplit

from ragkit.credentials import public_url, safe_cause, without_credentials
from ragkit.errors import MissingExtraError, OfflineError, UsageError

logger = logging.getLogger(__name__)

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
# Wrappers around other places: what they cache, unpack or refer to would be read under rules of its own.
_WRAPPERS = frozenset(
    {"simplecache", "filecache", "blockcache", "cached", "zip", "tar", "libarchive", "reference", "dir", "generic"}
)
_ARROW = frozenset({"s3", "gs", "gcs", "abfs", "abfss", "hdfs", "viewfs"})
_HERE = frozenset({"memory", "file", "local"})
_LOCAL_HOSTS = frozenset({"", "localhost", "127.0.0.1", "::1"})


def is_url(text: str) -> bool:
    """Return whether `text` is written as a URL (`scheme://...`), known or not."""
    return _URL.match(text) is not None


def scheme_of(url: str) -> str:
    """Return the scheme of a URL in lower case."""
    return url.partition("://")[0].lower()


def stored_name(source: str) -> str:
    """Return the URI that a file or URL has in a store: the absolute path, or the URL without credentials."""
    return public_url(source) if is_url(source) else os.path.abspath(source)


def refuse_network(url: str) -> None:
    """Raise `OfflineError` unless `url` leads to this machine."""
    if scheme_of(url) not in _HERE and (urlsplit(url).hostname or "") not in _LOCAL_HOSTS - {""}:
        raise OfflineError(f"{public_url(url)} would have to be fetched, and fetching is switched off")


def open_file_system(url: str) -> tuple[Any, str]:
    """Return the fsspec file system of a URL and the path that the URL means there.

    Raises:
        UsageError: nobody knows such URLs, or the URL is malformed.
        MissingExtraError: a package is missing; names it.
    """
    shown = public_url(url)
    if "::" in url or scheme_of(url) in _WRAPPERS:
        raise UsageError(f"cannot use {shown!r}: chained and cached URLs are not read; give the place itself")
    try:
        import fsspec  # type: ignore[import-untyped]
    except ImportError as error:
        raise MissingExtraError(f"{shown} needs fsspec: pip install 'ragkit[remote]'", name="fsspec") from error
    try:
        files, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        return _arrow_file_system(url, error)
    except Exception as error:  # every file system has errors of its own
        unknown = isinstance(error, ValueError) and "rotocol not known" in str(error)
        hint = "; give a path, or a URL that fsspec knows (s3://, gs://, https://, ...)" if unknown else ""
        message = without_credentials(str(error), url)
        raise UsageError(f"cannot use {shown!r}: {message}{hint}") from safe_cause(error, url)
    return files, str(path)


def move_file(files: Any, source: str, target: str) -> None:
    """Move one file within an fsspec file system. Names are taken as they are.

    What fsspec does where a file system has no move of its own reads them as patterns: `[2024].jsonl` is not found, or
    is another file.
    """
    from fsspec import AbstractFileSystem

    if type(files).mv is AbstractFileSystem.mv:
        files.cp_file(source, target)
        files.rm_file(source)
    else:
        files.mv(source, target)


def _arrow_file_system(url: str, missing: ImportError) -> tuple[Any, str]:
    scheme, shown = scheme_of(url), public_url(url)
    if scheme not in _ARROW:
        _refuse_missing(url, missing)
    try:
        import pyarrow.fs
        from fsspec.implementations.arrow import ArrowFSWrapper  # type: ignore[import-untyped]

        arrow, path = pyarrow.fs.FileSystem.from_uri(url)
    except ImportError:
        _refuse_missing(url, missing)
    except Exception as error:
        message = without_credentials(str(error), url)
        raise UsageError(f"cannot use {shown!r}: {message}") from safe_cause(error, url)
    logger.info("%s:// is read through pyarrow: %s", scheme, " ".join(str(missing).split()))
    return ArrowFSWrapper(arrow), str(path)


def _refuse_missing(url: str, missing: ImportError) -> NoReturn:
    reason = without_credentials(str(missing), url)
    raise MissingExtraError(f"{public_url(url)} cannot be used: {reason}", name=missing.name) from missing
