"""`ragkit bench`: what ragkit does on this machine, with the user's own model and collection."""

from __future__ import annotations

import math
import os
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ragkit.bench.blend_report import COMPARABLE, BlendBenchOptions, Part, ScoredText
from ragkit.cli.bench_speculative import speculative
from ragkit.cli.common import Session, command, flag
from ragkit.cli.measuring import check_places, listed_values, run_measurement, write_results
from ragkit.cli.output import json_text
from ragkit.cli.query_options import TopKOption
from ragkit.config import SelectorName
from ragkit.errors import UsageError

if TYPE_CHECKING:
    from ragkit.bench.blend_benchmark import BlendBenchmark, Collection
    from ragkit.bench.blend_report import BlendReport
    from ragkit.cli.output import Output
    from ragkit.pipeline import Pipeline
    from ragkit.settings import Settings


def register(app: typer.Typer) -> None:
    """Add the group to `app`."""
    group = typer.Typer(help="Measure ragkit on this machine.", no_args_is_help=True, rich_markup_mode=None)
    group.callback()(_group)
    group.command("blend")(command(blend))
    group.command("speculative")(command(speculative))
    app.add_typer(group, name="bench")


def _group() -> None:
    """Measure ragkit on this machine."""


def blend(
    session: Session,
    only: Annotated[Part | None, typer.Option("--only", help="One part; without it, both.")] = None,
    lengths: Annotated[
        str | None,
        typer.Option(
            "--lengths",
            metavar="N,N",
            help="Tokens of the timed prompts. [default: 1024 to 4096 on a CPU, 4096 to 32768 on a GPU]",
        ),
    ] = None,
    ratios: Annotated[
        str | None,
        typer.Option(
            "--ratios",
            metavar="R,R",
            help="Parts of the chunks' tokens to recompute. [default: 0.05,0.15,0.3; for quality 0.02 to 0.3]",
        ),
    ] = None,
    selectors: Annotated[
        str | None,
        typer.Option(
            "--selectors", metavar="NAME,NAME", help="Whose quality is compared. [default: the configured one]"
        ),
    ] = None,
    prompts: Annotated[
        ScoredText | None,
        typer.Option("--prompts", help="What answers are compared over. [default: MuSiQue if RAGKIT_DATA has it]"),
    ] = None,
    questions: Annotated[
        Path | None,
        typer.Option(
            "--questions", metavar="FILE", help="Questions to the collection, one a line. [default: made from it]"
        ),
    ] = None,
    items: Annotated[
        int, typer.Option("--items", min=1, metavar="N", help="Most questions that answers are compared over.")
    ] = 20,
    k: TopKOption = None,
    rounds: Annotated[
        int | None,
        typer.Option("--rounds", min=1, metavar="N", help="How often each prefill is timed. [default: CPU 3, GPU 5]"),
    ] = None,
    time_limit: Annotated[
        float | None,
        typer.Option("--time-limit", min=0.0, metavar="S", help="Seconds after which what is there is shown."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Also write the raw numbers to this file, as JSON.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="DIR", help="Also draw the plots into this folder, as SVG.")
    ] = None,
    generator: Annotated[
        str | None, typer.Option("--generator", metavar="NAME", help="Language model: a name, folder or hub id.")
    ] = None,
) -> None:
    """Compare blended with full prefill: how soon the first token comes, and how near the answer is.

    Prompts are made of the store's chunks where there is one. Ctrl-C stops and shows what is done.
    """
    from ragkit.bench.blend_plots import check_plot_folder

    options = BlendBenchOptions(
        parts=tuple(Part) if only is None else (only,),
        lengths=listed_values("--lengths", lengths, int, "whole numbers"),
        ratios=listed_values("--ratios", ratios, float, "numbers"),
        selectors=listed_values("--selectors", selectors, SelectorName, f"some of {', '.join(COMPARABLE)}"),
        rounds=rounds or 0,
        items=items,
        questions=_questions(questions),
        musique=_musique(prompts, questions),
        time_limit_s=math.inf if time_limit is None else time_limit,
    )
    check_places(out, plot, check_plot_folder)
    settings = session.settings(
        {"retrieval.k": flag(k, "-k"), "generation.model": flag(generator, "--generator")},
    )
    with session.open(settings, create=True) as pipeline:
        with session.output.waiting("loading models …"):
            benchmark = _benchmark(settings, pipeline, options, needs_store=bool(questions) or prompts is not None)
        exit_code = run_measurement(benchmark, session.output)
        report = benchmark.report()
    _show(report, session.output, out, plot, exit_code)
    if exit_code:
        raise typer.Exit(exit_code)


