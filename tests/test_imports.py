"""Imports go one way, and what starts often starts without the heavy packages."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("ragkit", "chunking", "cli", "kernels", "kvcache", "retrieval")

# A module imports from its own level and from those above it in this list.
LEVELS = (
    (
        "types",
        "errors",
        "config",
        "batch_config",
        "jobs_config",
        "draft_config",
        "progress",
        "reports",
        "settings",
        "setting_names",
        "credentials",
        "object_stores",
        "setting_values",
        "setting_checks",
        "figures",
    ),
    ("store", "models", "kernels"),
    ("kvcache",),
    ("generation",),
    ("chunking", "retrieval", "readers"),
    (
        "answers",
        "pipeline",
        "jobs",
        "parts",
        "documents",
        "drafting",
        "request",
        "bench",
        "integrations",
        "async_questions",
        "async_stream",
        "export",
    ),
    ("cli",),
)
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}
# These know nothing of each other: the pipeline brings them together.
APART = {"chunking", "retrieval", "readers"}
# What answers and retrieval exchange is plain data.
SHARED = {"answers.base": 0}

HEAVY = {"torch", "transformers", "sentence_transformers", "numpy", "pyarrow", "faiss", "triton", "tokenizers", "rich"}


def part_of(module: str) -> str:
    return module.split(".")[1] if module.count(".") else ""


def level_of(module: str) -> int:
    return SHARED.get(module.removeprefix("ragkit."), LEVEL.get(part_of(module), -1))


def imports_of(path: Path) -> Iterator[str]:
    """Yield the modules of ragkit that a file imports, inside functions too, but not those for type checking only."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    unseen = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for body in node.body
        for inner in ast.walk(body)
    }
    for node in ast.walk(tree):
        if id(node) in unseen:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("ragkit."))
        elif isinstance(node, ast.ImportFrom) and node.module == "ragkit":
            yield from (f"ragkit.{alias.name}" for alias in node.names if alias.name in LEVEL)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ragkit."):
            yield str(node.module)


def modules() -> Iterator[tuple[str, Path]]:
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            names = list(path.relative_to(ROOT).with_suffix("").parts)
            if names != ["ragkit", "__init__"]:
                yield ".".join(names if names[0] == "ragkit" else ["ragkit", *names]), path


def test_every_module_has_a_level():
    assert sorted({part_of(name) for name, _ in modules()} - set(LEVEL)) == []


def test_imports_go_one_way():
    wrong = [
        f"{name} imports {imported}"
        for name, path in modules()
        for imported in imports_of(path)
        if level_of(imported) > level_of(name)
        or (part_of(name) != part_of(imported) and {part_of(name), part_of(imported)} <= APART)
    ]
    assert wrong == []


def test_no_import_is_relative():
    wrong = [
        name
        for name, path in modules()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and node.level
    ]
    assert wrong == []


@pytest.mark.parametrize(
    ("code", "most"),
    [
        ("import ragkit", 100),
        ("import ragkit; ragkit.PipelineConfig, ragkit.Answer, ragkit.Document", 130),
        ("from ragkit.cli.app import main; main(['--help'])", 240),
        ("from ragkit.cli.app import main; main(['query', '--help'])", 360),
        ("from ragkit.cli.app import main; main(['config', 'show'])", 360),
        ("from ragkit.cli.app import main; main(['nonsense'])", 360),
    ],
)
def test_a_cold_start_loads_nothing_heavy_and_little_at_all(code: str, most: int, tmp_path: Path):
    script = f"{code}\nimport json, sys; sys.stderr.write('\\n' + json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, timeout=60)
    loaded = json.loads(done.stderr.splitlines()[-1])
    assert sorted(HEAVY & {name.split(".")[0] for name in loaded}) == []
    assert len(loaded) <= most
