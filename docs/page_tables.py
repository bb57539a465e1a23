"""Writes the tables of docs/pages.md from raw results, and the heat map beside it.

`python docs/page_tables.py` writes them; with `--check` it exits with 1 where the page is not what it would write. A
table whose raw file is not there is left out, so that no figure stands in the page that nobody measured. Raw files come
from `python benchmarks/pages_speed.py`, `python benchmarks/pages_second_question.py MODEL TEXT`, and

    ragkit eval needle --strategies full,rag,pages ... --out benchmarks/results/pages_needle.json
    ragkit eval ruler --strategies full,rag,pages ... --out benchmarks/results/pages_ruler.json

What was measured in several runs, some lengths each or reading and decoding apart, lies in files whose names go on:
pages_ruler_131072.json. They make one table.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from result_tables import DOCS, RESULTS, Record, machine_of, origin, records, write_or_check

PAGE, HEAT_MAP = DOCS / "pages.md", DOCS / "needle_heat_map.svg"

Row = Mapping[str, Any]
FIRST = ("pages low-rank", "full", "rag")  # strategies: what people get who set nothing, and what it stands beside


def decode_table(results: Path) -> str:
    """Return what a token costs over documents of several lengths, and what reading one does."""
    found = records(results, "pages_speed")
    if not found:
        return ""
    lines = [
        "| tokens | pages | tokens a choice | layers a choice | GB of pages | ms a token | times the shortest "
        "| attention, ms | selection, of the step |",
        "|---:|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for _, record in found:
        for row in record["result"]["decode"]:
            layers = record["result"].get("pages", {}).get("layer_interval", "1")
            lines.append(
                f"| {row['tokens']:,} | {row['codec']} | {row['interval']} | {layers} "
                f"| {row['gb']:.1f} | {row['step_ms']:.2f} | "
                f"{row['times_8k']:.2f} | {row['attention_ms']:.2f} | {row['selection_share']:.1%} |"
            )
    lines.append("")
    for name, record in found:
        command = " ".join(("python benchmarks/pages_speed.py", *record["result"].get("arguments", ())))
        lines += [*_sentences(_latest(record, found)), origin(record, command, name), ""]
    return "\n".join(lines[:-1]) + "\n"


def second_question_table(results: Path) -> str:
    """Return how soon a question about a stored document gets its first token."""
    record = _record(results / "pages_second_question.json")
    if record is None:
        return ""
    lines = ["| pages from | first token, ms | MB of pages read | tokens |", "|---|---:|---:|---:|"]
    for row in record["result"]["rows"]:
        lines.append(
            f"| {row['pages_from']} | {row['first_token_ms']:,.0f} | {row['read_mb']:,.0f} | {row['tokens']:,} |"
        )
    command = "python benchmarks/pages_second_question.py MODEL TEXT"
    lines += ["", origin(record, command, "pages_second_question")]
    return "\n".join(lines) + "\n"


def needle_table(results: Path) -> str:
    """Return the share of needles that are found at each length, and the heat map."""
    return _quality(results, "needle", ("![Needles by depth and length](needle_heat_map.svg)", ""))


def together_table(results: Path) -> str:
    """Return the share of needles that are found where those of all depths stand in one document."""
    return _quality(results, "together", ())


def ruler_table(results: Path) -> str:
    """Return the scores of RULER's tasks."""
    return _quality(results, "ruler", ())


TABLES: dict[str, Callable[[Path], str]] = {
    "decode": decode_table, "second question": second_question_table, "needle": needle_table,
    "needles together": together_table, "ruler": ruler_table,
}  # fmt: skip


def write_heat_map(results: Path = RESULTS, path: Path = HEAT_MAP) -> bool:
    """Draw the heat map of the needles beside the page; return whether there are any."""
    found = records(results, "pages_needle")
    if not found:
        return False
    from ragkit.bench.long_plots import heat_map_file, write_heat_map
    from ragkit.bench.long_report import HeatCell, LongReport

    model = _model(found[0][1])
    chosen = {(name, length): record for (of, name, _, length), (_, record) in _measured(found).items() if of == model}
    lengths = Counter(strategy for strategy, _ in chosen)
    several = {strategy for strategy, count in lengths.items() if count > 1} or lengths
    cells = [
        HeatCell(**cell)
        for (strategy, length), record in chosen.items()
        for cell in record["cells"]
        if (cell["strategy"], cell["length"]) == (strategy, length) and strategy in several
    ]
    cells.sort(key=lambda cell: _rank(cell.strategy))
    report = LongReport([], cells, [], [], found[0][1]["settings"], 0.0)
    assert path.name == heat_map_file("needle"), "drawn by the same code as `--plot` draws"
    write_heat_map(report, "needle", "depth", path.parent)
    return True


def main() -> int:
    """Write the page and the figure, or compare the page with what is there."""
    code = write_or_check(PAGE, TABLES)
    if "--check" not in sys.argv[1:]:
        write_heat_map()
    return code


