"""The tables of docs/pages.md: from raw results, and none where nothing was measured."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parent.parent / "docs"
FACTS = {"commit": "0123456789", "date": "2026-01-02T03:04:05+00:00", "machine": {"gpus": ["H100"], "cpu": "x"}}


@pytest.fixture(scope="module")
def tables():
    spec = importlib.util.spec_from_file_location("page_tables", DOCS / "page_tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_holds_the_tables_of_the_raw_results(tables):
    current = (DOCS / "pages.md").read_text(encoding="utf-8")
    assert tables.page(current) == current


def test_a_table_that_nobody_measured_is_left_out(tables, tmp_path):
    text = tables.page((DOCS / "pages.md").read_text(encoding="utf-8"), tmp_path)
    for name in tables.TABLES:
        assert f"<!-- {name} -->\n<!-- end -->" in text


def test_figures_are_shown_with_their_command_and_file(tables, tmp_path):
    row = {"tokens": 1048576, "codec": "int4", "gb": 38.6, "step_ms": 7.5, "times_8k": 1.2, "attention_ms": 1.1,
           "selection_share": 0.123}  # fmt: skip
    reading = {"tokens": 1048576, "seconds": 55.4, "is_extrapolated": True, "peak_gb": 66.2}
    record = {**FACTS, "result": {"decode": [row], "prefill": reading}}
    (tmp_path / "pages_speed.json").write_text(json.dumps(record), encoding="utf-8")
    table = tables.decode_table(tmp_path)
    assert "| 1,048,576 | int4 | 38.6 | 7.50 | 1.20 | 1.10 | 12.3% |" in table
    assert "Reading 1,048,576 tokens takes 55 s, from windows at three places, with at most 66 GB" in table
    assert "`python benchmarks/pages_speed.py` at commit 0123456, 2026-01-02, H100." in table


def test_a_score_stands_with_its_interval_under_its_length(tables, tmp_path):
    row = {"strategy": "pages", "task": "needle", "score": 97.0, "low": 90.9, "high": 100.0}
    record = {**FACTS, "rows": [{**row, "length": 8192}], "cells": [], "settings": {"generator": "/models/small.gguf"}}
    (tmp_path / "pages_ruler.json").write_text(json.dumps(record), encoding="utf-8")
    table = tables.ruler_table(tmp_path)
    assert "| pages | needle | 97 (91 to 100) |" in table
    assert "small.gguf, 2026-01-02, H100" in table


def test_the_heat_map_is_drawn_from_the_raw_results(tables, tmp_path):
    pytest.importorskip("matplotlib")
    cell = {"strategy": "pages", "row": "50%", "length": 8192, "score": 100.0, "questions": 3}
    (tmp_path / "pages_needle.json").write_text(
        json.dumps({**FACTS, "cells": [cell], "settings": {}}), encoding="utf-8"
    )
    assert tables.write_heat_map(tmp_path, tmp_path / "needle_heat_map.svg")
    assert (tmp_path / "needle_heat_map.svg").read_bytes().startswith(b"<?xml")
    assert not tables.write_heat_map(tmp_path / "nothing")
