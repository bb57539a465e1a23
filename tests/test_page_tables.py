"""The tables of docs/pages.md: from raw results, and none where nothing was measured."""

from __future__ import annotations

import json

import page_tables as tables
import pytest

FACTS = {"commit": "0123456789", "date": "2026-01-02T03:04:05+00:00", "machine": {"gpus": ["H100"], "cpu": "x"}}


def test_figures_are_shown_with_their_command_and_file(tmp_path):
    row = {"tokens": 1048576, "codec": "int4", "interval": 8, "gb": 38.6, "step_ms": 7.5, "times_8k": 1.2,
           "attention_ms": 1.1, "selection_share": 0.123}  # fmt: skip
    reading = {"tokens": 1048576, "seconds": 55.4, "is_extrapolated": True, "peak_gb": 66.2}
    record = {**FACTS, "result": {"decode": [row], "prefill": reading}}
    (tmp_path / "pages_speed.json").write_text(json.dumps(record), encoding="utf-8")
    table = tables.decode_table(tmp_path)
    assert "| 1,048,576 | int4 | 8 | 1 | 38.6 | 7.50 | 1.20 | 1.10 | 12.3% |" in table
    assert "Reading 1,048,576 tokens takes 55 s, from windows at three places, with at most 66 GB" in table
    assert "`python benchmarks/pages_speed.py` at commit 0123456, 2026-01-02, H100." in table


def test_a_score_stands_with_its_interval_under_its_length(tmp_path):
    row = {"strategy": "pages", "task": "needle", "score": 97.0, "low": 90.9, "high": 100.0}
    record = {**FACTS, "rows": [{**row, "length": 8192}], "cells": [], "settings": {"generator": "/models/small.gguf"}}
    (tmp_path / "pages_ruler.json").write_text(json.dumps(record), encoding="utf-8")
    table = tables.ruler_table(tmp_path)
    assert "| pages | needle | 97 (91 to 100) |" in table
    assert "- small, 2026-01-02, H100, raw numbers in `benchmarks/results`: 8,192 tokens (`pages_ruler.json`)." in table


def test_runs_of_some_lengths_each_make_one_table_and_models_stay_apart(tmp_path):
    row = {"strategy": "rag", "task": "vt", "low": 0.0, "high": 100.0}
    for name, generator, length, score, ended in (
        ("pages_ruler", "q.gguf", 8192, 50.0, False), ("pages_ruler_32768", "q.gguf", 32768, 25.0, True),
    ):  # fmt: skip
        record = {**FACTS, "rows": [{**row, "length": length, "score": score}], "interrupted": ended,
                  "settings": {"generator": generator, "lengths": [length]}}  # fmt: skip
        (tmp_path / f"{name}.json").write_text(json.dumps(record), encoding="utf-8")
    table = tables.ruler_table(tmp_path)
    assert "| strategy | task | 8,192 | 32,768 |" in table
    assert "| rag | vt | 50 (0 to 100) | 25 (0 to 100) |" in table
    assert "8,192 tokens (`pages_ruler.json`); 32,768 tokens (`pages_ruler_32768.json`, ended before its end)." in table
    record["settings"]["generator"] = "s.gguf"
    (tmp_path / "pages_ruler_32768.json").write_text(json.dumps(record), encoding="utf-8")
    table = tables.ruler_table(tmp_path)
    assert "| q | rag | vt | 50 (0 to 100) |  |" in table
    assert "| s | rag | vt |  | 25 (0 to 100) |" in table


def test_the_row_of_more_questions_stands_and_what_nobody_chose_comes_first(tmp_path):
    row = {"task": "needle", "low": 0.0, "high": 100.0, "length": 8192}
    for name, strategy, score, questions in (
        ("pages_needle_a", "pages min-max", 25.0, 33), ("pages_needle_b", "pages low-rank", 50.0, 33),
        ("pages_needle_c", "pages low-rank", 75.0, 17),
    ):  # fmt: skip
        record = {**FACTS, "rows": [{**row, "strategy": strategy, "score": score, "questions": questions}],
                  "cells": [], "settings": {"generator": "q.gguf", "lengths": [8192]}}  # fmt: skip
        (tmp_path / f"{name}.json").write_text(json.dumps(record), encoding="utf-8")
    rows = [line for line in tables.needle_table(tmp_path).splitlines() if line.startswith("| pages")]
    assert "50 (0 to 100) |" in rows[0]
    assert [line.split(" (")[0] for line in rows] == ["| pages low-rank | needle | 50", "| pages min-max | needle | 25"]


