"""`ragkit doctor`: whether this machine has what ragkit needs, and what to do where it has not."""

from __future__ import annotations

import shutil
import sqlite3
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from ragkit.cli.common import Session, command
from ragkit.cli.errors import ExitCode
from ragkit.cli.output import human_bytes, one_line
from ragkit.errors import RagkitError

if TYPE_CHECKING:
    from ragkit.settings import Settings

OK, WARN, FAIL = "ok", "warn", "fail"
LOW_DISK_BYTES = 2_000_000_000


@dataclass(frozen=True, slots=True)
class Check:
    """One thing looked at: `status` is ok, warn or fail; `remedy` says what to do where it is not ok."""

    name: str
    status: str
    detail: str
    remedy: str = ""


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command("doctor")(command(doctor))


def doctor(session: Session) -> None:
    """Check Python, packages, GPU, models, disk and store. Exits with 1 where something is broken."""
    settings = session.settings()
    checks = [check for group in CHECKS for check in group(settings)]
    data = {"ok": all(check.status != FAIL for check in checks), "checks": [asdict(check) for check in checks]}
    session.output.result(data, _lines(checks))
    if not data["ok"]:
        raise typer.Exit(ExitCode.FAILED)


def check_python(settings: Settings) -> Iterator[Check]:
    """Yield whether the interpreter is new enough."""
    found = ".".join(str(part) for part in sys.version_info[:3])
    good = sys.version_info >= (3, 11)
    yield Check("python", OK if good else FAIL, found, "" if good else "install Python 3.11 or newer")


def check_sqlite(settings: Settings) -> Iterator[Check]:
    """Yield whether SQLite can search text."""
    connection = sqlite3.connect(":memory:")
    try:
        connection.execute("CREATE VIRTUAL TABLE probe USING fts5(text)")
        yield Check("sqlite", OK, f"{sqlite3.sqlite_version} with FTS5")
    except sqlite3.Error as error:
        yield Check("sqlite", FAIL, f"{sqlite3.sqlite_version}: {error}", "use a Python whose SQLite has FTS5")
    finally:
        connection.close()


def check_packages(settings: Settings) -> Iterator[Check]:
    """Yield the version of each package that matters."""
    for name, remedy in (
        ("torch", "pip install torch"),
        ("transformers", "pip install ragkit"),
        ("pyarrow", "pip install ragkit"),
    ):
        found = _version(name)
        yield Check(name, OK if found else FAIL, found or "not installed", "" if found else remedy)
    faiss = _version("faiss-cpu"), _version("faiss-gpu")
    if all(faiss):
        yield Check("faiss", WARN, "faiss-cpu and faiss-gpu are both installed", "pip uninstall one: both are `faiss`")
    elif any(faiss):
        yield Check("faiss", OK, f"faiss-cpu {faiss[0]}" if faiss[0] else f"faiss-gpu {faiss[1]}")
    else:
        yield Check("faiss", FAIL, "not installed", "pip install 'ragkit[cpu]' (or 'ragkit[gpu]')")


def check_accelerator(settings: Settings) -> Iterator[Check]:
    """Yield whether there is a GPU, and the Triton that its kernels need. Without one the CPU does the work."""
    wanted = settings.config.device == "cuda"
    try:
        import torch
    except ImportError as error:
        yield Check("cuda", FAIL if wanted else WARN, f"torch cannot be imported: {error}", "pip install torch")
        return
    if not torch.cuda.is_available():
        remedy = "use --device cpu, or install a CUDA build of torch" if wanted else ""
        yield Check("cuda", FAIL if wanted else OK, "none; models run on the CPU", remedy)
        return
    names = ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
    yield Check("cuda", OK, f"{torch.version.cuda}: {names}")
    triton = _version("triton")
    remedy = "" if triton else "pip install triton; until then the torch reference runs instead of the kernels"
    yield Check("triton", OK if triton else WARN, triton or "not installed", remedy)


def check_models(settings: Settings) -> Iterator[Check]:
    """Yield whether the configured models are on this machine."""
    from ragkit.models import resolve

    config = settings.config
    for role, name in (("embedder", config.embedding.model), ("generator", config.generation.model)):
        try:
            yield Check(role, OK, f"{name} in {resolve(name, offline=True)}")
        except RagkitError as error:
            status = FAIL if config.offline or error.code != "offline" else WARN
            yield Check(role, status, str(error), f"ragkit models pull {name}")


def check_disk(settings: Settings) -> Iterator[Check]:
    """Yield whether there is room where the store lies."""
    folder = settings.store.absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    good = free >= LOW_DISK_BYTES
    remedy = "" if good else f"free some space below {folder}, or choose another folder with --store"
    yield Check("disk", OK if good else WARN, f"{human_bytes(free)} free in {folder}", remedy)


def check_store(settings: Settings) -> Iterator[Check]:
    """Yield whether the store opens, and what state its sources are in."""
    from ragkit.pipeline import Pipeline

    if not Path(settings.store).exists():
        yield Check("store", OK, f"none yet in {settings.store}")
        return
    try:
        with Pipeline.open(settings.store, settings.config, create=False) as pipeline:
            _, counts = pipeline.status()
    except RagkitError as error:
        yield Check("store", FAIL, str(error), "`ragkit verify` says what is damaged")
        return
    detail = f"{counts.sources:,} sources, {counts.failed:,} failed, {counts.damaged:,} damaged"
    if counts.damaged:
        yield Check("store", FAIL, detail, "`ragkit verify --repair`, then the same ingest again")
    elif counts.failed:
        yield Check("store", WARN, detail, "`ragkit status` names them; --retry-failed tries again")
    else:
        yield Check("store", OK, detail)


CHECKS: tuple[Callable[[Settings], Iterator[Check]], ...] = (
    check_python,
    check_sqlite,
    check_packages,
    check_accelerator,
    check_models,
    check_disk,
    check_store,
)


def _version(package: str) -> str:
    """Return the installed version of `package`, or nothing."""
    from importlib.metadata import PackageNotFoundError, version  # slow to import

    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _lines(checks: list[Check]) -> Iterator[str]:
    width = max(len(check.name) for check in checks)
    for check in checks:
        remedy = f"  -> {one_line(check.remedy)}" if check.remedy else ""
        yield f"{check.status:<4}  {check.name:<{width}}  {one_line(check.detail)}{remedy}"
