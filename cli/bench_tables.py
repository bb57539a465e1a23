"""What `ragkit bench` prints for people: tables by rich, and plots of a few bars."""

from __future__ import annotations

import io
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from ragkit.bench.blend_plots import prefill_name, selector_name, speed_name
from ragkit.cli.output import bold, human_bytes, is_terminal, one_line
from ragkit.cli.text_plot import Bar, bars
from ragkit.config import AUTO

if TYPE_CHECKING:
    from ragkit.bench.blend_report import BlendReport
    from ragkit.bench.blend_speed import SpeedRow
    from ragkit.bench.recovery import Recovery, Share

_WIDTH = 100  # where nobody's terminal says otherwise
_LEAST_WIDTH, _INDENT = 60, 2
_TEXTS = {"collection": "the collection's chunks", "random": "random tokens", "musique": "MuSiQue's passages"}

_PLACES = {"memory": "memory", "gpu": "GPU", "computed": "computed"}

Cells = Sequence[str]


def report_lines(report: BlendReport, machine: Mapping[str, Any]) -> Iterator[str]:
    """Yield tables and plots of what was measured."""
    width = shutil.get_terminal_size((_WIDTH, 24)).columns if is_terminal(sys.stdout) else _WIDTH
    yield from _head(report, machine)
    if report.speed:
        yield from _speed(report, width)
    if report.quality:
        yield from _quality(report, width)
    if not report.speed and not report.quality:
        yield "nothing was measured"
    yield from _in_short(report, width)
    if report.notes:
        yield ""
        yield from (line for note in report.notes for line in wrap(f"note: {one_line(note)}", width))


def _head(report: BlendReport, machine: Mapping[str, Any]) -> Iterator[str]:
    model, settings = report.model, report.settings
    place = machine["gpus"][0] if model["device"].startswith("cuda") and machine["gpus"] else machine["cpu"]
    yield f"{one_line(model['name'])}, {model['dtype']}, on {model['device']} ({place}, {machine['cores']} cores)"
    yield (
        f"chunk KV in {settings['codec']}, computed behind the {settings['context']}"
        if settings["context"] == "prefix"
        else f"chunk KV in {settings['codec']}, computed in isolation"
    ) + f"; {human_bytes(model['kv_bytes_per_token'])} a token in the model's type; selector {settings['selector']}"


def _in_short(report: BlendReport, width: int) -> Iterator[str]:
    """Yield what the configured ratio gives, at the longest prompts; nothing where each request finds its own."""
    ratio = report.settings["ratio"]
    if ratio == AUTO:
        return
    warm = [row for row in report.speed if row.ratio == ratio and row.kv_from == "memory"]
    near = [row for row in report.quality if row.variant == f"{report.settings['selector']} @ {ratio:g}"]
    parts = []
    if warm:
        last = max(warm, key=lambda row: row.tokens)
        speed = (
            f"{last.times_full:.1f} times sooner" if last.times_full >= 1 else f"{1 / last.times_full:.1f} times later"
        )
        parts.append(f"the first logits come {speed} than full prefill's at {last.tokens:,} tokens, from memory")
    if near and near[0].recovered_first is not None:
        parts.append(f"{100 * near[0].recovered_first.value:.0f}% of the first token's KL is recovered")
    if parts:
        yield ""
        yield from wrap(f"In short: at the configured ratio of {100 * ratio:g}% {', and '.join(parts)}.", width)


def _speed(report: BlendReport, width: int) -> Iterator[str]:
    rows = report.speed
    counts = sorted({len(row.samples_ms) for row in rows})
    rounds = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else f"{counts[0]}"
    texts = " and ".join(dict.fromkeys(_TEXTS[row.text] for row in rows))
    timed = f"medians of {rounds} rounds in turns" if counts != [1] else "one round"
    yield ""
    yield bold("How soon the first logits come", sys.stdout)
    yield from wrap(f"ms from the chunks' ids to the first logits, {timed}; prompts of {texts}", width)
    optional = [("compute_ms", "compute\nKV"), ("overlapped_ms", "overlapped")]
    shown = [(key, name) for key, name in optional if any(getattr(row, key) for row in rows)]
    steps = [("load_ms", "load"), ("select_ms", "select"), ("recompute_ms", "recompute"), *shown]
    header = ["tokens", "prefill", "KV from", "first\nlogits", *(name for _, name in steps), "times\nsooner"]
    cells = [
        [f"{row.tokens:,}", prefill_name(row), _PLACES.get(str(row.kv_from), "-"), _ms(row.first_logits_ms)]
        + [_ms(getattr(row, key)) for key, _ in steps]
        + [f"{row.times_full:.2f}"]
        for row in rows
    ]
    starts = [i for i in range(1, len(rows)) if rows[i].tokens != rows[i - 1].tokens]
    yield from _table(header, cells, width, left=(1, 2), sections=starts)
    if report.check is not None:
        yield ""
        yield from wrap(
            f"Check: recomputing every token gives full prefill's logits within {report.check.gap:.2g} of their norm; "
            f"full prefill in two pieces, which sums in another order, within {report.check.noise:.2g}.",
            width,
        )
    yield ""
    yield "First logits, ms, by tokens of the prompt"
    yield from bars([_speed_bar(row) for row in rows], width)


