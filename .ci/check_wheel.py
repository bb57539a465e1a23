"""Checks the built wheel, the only form in which the top-level folders are one package without an editable install.

`types` runs mypy over it and compares the number of files checked with the tree; `install` installs it beside nothing
else and runs the command from another folder.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("ragkit", "chunking", "cli", "kernels", "kvcache", "retrieval")
BESIDE = ("pyproject.toml", "README.md", "LICENSE")


def main(task: str) -> int:
    """Run one task in a temporary folder and return the exit code."""
    with tempfile.TemporaryDirectory(prefix="ragkit-wheel-") as name:
        folder = Path(name)
        wheel = build(folder)
        return {"types": check_types, "install": check_install}[task](wheel, folder)


def build(folder: Path) -> Path:
    """Return a wheel built from a copy of the tree: a build folder left in the tree would leak old modules into it."""
    copy = folder / "tree"
    for name in FOLDERS:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in BESIDE:
        shutil.copy(ROOT / name, copy)
    _run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(copy)])
    return next(folder.glob("*.whl"))


def check_types(wheel: Path, folder: Path) -> int:
    """Return 0 where mypy is content with every module of the tree."""
    site = folder / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    environment = os.environ | {"MYPYPATH": str(site)}
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), "-p", "ragkit"]
    command += ["--cache-dir", str(ROOT / ".mypy_cache")]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    report = done.stdout.replace(f"{site.name}/ragkit/", "ragkit/")
    sys.stdout.write(report + done.stderr)
    counted = re.search(r"(\d+) source files?", report)
    return done.returncode or _compare("mypy checked", int(counted[1]) if counted else 0)


def check_install(wheel: Path, folder: Path) -> int:
    """Return 0 where the wheel holds every module and its command runs from another folder."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    if "ragkit/py.typed" not in names:
        sys.stdout.write("the wheel lacks ragkit/py.typed\n")
        return 1
    site, elsewhere = folder / "site", folder / "elsewhere"
    elsewhere.mkdir()
    _run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel)])
    environment = os.environ | {"PYTHONPATH": str(site)}
    where = "import ragkit.cli.app as app; print(app.__file__)"
    loaded = _run([sys.executable, "-c", where], cwd=elsewhere, env=environment).strip()
    if not Path(loaded).is_relative_to(site):
        sys.stdout.write(f"the installed wheel should have been loaded, got {loaded}\n")
        return 1
    shown = _run([str(site / "bin" / "ragkit"), "--help"], cwd=elsewhere, env=environment)
    if not shown.startswith("Usage: ragkit "):
        sys.stdout.write(f"`ragkit --help` should show its usage, got {shown!r}\n")
        return 1
    return _compare("the wheel holds", sum(name.endswith(".py") for name in names))


def _compare(what: str, count: int) -> int:
    expected = sum(1 for name in FOLDERS for _ in (ROOT / name).rglob("*.py"))
    sys.stdout.write(f"{what} {count} of {expected} modules\n")
    return 0 if count == expected else 1


def _run(command: list[str], cwd: Path | None = None, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    if sys.argv[1:] not in (["types"], ["install"]):
        sys.exit("usage: check_wheel.py types | install")
    sys.exit(main(sys.argv[1]))
