"""What the pages have in common whose tables are written from raw results: `page_tables.py` and `draft_tables.py`.

A table stands between `<!-- name -->` and `<!-- end -->`. One whose raw file is not there is left out, so that no
figure stands in a page that nobody measured.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
RESULTS = DOCS.parent / "benchmarks" / "results"
_BEGIN, _END = "<!-- {} -->", "<!-- end -->"

Record = Mapping[str, Any]
Tables = Mapping[str, Callable[[Path], str]]


def with_tables(text: str, tables: Tables, results: Path) -> str:
    """Return the page with every table anew."""
    for name, table in tables.items():
        body = f"{_BEGIN.format(name)}\n{table(results)}{_END}"
        pattern = re.escape(_BEGIN.format(name)) + r"\n.*?" + re.escape(_END)
        text, count = re.subn(pattern, lambda _, body=body: body, text, flags=re.DOTALL)
        if count != 1:
            raise SystemExit(f"the page must have one place for the table {name!r}, it has {count}")
    return text


def write_or_check(path: Path, tables: Tables) -> int:
    """Write a page, or with `--check` compare it with what would be written; return the exit code."""
    current = path.read_text(encoding="utf-8")
    wanted = with_tables(current, tables, RESULTS)
    if "--check" in sys.argv[1:]:
        if current != wanted:
            sys.stderr.write(f"{path.name} is out of date: run `make docs`\n")
        return int(current != wanted)
    path.write_text(wanted, encoding="utf-8")
    return 0


def records(results: Path, name: str) -> list[tuple[str, Record]]:
    """Return the name and the content of every raw file whose name begins with `name`, in their order."""
    paths = sorted(results.glob(f"{name}*.json"), key=lambda path: path.stem)
    return [(path.stem, json.loads(path.read_text(encoding="utf-8"))) for path in paths]


def origin(record: Record, command: str, name: str) -> str:
    """Return what says where figures are from."""
    return (
        f"`{command}` at commit {record['commit'][:7]}, {record['date'][:10]}, {machine_of(record)}. Raw numbers: "
        f"`benchmarks/results/{name}.json`."
    )


def machine_of(record: Record) -> str:
    """Return what a record was measured on."""
    machine = record.get("machine", {})
    return ", ".join(machine.get("gpus", ())) or str(machine.get("cpu", "machine unknown"))
