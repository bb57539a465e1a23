import json

import draft_tables as tables

FACTS = {"commit": "0123456789", "date": "2026-01-02T03:04:05+00:00", "machine": {"gpus": ["H100"]}}
LOOP = {
    "context": 130560, "drafter": "self", "imposed": "0.8", "ms_per_token": 11.5, "plain_ms": 13.0, "speed_up": 1.1304,
    "ceiling": 1.21, "of_ceiling": 0.934, "begun": True, "drafted_per_pass": 1.5, "stood_share": 0.79, "looked_at": 131,
}  # fmt: skip


def written(folder, name, result):
    record = {**FACTS, "benchmark": name, "result": result}
    (folder / f"{name}.json").write_text(json.dumps(record), encoding="utf-8")


def test_loops_are_shown_with_their_ceiling_and_what_stood(tmp_path):
    idle = {**LOOP, "drafter": "self-4bit", "begun": False, "looked_at": 0}
    written(tmp_path, "speculative_speed", {"loops": [LOOP, idle]})
    table = tables.loop_table(tmp_path)
    assert "| 130,560 | self | 0.8 | 11.50 | 13.00 | 1.130 | 1.21 | 0.93 | 1.50 | 0.79 of 131 |" in table
    assert "| not begun |  |" in table
    assert "`python benchmarks/speculative_speed.py` at commit 0123456, 2026-01-02, H100." in table


def test_runs_of_one_script_stand_behind_each_other_with_their_commands(tmp_path):
    row = {"drafter": "lookup", "passes": 85, "proposed": 8.79, "stood": 3.58, "acceptance": 0.82}
    for name, quote in (("draft_runs", False), ("draft_runs_quote", True)):
        options = {"generator": "/models/small.gguf", "tokens": 31000, "quote": quote, "name": name}
        written(tmp_path, name, {"options": options, "drafters": [row]})
    table = tables.runs_table(tmp_path)
    assert table.count("| lookup | 85 | 8.8 | 3.58 | 0.82 |") == 2
    assert "draft_runs.py --generator small.gguf --tokens 31000 --name draft_runs_quote --quote` at commit" in table


def test_speeds_and_scores_stand_with_their_intervals(tmp_path):
    row = {"drafter": "lookup", "answers": 8, "prompt_tokens": 7590.0, "acceptance": 0.5, "per_pass": 2.0,
           "ms_per_token": 59.6, "speed": [1.7, 1.5, 1.9], "same": 1.0}  # fmt: skip
    written(tmp_path, "draft_acceptance", {"options": {}, "sources": {"xquad": {"rows": [row]}}})
    table = tables.acceptance_table(tmp_path)
    assert "| xquad | lookup | 8 | 7,590 | 50% | 2.00 | 59.6 | 1.70 (1.50 to 1.90) | 100% |" in table
    way = {"way": "exact", "score": "0.5 (0.4 to 0.6)", "against target": "+0.0 (-0.1 to +0.1)", "stood": "50%"}
    written(tmp_path, "draft_quality", {"options": {}, "prompts": 60, "rows": [way]})
    assert "| exact | 0.5 (0.4 to 0.6) | +0.0 (-0.1 to +0.1) | 50% |" in tables.quality_table(tmp_path)
