"""The top-level folders are one package, `ragkit`, and are never loaded as anything else."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from importlib.metadata import entry_points
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
MAPPED = {folder: package for package, folder in SETUPTOOLS["package-dir"].items()}
BARE = sorted(set(MAPPED) - {"ragkit"})
CODE = [*MAPPED, "tests", "benchmarks", "examples", "docs", ".ci"]

IMPORT_EVERYTHING = """
import importlib, pkgutil, sys
import ragkit
missing = []
def walk(package):
    for info in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        try:
            module = importlib.import_module(info.name)
        except ImportError as error:
            if getattr(error, "name", None) and error.name.split(".")[0] in {"ray", "llama_index"}:
                continue  # an extra that is not installed
            raise
        if info.ispkg:
            walk(module)
walk(ragkit)
for name in ("chunking", "cli", "kernels", "kvcache", "retrieval"):
    walk(importlib.import_module("ragkit." + name))
root = sys.argv[1]
for name, module in sorted(sys.modules.items()):
    file = getattr(module, "__file__", None) or ""
    ours = file.startswith(root + "/") and not file.startswith(sys.prefix)
    if ours and name.split(".")[0] not in ("ragkit", "__main__"):
        print(name, file)
print(sum(name == "ragkit" or name.startswith("ragkit.") for name in sys.modules), "modules")
"""


def packages_in_the_tree() -> set[str]:
    found = set()
    for folder, package in MAPPED.items():
        for init in (ROOT / folder).rglob("__init__.py"):
            found.add(".".join([package, *init.parent.relative_to(ROOT / folder).parts]))
    return found


def test_the_package_list_is_the_tree():
    assert sorted(SETUPTOOLS["packages"]) == sorted(packages_in_the_tree())


def test_every_folder_with_modules_is_a_package():
    folders = {path.parent for folder in MAPPED for path in (ROOT / folder).rglob("*.py")}
    assert sorted(str(folder) for folder in folders if not (folder / "__init__.py").exists()) == []


def test_the_command_is_the_command_lines_main():
    [command] = [entry for entry in entry_points(group="console_scripts") if entry.name == "ragkit"]
    assert command.value == "ragkit.cli.app:main"
    assert callable(command.load())


def test_no_file_imports_a_folder_under_its_bare_name():
    wrong = []
    for folder in CODE:
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                if isinstance(node, ast.ImportFrom) and node.level == 0:
                    names = [node.module or ""]
                wrong += [f"{path.relative_to(ROOT)}: {name}" for name in names if name.split(".")[0] in BARE]
    assert wrong == []


def test_no_module_is_ever_loaded_under_its_bare_name():
    """Trap: from the root `import chunking` would make a second copy of every class."""
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_EVERYTHING, str(ROOT)], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    *wrong, counted = done.stdout.splitlines()
    assert wrong == []
    assert int(counted.split()[0]) >= len(packages_in_the_tree())


SPAWN = """
import multiprocessing

def child():
    import ragkit.chunking.base as base
    raise SystemExit(0 if base.__name__ == "ragkit.chunking.base" else 1)

def main():
    process = multiprocessing.get_context("spawn").Process(target=child)
    process.start()
    process.join(60)
    raise SystemExit(process.exitcode)
"""


@pytest.mark.parametrize("code", ["import ragkit.cli.app, ragkit.chunking.base", "import spawned; spawned.main()"])
def test_from_the_root_the_editable_install_is_complete(code: str, tmp_path: Path):
    """Trap: from the root `./ragkit` comes before an installed wheel; the editable install still finds every folder."""
    (tmp_path / "spawned.py").write_text(SPAWN)
    command = [sys.executable, "-c", f"import sys; sys.path.append({str(tmp_path)!r}); {code}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