def test_a_row_of_fewer_questions_than_others_says_so(tmp_path):
    row = {"task": "needle", "low": 0.0, "high": 100.0}
    rows = [{**row, "strategy": "rag", "score": 50.0, "length": 8192, "questions": 33},
            {**row, "strategy": "rag", "score": 25.0, "length": 16384, "questions": 12}]  # fmt: skip
    record = {**FACTS, "rows": rows, "cells": [], "settings": {"generator": "q.gguf", "lengths": [8192, 16384, 32768]}}
    (tmp_path / "pages_needle.json").write_text(json.dumps(record), encoding="utf-8")
    table = tables.needle_table(tmp_path)
    assert "| rag | needle | 50 (0 to 100) | 25 (0 to 100), n=12 |" in table
    assert "raw numbers in `benchmarks/results`: 8,192, 16,384 tokens (`pages_needle.json`)." in table


def test_decoding_and_reading_that_were_measured_apart_stand_with_a_command_each(tmp_path):
    row = {"tokens": 8192, "codec": "int4", "interval": 8, "gb": 0.3, "step_ms": 6.5, "times_8k": 1.0,
           "attention_ms": 1.0, "selection_share": 0.1}  # fmt: skip
    reading = {"tokens": 8192, "seconds": 55.4, "is_extrapolated": False, "peak_gb": 66.2}
    results = {
        "pages_speed": {"decode": [row]},
        "pages_speed_read": {"decode": [], "prefill": reading, "arguments": ["--parts", "prefill"]},
        "pages_speed_two": {"decode": [row], "pages": {"layer_interval": "2"}},
    }
    for name, result in results.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({**FACTS, "result": result}), encoding="utf-8")
    table = tables.decode_table(tmp_path)
    assert [line.split(" | ")[3] for line in table.splitlines() if line.startswith("| 8,192")] == ["1", "2"]
    assert "Reading 8,192 tokens takes 55 s, with at most 66 GB of GPU memory." in table
    assert "`python benchmarks/pages_speed.py --parts prefill` at commit 0123456" in table
    assert table.count("Raw numbers:") == 3


def test_the_heat_map_is_drawn_from_the_raw_results(tmp_path):
    pytest.importorskip("matplotlib")
    cell = {"strategy": "pages", "row": "50%", "length": 8192, "score": 100.0, "questions": 3}
    (tmp_path / "pages_needle.json").write_text(
        json.dumps({**FACTS, "rows": [{**cell, "task": "needle"}], "cells": [cell], "settings": {}}), encoding="utf-8"
    )
    assert tables.write_heat_map(tmp_path, tmp_path / "needle_heat_map.svg")
    assert (tmp_path / "needle_heat_map.svg").read_bytes().startswith(b"<?xml")
    assert not tables.write_heat_map(tmp_path / "nothing")


def test_a_second_question_stands_with_where_its_pages_came_from(tmp_path):
    row = {"pages_from": "disk", "first_token_ms": 2712.4, "read_mb": 437.3, "tokens": 1180928}
    record = {**FACTS, "result": {"rows": [row]}}
    (tmp_path / "pages_second_question.json").write_text(json.dumps(record), encoding="utf-8")
    table = tables.second_question_table(tmp_path)
    assert "| disk | 2,712 | 437 | 1,180,928 |" in table
    assert "`python benchmarks/pages_second_question.py MODEL TEXT` at commit 0123456, 2026-01-02, H100." in table


def test_needles_that_stand_together_have_a_table_of_their_own(tmp_path):
    row = {"strategy": "pages", "task": "needle", "length": 8192, "low": 50.0, "high": 90.0}
    for name, score in (("pages_needle", 100.0), ("pages_together", 70.0)):
        record = {**FACTS, "rows": [{**row, "score": score}], "cells": [], "settings": {"generator": "q.gguf"}}
        (tmp_path / f"{name}.json").write_text(json.dumps(record), encoding="utf-8")
    assert "| pages | needle | 100 (50 to 90) |" in tables.needle_table(tmp_path)
    assert "| pages | needle | 70 (50 to 90) |" in tables.together_table(tmp_path)


def test_the_heat_map_shows_the_run_of_most_questions(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("ragkit.bench.long_plots.write_heat_map", lambda report, *_: drawn.append(report.cells))
    cell = {"strategy": "pages", "row": "50%", "length": 8192}
    for name, score, questions in (("pages_needle_a", 100.0, 3), ("pages_needle_b", 50.0, 2)):
        one = {**cell, "score": score, "questions": questions}
        record = {**FACTS, "rows": [{**one, "task": "needle"}], "cells": [one], "settings": {}}
        (tmp_path / f"{name}.json").write_text(json.dumps(record), encoding="utf-8")
    assert tables.write_heat_map(tmp_path, tmp_path / "needle_heat_map.svg")
    assert [one.score for one in drawn[0]] == [100.0]
