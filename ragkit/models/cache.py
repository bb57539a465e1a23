"""The folder where pulled and converted models live. A model's folder appears there whole, or not at all."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ragkit.errors import ModelError


def cache_home() -> Path:
    """Return the cache folder: `RAGKIT_HOME`, else the platform's user cache folder; created with mode 0700."""
    import platformdirs

    chosen = os.environ.get("RAGKIT_HOME")
    home = Path(chosen).expanduser() if chosen else Path(platformdirs.user_cache_dir("ragkit"))
    return _private(home)


def models_home() -> Path:
    """Return the folder that holds one folder a model."""
    return _private(cache_home() / "models")


@contextmanager
def installing(target: Path) -> Iterator[Path | None]:
    """Yield an empty folder whose content becomes `target` on leaving, or None where `target` is there already.

    One process at a time installs one target: the others wait and then get None. After a failure nothing is left.
    """
    parent = _private(target.parent)
    with _locked(parent / f".{target.name}.lock"):
        if target.exists():
            yield None
            return
        _sweep(parent, target.name)
        work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".part", dir=parent))
        try:
            content = work / "content"
            content.mkdir(mode=0o700)
            yield content
            _sync_tree(content)
            content.rename(target)
            _sync(parent)
        except OSError as error:
            raise ModelError(f"{target} could not be written: {error.strerror or error}") from error
        finally:
            shutil.rmtree(work, ignore_errors=True)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)  # which also unlocks


def _sweep(parent: Path, name: str) -> None:
    # Under the lock nobody else works on this target: what a killed process left can go.
    for left in parent.glob(f".{name}.*.part"):
        shutil.rmtree(left, ignore_errors=True)


def _private(folder: Path) -> Path:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ModelError(f"the cache folder {folder} cannot be made: {error.strerror}; set RAGKIT_HOME") from error
    return folder


def _sync_tree(folder: Path) -> None:
    for root, _, files in os.walk(folder):
        for file in files:
            _sync(Path(root) / file)
        _sync(Path(root))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
