"""The documents say what is there: links resolve, examples run, and the lists in them match the tree."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").glob("*.md")])
PACKAGE_FOLDERS = ("ragkit", "chunking", "retrieval", "kvcache", "kernels", "cli")
README = ROOT / "README.md"


def test_every_promised_document_is_there():
    names = {str(path.relative_to(ROOT)) for path in DOCUMENTS}
    assert {
        "README.md",
        "CONTRIBUTING.md",
        "CHANGELOG.md",
        "docs/architecture.md",
        "docs/dependencies.md",
        "examples/SOURCE.md",
    } <= names


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files_and_headings_that_exist(document: Path):
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", _without_code(document.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (document.parent / name).resolve() if name else document
        if not path.exists() or (anchor and anchor not in _anchors(path)):
            broken.append(target)
    assert broken == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_documents_hold_no_placeholders(document: Path):
    found = re.findall(r"\b(?:TODO|TBD|FIXME|XXX|lorem ipsum)\b", document.read_text(encoding="utf-8"))
    assert found == []


def test_the_readme_example_is_the_file_that_is_run():
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert blocks[0] == (ROOT / "examples" / "quickstart.py").read_text(encoding="utf-8")


@pytest.mark.models
def test_the_readme_example_runs(tmp_path: Path):
    collection = tmp_path / "examples" / "collection"
    collection.mkdir(parents=True)
    for name in ("wal.html", "limits.pdf", "result_codes.csv"):
        shutil.copy(ROOT / "examples" / "collection" / name, collection)
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "quickstart.py")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("3 documents added, 0 unchanged\n")
    assert "wal.html: '" in done.stdout


def test_commands_and_options_in_the_readme_exist():
    import typer

    from ragkit.cli.app import app

    root = typer.main.get_command(app)
    missing = []
    for line in _command_lines(README.read_text(encoding="utf-8")):
        command, words = root, line.split()[1:]
        while words and hasattr(command, "commands") and words[0] in command.commands:
            command = command.commands[words.pop(0)]
        if hasattr(command, "commands") and words and not words[0].startswith("-"):
            missing.append(line)
        known = {name for holder in (root, command) for option in holder.params for name in option.opts}
        known |= {name for option in command.params for name in option.secondary_opts} | {"--help"}
        missing += [
            f"{line}: {word}" for word in words if re.match(r"--?[a-z]", word) and word.split("=")[0] not in known
        ]
    assert missing == []


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_make_targets_in_the_documents_exist(document: str):
    named = set(re.findall(r"(?:^|`)make ([a-z-]+)", (ROOT / document).read_text(encoding="utf-8"), flags=re.MULTILINE))
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    assert named
    assert named <= targets


def test_architecture_has_one_sentence_for_every_module():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    listed = Counter(re.findall(r"^\| `([\w./]+\.py)` \| \S.*\. \|$", text, flags=re.MULTILINE))
    modules = {
        str(path.relative_to(ROOT))
        for folder in PACKAGE_FOLDERS
        for path in (ROOT / folder).rglob("*.py")
        if path.name != "__init__.py"
    }
    assert set(listed) - modules == set(), "listed, but not in the tree"
    assert modules - set(listed) == set(), "in the tree, but not listed"
    assert [name for name, count in listed.items() if count > 1] == []


def test_every_dependency_has_its_reason():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = [
        *project["dependencies"],
        *(line for extra in project["optional-dependencies"].values() for line in extra),
    ]
    names = {re.match(r"[\w.-]+", line)[0] for line in declared} - {"ragkit"}
    text = (ROOT / "docs" / "dependencies.md").read_text(encoding="utf-8")
    explained = Counter(re.findall(r"^\| `([\w.-]+)` \|", text, flags=re.MULTILINE))
    assert set(explained) == names
    assert [name for name, count in explained.items() if count > 1] == []


def test_the_changelog_starts_with_the_version_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    versions = re.findall(r"^## \[([\w.]+)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert next(version for version in versions if version != "Unreleased") == project["version"]


def test_the_demo_collection_is_small_and_names_its_source():
    collection = ROOT / "examples" / "collection"
    files = [path for path in collection.iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 1_000_000
    assert {path.suffix for path in files} == {".html", ".pdf", ".md", ".csv"}
    source = (ROOT / "examples" / "SOURCE.md").read_text(encoding="utf-8")
    assert f"holds {len(files)} files" in source
    assert "public domain" in source


def _without_code(text: str) -> str:
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"`[^`\n]*`", "", text)


def _anchors(path: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def _command_lines(text: str) -> list[str]:
    """Return what follows a prompt in the code blocks, and the commands named in running text."""
    blocks = re.findall(r"^```(?:sh|console)?\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    shell = [line.removeprefix("$ ") for block in blocks for line in block.splitlines()]
    inline = re.findall(r"`(ragkit [^`\n]+)`", text)
    return [re.sub(r"\s+#.*", "", line) for line in [*shell, *inline] if line.startswith("ragkit ")]
