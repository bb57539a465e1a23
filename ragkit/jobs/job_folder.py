"""Where a job keeps what is done until its output is whole: a folder beside the output, here or at an fsspec URL."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from ragkit.credentials import public_url, safe_cause, without_credentials
from ragkit.errors import JobError, StoreLockedError, StoreSpaceError, UsageError
from ragkit.jobs.question_files import lies_elsewhere, local_path
from ragkit.jobs.result_log import ResultLog, no_room
from ragkit.object_stores import appears_whole, make_folder
from ragkit.readers.file_systems import move_file, open_file_system
from ragkit.store.files import TEMPORARY_PREFIX, sync_folder, write_file_atomically

SUFFIX = ".partial"
_ROWS, _MANIFEST, _RESULTS, _LOCK = "rows.jsonl", "job.json", "results.log", "lock"


class JobFolder(Protocol):
    """One job's folder and output.

    Attributes:
        out: the output, as the user named it.
        group_rows, group_seconds: when finished rows are written at the latest.
    """

    out: str
    group_rows: int
    group_seconds: float

    def output_exists(self) -> bool:
        """Return whether an output is there already."""
        ...

    def manifest(self) -> bytes | None:
        """Return what the job at hand is, None where there is none."""
        ...

    def start(self, rows: Path, manifest: bytes) -> None:
        """Begin a job: what was there is gone, and its rows and manifest are kept, the manifest last."""
        ...

    def rows(self) -> contextlib.AbstractContextManager[Path]:
        """Give the path of the rows of the job at hand."""
        ...

    def open_log(self, total: int) -> ResultLog:
        """Return the rows that are done."""
        ...

    def append(self, log: ResultLog, rows: list[tuple[int, bytes]]) -> None:
        """Keep more of them; when this returns they are durable."""
        ...

    def publish(self, write: Callable[[Path], None]) -> None:
        """Let `write` fill a file, put it in the output's place at once, and remove the folder."""
        ...


@contextlib.contextmanager
def open_job_folder(out: str) -> Iterator[JobFolder]:
    """Give the folder of the job that writes `out`, for this process alone (at a URL nobody is kept out).

    Raises:
        StoreLockedError: another process works on it.
        UsageError: the output cannot lie there.
    """
    if lies_elsewhere(out):
        with tempfile.TemporaryDirectory(prefix="ragkit-batch-") as scratch:
            yield _RemoteJobFolder(out, Path(scratch))
        return
    local = _LocalJobFolder(out)
    with local.locked():
        yield local