def _speed_bar(row: SpeedRow) -> Bar:
    return Bar(f"{row.tokens:,}", speed_name(row), row.first_logits_ms, _ms(row.first_logits_ms))


def _quality(report: BlendReport, width: int) -> Iterator[str]:
    rows = report.quality
    yield ""
    yield bold("How near the answer is to full prefill's", sys.stdout)
    prompts = f"{rows[0].prompts} prompt{'s' if rows[0].prompts > 1 else ''} of {report.quality_tokens:,.0f} tokens"
    has_gold = any(row.nll is not None for row in rows)
    yield from wrap(
        f"{prompts}, of {_TEXTS[str(report.quality_from)]}. KL in nats from full prefill's distribution, of the first "
        "token and as the mean over full prefill's first 16; recovered: how much of plain reuse's KL is gone, with "
        "the 95% interval; first agrees: both have the same likeliest first token"
        + (
            "; gold NLL: nats a token of the right answer, and how far they are from full prefill's either way."
            if has_gold
            else "."
        ),
        width,
    )
    starts = [i for i in range(1, len(rows)) if selector_name(rows[i]) != selector_name(rows[i - 1])]
    header = ["selector", "recom-\nputed %", "KL of\nfirst", "recovered %", "KL of\n16", "recovered %"]
    header += ["first\nagrees %", *(["gold\nNLL", "NLL\nmoved"] if has_gold else [])]
    yield from _table(header, [_quality_cells(row, has_gold) for row in rows], width, left=(0,), sections=starts)
    plotted = [row for row in rows[1:] if row.recovered_first is not None]
    if plotted:
        yield ""
        yield "Recovered % of the first token's KL, by chunk tokens recomputed"
        yield from bars([_quality_bar(row) for row in plotted], width, largest=1.0)


def _quality_cells(row: Recovery, has_gold: bool) -> list[str]:
    cells = [selector_name(row), f"{100 * row.recomputed:.1f}", f"{row.kl_first:.3f}", _percent(row.recovered_first)]
    cells += [f"{row.kl_mean:.3f}", _percent(row.recovered_mean), f"{100 * row.agrees_first:.0f}"]
    return cells + ([_nats(row.nll), _nats(row.nll_moved)] if has_gold else [])


def _quality_bar(row: Recovery) -> Bar:
    share = row.recovered_first
    value = 0.0 if share is None else share.value
    return Bar(selector_name(row), f"{100 * row.recomputed:.0f}%", value, _percent(share))


def _table(
    header: Cells, rows: Sequence[Cells], width: int, *, left: Sequence[int], sections: Sequence[int]
) -> Iterator[str]:
    """Yield a table's lines: columns of `left` flush left, the others right, a rule before the rows of `sections`."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    for number, name in enumerate(header):
        table.add_column(name, justify="left" if number in left else "right", no_wrap=True, vertical="bottom")
    for number, cells in enumerate(rows):
        if number in sections:
            table.add_section()
        table.add_row(*cells)
    written = io.StringIO()
    Console(
        file=written, width=max(_LEAST_WIDTH, width - _INDENT), color_system=None, markup=False, highlight=False
    ).print(table)
    yield ""
    for line in written.getvalue().splitlines():
        yield f"{' ' * _INDENT}{line}".rstrip()


def _ms(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 100 or value == 0 else f"{value:.1f}"


def _nats(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _percent(share: Share | None) -> str:
    return "-" if share is None else f"{100 * share.value:.0f} [{100 * share.low:.0f}, {100 * share.high:.0f}]"
