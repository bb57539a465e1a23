"""Writes the tables of docs/speculative.md from raw results.

`python docs/draft_tables.py` writes them; with `--check` it exits with 1 where the page is not what it would write. A
table whose raw file is not there is left out, so that no figure stands in the page that nobody measured. Raw files come
from `benchmarks/speculative_speed.py`, `draft_acceptance.py`, `draft_quality.py` and `draft_runs.py`; those of several
runs of one script (`--name`) stand behind each other.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from result_tables import DOCS, Record, origin, records, write_or_check

PAGE = DOCS / "speculative.md"
_NAMED = ("generator", "device", "dtype", "source", "sources", "tokens", "questions", "drafters", "name")  # in commands


def pass_table(results: Path) -> str:
    """Return what passes over several tokens cost beside a plain step."""
    rows = [
        (f"{row['context']:,}", str(row["tokens"] or "a plain step"), f"{row['ms']:.2f}", f"{row['ratio']:.3f}")
        for _, record in records(results, "speculative_speed")
        for row in record["result"]["passes"]
    ]
    return _speed(results, ("tokens before", "tokens of the pass", "ms", "times a plain step"), rows)


def step_table(results: Path) -> str:
    """Return what drafted tokens cost."""
    rows = [
        (row["drafter"], f"{row['context']:,}", f"{row['first_ms']:.2f}", f"{row['ms']:.2f}")
        for _, record in records(results, "speculative_speed")
        for row in record["result"]["drafts"]
    ]
    return _speed(results, ("drafter", "tokens before", "the first token, ms", "each further one, ms"), rows)


def loop_table(results: Path) -> str:
    """Return what drafted decoding brings at imposed acceptances."""
    rows = [
        (
            f"{row['context']:,}", row["drafter"], row["imposed"], f"{row['ms_per_token']:.2f}",
            f"{row['plain_ms']:.2f}", f"{row['speed_up']:.3f}", f"{row['ceiling']:.2f}", f"{row['of_ceiling']:.2f}",
            f"{row['drafted_per_pass']:.2f}" if row["begun"] else "not begun",
            f"{row['stood_share']:.2f} of {row['looked_at']}" if row.get("looked_at") else "",
        )
        for _, record in records(results, "speculative_speed")
        for row in record["result"]["loops"]
    ]  # fmt: skip
    heading = (
        "tokens before", "drafter", "acceptance", "ms a token", "plain, ms", "times plain", "ceiling",
        "of the ceiling", "drafted a pass", "stood of those looked at",
    )  # fmt: skip
    return _speed(results, heading, rows)


def acceptance_table(results: Path) -> str:
    """Return how many drafted tokens stand on grounded questions, and how much sooner answers come."""
    parts = []
    for _, record in records(results, "draft_acceptance"):
        rows = [
            (
                source, row["drafter"], str(row["answers"]), f"{row['prompt_tokens']:,.0f}",
                f"{row['acceptance']:.0%}" if row["drafter"] != "none" else "", f"{row['per_pass']:.2f}",
                f"{row['ms_per_token']:.1f}", "{:.2f} ({:.2f} to {:.2f})".format(*row["speed"]), f"{row['same']:.0%}",
            )
            for source, measured in record["result"]["sources"].items()
            for row in measured["rows"]
        ]  # fmt: skip
        heading = (
            "source", "drafter", "answers", "prompt tokens", "stood", "tokens a pass", "ms a token",
            "times plain (95%)", "same answers",
        )  # fmt: skip
        parts.append(_table(heading, rows) + "\n" + _origin(record, "draft_acceptance"))
    return "\n".join(parts)


def runs_table(results: Path) -> str:
    """Return how many of 16 drafted tokens stand, pass after pass."""
    parts = []
    for _, record in records(results, "draft_runs"):
        rows = [
            (row["drafter"], str(row["passes"]), f"{row['proposed']:.1f}", f"{row['stood']:.2f}",
             f"{row['acceptance']:.2f}")
            for row in record["result"]["drafters"]
        ]  # fmt: skip
        heading = ("drafter", "passes", "proposed a pass", "stood a pass", "acceptance")
        parts.append(_table(heading, rows) + "\n" + _origin(record, "draft_runs"))
    return "\n".join(parts)


def quality_table(results: Path) -> str:
    """Return what `transfer` does to answers."""
    parts = []
    for _, record in records(results, "draft_quality"):
        rows = [(row["way"], row["score"], row["against target"], row["stood"]) for row in record["result"]["rows"]]
        heading = ("answered by", "score (95%)", "against the target alone (95%)", "stood")
        text = f"{record['result']['prompts']} prompts. {_origin(record, 'draft_quality')}"
        parts.append(_table(heading, rows) + "\n" + text)
    return "\n".join(parts)


TABLES: dict[str, Callable[[Path], str]] = {
    "passes": pass_table, "drafted tokens": step_table, "loops": loop_table, "acceptance": acceptance_table,
    "runs": runs_table, "quality": quality_table,
}  # fmt: skip


def _speed(results: Path, heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    origins = [_origin(record, "speculative_speed") for _, record in records(results, "speculative_speed")]
    return "\n".join([_table(heading, rows), *origins]) if rows else ""


def _table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heading, ["---"] * len(heading), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _origin(record: Record, script: str) -> str:
    options = record["result"].get("options", {})
    flags = [f"--{key} {shlex.quote(_short(options[key]))}" for key in _NAMED if key in options]
    flags += ["--quote"] * bool(options.get("quote"))
    command = " ".join([f"python benchmarks/{script}.py", *flags])
    return origin(record, command, record["benchmark"]) + "\n"


def _short(value: object) -> str:
    """Return an option's value, of a path the name alone."""
    return ",".join(Path(part).name for part in str(value).split(","))


if __name__ == "__main__":
    sys.exit(write_or_check(PAGE, TABLES))