def _quality(results: Path, name: str, before: Sequence[str]) -> str:
    raw = records(results, f"pages_{name}")
    if not raw:
        return ""
    models = list(dict.fromkeys(_model(record) for _, record in raw))
    found: dict[tuple[str, str, str], dict[int, Row]] = {}
    for (model, strategy, task, length), (row, _) in _measured(raw).items():
        found.setdefault((model, strategy, task), {})[length] = row
    most: Counter[str] = Counter()  # questions of a row, by task
    for (_, _, task), by_length in found.items():
        most[task] = max(most[task], *(row.get("questions", 0) for row in by_length.values()))
    lengths = sorted({length for by_length in found.values() for length in by_length})
    several = len(models) > 1
    heading = " | ".join(f"{length:,}" for length in lengths)
    lines = [*before, f"|{' model |' * several} strategy | task | {heading} |"]
    lines.append("|---" * several + "|---|---|" + "---:|" * len(lengths))
    for (model, strategy, task), by_length in sorted(
        found.items(), key=lambda entry: (models.index(entry[0][0]), _rank(entry[0][1]))
    ):
        cells = " | ".join(_score(by_length.get(length), most[task]) for length in lengths)
        lines.append(f"|{f' {model} |' * several} {strategy} | {task} | {cells} |")
    lines += ["", "Score in percent with its 95% interval; n where fewer questions were asked than elsewhere.", ""]
    lines += _origins(raw)
    return "\n".join(lines) + "\n"


def _measured(raw: Sequence[tuple[str, Record]]) -> dict[tuple[str, str, str, int], tuple[Row, Record]]:
    """Return the row of each model, strategy, task and length, of several that of most questions, with its record."""
    found: dict[tuple[str, str, str, int], tuple[Row, Record]] = {}
    for _, record in raw:
        for row in record["rows"]:
            place = (_model(record), row["strategy"], row["task"], row["length"])
            if place not in found or row.get("questions", 0) >= found[place][0].get("questions", 0):
                found[place] = row, record
    return found


def _origins(raw: Sequence[tuple[str, Row]]) -> Iterator[str]:
    """Yield a line for every model and machine: which lengths were measured, and where the raw numbers are."""
    lines: dict[str, list[tuple[Sequence[int], str]]] = {}
    for file, record in raw:
        measured = sorted({row["length"] for row in record["rows"]})
        ended = ", ended before its end" if record.get("interrupted") else ""
        said = f"{', '.join(f'{length:,}' for length in measured)} tokens (`{file}.json`{ended})"
        origin = f"{_model(record)}, {record['date'][:10]}, {machine_of(record)}"
        lines.setdefault(origin, []).append((measured, said))
    for origin, files in lines.items():
        yield f"- {origin}, raw numbers in `benchmarks/results`: {'; '.join(said for _, said in sorted(files))}."


def _rank(strategy: str) -> int:
    return FIRST.index(strategy) if strategy in FIRST else len(FIRST)


def _model(record: Mapping[str, Any]) -> str:
    return Path(str(record["settings"].get("generator", ""))).name.removesuffix(".gguf")


def _score(row: Row | None, most: int) -> str:
    if row is None:
        return ""
    fewer = f", n={row['questions']}" if row.get("questions", most) < most else ""
    return f"{row['score']:.0f} ({row['low']:.0f} to {row['high']:.0f}){fewer}"


def _latest(record: Row, found: Sequence[tuple[str, Row]]) -> Row:
    """Return the parts of a run's result that no later run measured again."""
    later = [other["result"] for _, other in found if other["date"] > record["date"]]
    return {name: part for name, part in record["result"].items() if not any(other.get(name) for other in later)}


def _sentences(result: Mapping[str, Any]) -> Iterator[str]:
    full, layer, reading = (result.get(name) for name in ("against_full", "one_layer", "prefill"))
    if full:
        yield (
            f"Against full attention over the same {full['tokens']:,} tokens in int8: attention "
            f"{full['attention_speed_up']:.1f} times faster, the whole step {full['step_speed_up']:.1f} times. Full "
            "attention is the faster of torch's SDPA over numbers and our kernel over codes, which turns keys while it "
            f"reads them ({full['attend_gb_per_s']:,.0f} GB/s{_of_copy(full)})."
        )
        yield ""
    if layer:
        yield "Attention of one layer at batch 1: " + "; ".join(map(_of_layer, layer)) + "."
        yield ""
    if reading:
        how = ", from windows at three places" if reading["is_extrapolated"] else ""
        yield (
            f"Reading {reading['tokens']:,} tokens takes {reading['seconds']:.0f} s{how}, with at most "
            f"{reading['peak_gb']:.0f} GB of GPU memory."
        )
        yield ""


def _of_layer(row: Row) -> str:
    share = f", {row['share_of_copy']:.0%} of a copy's rate" if "share_of_copy" in row else ""
    return f"{row['attend_us']:.1f} us over {row['rows']:,} rows of pages ({row['read_mb']:,.0f} MB{share})"


def _of_copy(full: Row) -> str:
    share = full.get("attend_share_of_copy")
    return "" if share is None else f", {share:.0%} of what a copy reaches in the same run"


def _record(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


if __name__ == "__main__":
    sys.exit(main())