class _LocalJobFolder:
    group_rows = 64
    group_seconds = 1.0

    def __init__(self, out: str) -> None:
        self.out = out
        self._target = Path(local_path(out)).absolute()
        with self._writing():
            if self._target.is_dir():
                raise UsageError(f"--out {out} is a folder; name a file")
        self._folder = self._target.with_name(self._target.name + SUFFIX)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        with self._writing():
            lock = self._lock()
        try:
            with self._writing():
                os.ftruncate(lock, 0)
                os.pwrite(lock, str(os.getpid()).encode(), 0)
            try:
                yield
            finally:
                if self._is_ours(lock) and self.manifest() is None:  # nothing was begun
                    self._remove()
        finally:
            os.close(lock)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Say of which job a file cannot be written, and why."""
        try:
            yield
        except OSError as error:
            if full := no_room(error):
                raise StoreSpaceError(
                    f"{self.out} cannot be written: {full}; make room and run the same command: what is done is kept"
                ) from error
            place = "" if error.filename is None else f": {error.filename}"
            raise JobError(
                f"{self.out} cannot be written: {error.strerror or error}{place}; give an --out in a folder that takes "
                "files"
            ) from error

    def _lock(self) -> int:
        """Return the descriptor of the lock, which nobody else has."""
        path = self._folder / _LOCK
        while True:
            self._folder.mkdir(parents=True, exist_ok=True)
            try:
                lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            except FileNotFoundError:  # who has just finished took the folder away
                continue
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                owner = os.pread(lock, 64, 0).decode("ascii", "replace").strip()
                os.close(lock)
                raise StoreLockedError(
                    f"process {owner or '?'} is working on {self.out} (its folder is {self._folder}): wait for it, "
                    "stop it, or give another --out"
                ) from None
            if self._is_ours(lock):
                return lock
            os.close(lock)

    def _is_ours(self, lock: int) -> bool:
        """Return whether `lock` still lies in the folder: who finishes takes both away, others make new ones."""
        try:
            return os.path.samestat(os.fstat(lock), (self._folder / _LOCK).stat())
        except FileNotFoundError:
            return False

    def output_exists(self) -> bool:
        return self._target.exists()

    def manifest(self) -> bytes | None:
        path = self._folder / _MANIFEST
        return path.read_bytes() if path.exists() else None

    def start(self, rows: Path, manifest: bytes) -> None:
        with self._writing():
            for name in (_MANIFEST, _RESULTS, _ROWS):
                (self._folder / name).unlink(missing_ok=True)
            sync_folder(self._folder)
            write_file_atomically(self._folder / _ROWS, lambda path: _copy(rows, path))
            write_file_atomically(self._folder / _MANIFEST, lambda path: _write(path, manifest))

    @contextlib.contextmanager
    def rows(self) -> Iterator[Path]:
        yield self._folder / _ROWS

    def open_log(self, total: int) -> ResultLog:
        with self._writing():
            log = ResultLog(self._folder / _RESULTS, total)
            sync_folder(self._folder)
        return log

    def append(self, log: ResultLog, rows: list[tuple[int, bytes]]) -> None:
        log.append(rows)

    def publish(self, write: Callable[[Path], None]) -> None:
        with self._writing():
            write_file_atomically(self._target, write)
            self._remove()

    def _remove(self) -> None:
        # Without the manifest what else is left counts for nothing; while it is there the job is published again.
        unfinished = self._folder.glob(f"{TEMPORARY_PREFIX}*")
        for path in (
            self._folder / _MANIFEST,
            *unfinished,
            *(self._folder / name for name in (_ROWS, _RESULTS, _LOCK)),
        ):
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # gone already, or it holds what is not ours
            self._folder.rmdir()


class _RemoteJobFolder:
    """Finished rows lie at the URL as one object a group, and in a scratch file for this process."""

    group_rows = 256
    group_seconds = 10.0

    def __init__(self, out: str, scratch: Path) -> None:
        self.out = public_url(out)
        self._url = out
        self._scratch = scratch
        self._files, self._target = open_file_system(out)
        self._files.invalidate_cache()  # another machine may have gone on since this process looked last
        self._folder = self._target + SUFFIX
        self._groups = 0

    def output_exists(self) -> bool:
        return bool(self._ask(self._files.exists, self._target))

    def manifest(self) -> bytes | None:
        path = f"{self._folder}/{_MANIFEST}"
        return bytes(self._ask(self._files.cat_file, path)) if self._ask(self._files.exists, path) else None

    def start(self, rows: Path, manifest: bytes) -> None:
        self._remove()
        self._ask(make_folder, self._files, self._folder)
        self._ask(self._files.put_file, str(rows), f"{self._folder}/{_ROWS}")
        self._ask(self._files.pipe_file, f"{self._folder}/{_MANIFEST}", manifest)

    @contextlib.contextmanager
    def rows(self) -> Iterator[Path]:
        path = self._scratch / _ROWS
        self._ask(self._files.get_file, f"{self._folder}/{_ROWS}", str(path))
        yield path

    def open_log(self, total: int) -> ResultLog:
        groups = self._written_groups()
        with (self._scratch / _RESULTS).open("wb") as file:
            for group in groups:
                content = bytes(self._ask(self._files.cat_file, group))
                file.write(content if content.endswith(b"\n") else content + b"\n")
        self._groups = max((int(str(group).rpartition("-")[2]) for group in groups), default=-1) + 1
        return ResultLog(self._scratch / _RESULTS, total)

    def append(self, log: ResultLog, rows: list[tuple[int, bytes]]) -> None:
        group = log.append(rows)
        self._ask(self._files.pipe_file, f"{self._folder}/{_RESULTS}-{self._groups:08}", group)
        self._groups += 1

    def publish(self, write: Callable[[Path], None]) -> None:
        whole = self._scratch / "output"
        write(whole)
        if appears_whole(self._files):
            self._ask(self._files.put_file, str(whole), self._target)
        else:
            self._ask(self._files.put_file, str(whole), f"{self._folder}/output")
            self._ask(move_file, self._files, f"{self._folder}/output", self._target)
        self._remove()

    def _remove(self) -> None:
        if self._ask(self._files.exists, self._folder):
            ours = [f"{self._folder}/{_MANIFEST}", f"{self._folder}/{_ROWS}"]
            ours += self._written_groups()
            for path in ours:
                if self._ask(self._files.exists, path):
                    self._ask(self._files.rm_file, path)  # unlike `rm`, which takes patterns
            with contextlib.suppress(Exception):  # stores of objects have no folders; others may hold what is not ours
                self._files.rmdir(self._folder)

    def _written_groups(self) -> list[str]:
        # Listed and compared: to a glob, brackets in the output's name would mean something.
        found = map(str, self._ask(self._files.find, self._folder, maxdepth=1))
        return sorted(path for path in found if path.rpartition("/")[2].startswith(f"{_RESULTS}-"))

    def _ask(self, call: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        try:
            return call(*arguments, **named)
        except Exception as error:  # every file system has errors of its own
            reason = without_credentials(str(error), self._url)
            raise JobError(
                f"{self.out} cannot be written or read: {reason}; the same command goes on with the rest"
            ) from safe_cause(error, self._url)


def _copy(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)


def _write(target: Path, content: bytes) -> None:
    target.write_bytes(content)