def report_json(report: BlendReport, *, interrupted: bool, plots: list[str]) -> dict[str, Any]:
    """Return the object that `--json` prints and `--out` writes."""
    from ragkit.bench.machine import machine_facts, versions

    return {
        "benchmark": "blend",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **asdict(report),
        "interrupted": interrupted,
        "plots": plots,
        "machine": machine_facts(),
        "versions": versions(),
    }


def _benchmark(
    settings: Settings, pipeline: Pipeline, options: BlendBenchOptions, *, needs_store: bool
) -> BlendBenchmark:
    collection = _collection(settings, pipeline, options, needs_store=needs_store and options.musique is None)
    from ragkit.bench.blend_benchmark import BlendBenchmark
    from ragkit.generation.engine import Engine

    config = settings.config
    # The benchmark has pools of its own.
    engine = Engine.load(config.generation.model, config.device, config.generation.dtype, config.offline, kv_tokens=1)
    return BlendBenchmark(engine, config, options, collection)


def _collection(
    settings: Settings, pipeline: Pipeline, options: BlendBenchOptions, *, needs_store: bool
) -> Collection | None:
    """Return what the store gives, or None where there is none and none was asked for."""
    is_named = any(setting.key == "store" and setting.origin != "default" for setting in settings.values)
    if not pipeline.parts.has_store() and not needs_store and not is_named:
        return None
    store = pipeline.store  # an error that says what to do where there is none
    from ragkit.bench.blend_benchmark import Collection

    if Part.QUALITY in options.parts and options.musique is None:
        retriever = pipeline.retriever  # now: another embedder's store should not cost minutes first
        return Collection(store, lambda question: [one.stored.chunk for one in retriever.retrieve(question).chunks])
    return Collection(store, lambda question: [])


def _show(report: BlendReport, output: Output, out: Path | None, plot: Path | None, exit_code: int) -> None:
    from ragkit.cli.bench_tables import report_lines

    plots = []
    if plot is not None:
        from ragkit.bench.blend_plots import write_plots

        plots = [str(path) for path in write_plots(report, plot)]
    data = report_json(report, interrupted=bool(exit_code), plots=plots)
    if out is not None:
        write_results(out, json_text(data))
    output.result(data, report_lines(report, data["machine"]))
    for path in (*plots, *([str(out)] if out is not None else [])):
        output.note(f"wrote {path}")


def _questions(file: Path | None) -> tuple[str, ...]:
    if file is None:
        return ()
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--questions: {file} cannot be read as UTF-8 text: {error}") from error
    found = tuple(line.strip() for line in lines if line.strip())
    if not found:
        raise UsageError(f"--questions: {file} holds no question; write one a line")
    return found


def _musique(prompts: ScoredText | None, questions: Path | None) -> Path | None:
    """Return MuSiQue's folder where it is to be used."""
    if questions is not None or prompts is ScoredText.COLLECTION:
        if prompts is ScoredText.MUSIQUE:
            raise UsageError("--questions are asked of the collection: leave out --prompts musique")
        return None
    root = os.environ.get("RAGKIT_DATA")
    folder = Path(root) / "musique" if root else None
    if folder is not None and (folder / "musique_s.json").is_file():
        return folder
    if prompts is ScoredText.MUSIQUE:
        raise UsageError("--prompts musique needs RAGKIT_DATA: the folder that holds musique/musique_s.json")
    return None
