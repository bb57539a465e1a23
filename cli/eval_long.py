"""What `ragkit eval needle` and `ragkit eval ruler` share: their options, the models, the run, and what is shown."""

from __future__ import annotations

import functools
import inspect
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ragkit.cli.common import Session, flag
from ragkit.cli.long_tables import report_lines
from ragkit.cli.measuring import check_places, listed_values, run_measurement, write_results
from ragkit.cli.output import json_text
from ragkit.cli.query_options import TopKOption
from ragkit.config import PageSelectorName
from ragkit.errors import UsageError

if TYPE_CHECKING:
    from ragkit.bench.long_answers import LongContextAnswerer
    from ragkit.bench.long_items import LongTask
    from ragkit.bench.long_report import HeatCell, LongReport, Outcome
    from ragkit.config import PipelineConfig
    from ragkit.types import TextTokenizer

STRATEGIES = ("full", "rag", "pages")  # ragkit.bench.long_strategies, which imports torch, has the same
CPU_LENGTHS, GPU_LENGTHS = (1024, 2048, 4096), (4096, 8192, 16384, 32768)


@dataclass(frozen=True, slots=True)
class LongOptions:
    """The options that both commands have; their annotations are what Typer reads."""

    lengths: Annotated[
        str | None,
        typer.Option(
            "--lengths",
            metavar="N,N",
            help="Tokens of document, question and answer. [default: 1024 to 4096 on a CPU, 4096 to 32768 on a GPU]",
        ),
    ] = None
    strategies: Annotated[
        str, typer.Option("--strategies", metavar="NAME,NAME", help=f"What answers: {', '.join(STRATEGIES)}.")
    ] = "full,rag"
    selectors: Annotated[
        str | None,
        typer.Option(
            "--selectors",
            metavar="NAME,NAME",
            help="Page selectors that pages compares. [default: the configured one]",
        ),
    ] = None
    budgets: Annotated[
        str | None,
        typer.Option("--budgets", metavar="N,N", help="Tokens that they find. [default: pages.budget_tokens]"),
    ] = None
    own_prefill: Annotated[
        bool,
        typer.Option(
            "--own-prefill",
            help="Each of these reads the documents itself; else the configured selector, once for all.",
        ),
    ] = False
    k: TopKOption = None
    generator: Annotated[
        str | None, typer.Option("--generator", metavar="NAME", help="Language model: a name, folder or hub id.")
    ] = None
    data: Annotated[
        Path | None,
        typer.Option("--data", metavar="DIR", help="Folder of public texts; made ones without. [env: RAGKIT_DATA]"),
    ] = None
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Equal seeds give equal documents.")] = 0
    time_limit: Annotated[
        float | None,
        typer.Option(
            "--time-limit", min=0.0, metavar="S", help="Seconds after which no document is begun and results are shown."
        ),
    ] = None
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="Also write the raw numbers to this file, as JSON, as they come."),
    ] = None
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="DIR", help="Also draw the heat map into this folder, as SVG.")
    ] = None


def with_long_options(function: Callable[..., None]) -> Callable[..., None]:
    """Return `function(session, options, ...)` with the options of `LongOptions` for `options`, behind its own."""
    shared = inspect.signature(LongOptions, eval_str=True).parameters
    session, _, *own = inspect.signature(function, eval_str=True).parameters.values()

    @functools.wraps(function)
    def run(session: Session, **values: Any) -> None:
        function(session, LongOptions(**{name: values.pop(name) for name in shared}), **values)

    parameters = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in (*own, *shared.values())]
    run.__signature__ = inspect.Signature([session, *parameters])  # type: ignore[attr-defined]
    run.__annotations__ = {one.name: one.annotation for one in (session, *parameters)}
    return run


@dataclass(frozen=True, slots=True)
class LongJob:
    """What one of the commands asks: its name, tasks, rounds, questions a document, and what its heat map shows."""

    evaluation: str
    tasks: Sequence[LongTask]
    rounds: Sequence[Sequence[int]]
    questions: int
    rows: str
    cells: Callable[[Sequence[Outcome]], list[HeatCell]]
    settings: dict[str, Any]


@dataclass(frozen=True, slots=True)
class LongTools:
    """The loaded models: what answers, and what counts."""

    answerers: Sequence[LongContextAnswerer]
    tokenizer: TextTokenizer
    frame_tokens: int
    on_gpu: bool


def evaluate(session: Session, options: LongOptions, job: LongJob) -> None:
    """Run an evaluation and show what it found; ends the command with the code of a signal that stopped it.

    Raises:
        UsageError: an option is impossible, or nothing can be asked at any length.
    """
    from ragkit.bench.long_plots import check_heat_map_folder

    check_places(options.out, options.plot, check_heat_map_folder)
    lengths = listed_values("--lengths", options.lengths, _length, "whole numbers from 1 on")
    strategies = listed_values("--strategies", options.strategies, _strategy, f"some of {', '.join(STRATEGIES)}")
    variants = _variants(options, strategies)
    data = _data_folder(options.data)
    settings = session.settings(
        {"generation.model": flag(options.generator, "--generator"), "retrieval.k": flag(options.k, "-k")}
    )
    with session.output.waiting("loading models …"):
        tools = long_tools(settings.config, strategies, variants)
    lengths = tuple(sorted(lengths or (GPU_LENGTHS if tools.on_gpu else CPU_LENGTHS)))
    from ragkit.bench.long_context import LongContextEval, LongPlan
    from ragkit.bench.long_items import Material

    plan = LongPlan(
        job.tasks, lengths, job.rounds, math.inf if options.time_limit is None else options.time_limit
    )  # fmt: skip
    material = Material(
        tools.tokenizer, data, seed=options.seed, frame_tokens=tools.frame_tokens, questions=job.questions
    )  # fmt: skip
    facts = {
        **report_facts(settings.config, options.seed, public_texts=data is not None),
        "lengths": lengths,
        "strategies": strategies,
        **variants,
        **job.settings,
    }
    measured = LongContextEval(plan, material, tools.answerers, job.cells, facts, _keeper(options.out, job))
    exit_code = run_measurement(measured, session.output)
    report = measured.report()
    if not report.outcomes and not exit_code:
        raise UsageError("; ".join(report.notes) or "there is nothing to ask")
    _show(session, report, options, job, interrupted=bool(exit_code))
    if exit_code:
        raise typer.Exit(exit_code)


def long_tools(config: PipelineConfig, strategies: Sequence[str], variants: Mapping[str, Any]) -> LongTools:
    """Return the answerers of `strategies` over one loaded generator."""
    from ragkit.bench.long_answers import AnswererTools, PagesVariants, frame_tokens
    from ragkit.bench.long_strategies import make_answerers
    from ragkit.pipeline import Pipeline

    models = Pipeline(Path(), config)  # for its models alone: no store is opened
    embedder = models.embedder if "rag" in strategies else None
    tools = AnswererTools(models.engine, embedder, config, PagesVariants(**variants))
    on_gpu = models.engine.decoder.device.type == "cuda"
    return LongTools(make_answerers(strategies, tools), models.tokenizer, frame_tokens(tools), on_gpu)


def _keeper(out: Path | None, job: LongJob) -> Callable[[LongReport], None] | None:
    """Return what writes results that are not complete to `out`, where that is or will be a file."""
    if out is None or (out.exists() and not out.is_file()):
        return None
    return lambda report: write_results(out, json_text(report_json(report, job.evaluation, [], interrupted=True)))


def _show(session: Session, report: LongReport, options: LongOptions, job: LongJob, *, interrupted: bool) -> None:
    plots = []
    if options.plot is not None and report.cells:
        from ragkit.bench.long_plots import write_heat_map

        plots = [str(write_heat_map(report, job.evaluation, job.rows, options.plot))]
    data = report_json(report, job.evaluation, plots, interrupted=interrupted)
    if options.out is not None:
        write_results(options.out, json_text(data))
    session.output.result(data, report_lines(report, job.rows))
    for path in (*plots, *([str(options.out)] if options.out is not None else [])):
        session.output.note(f"wrote {path}")


def report_json(report: LongReport, evaluation: str, plots: list[str], *, interrupted: bool) -> dict[str, Any]:
    """Return the object that `--json` prints and `--out` writes."""
    from ragkit.bench.machine import machine_facts, versions

    return {
        "evaluation": evaluation,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **asdict(report),
        "interrupted": interrupted,
        "plots": plots,
        "machine": machine_facts(),
        "versions": versions(),
    }


def report_facts(config: PipelineConfig, seed: int, *, public_texts: bool) -> dict[str, Any]:
    """Return the settings that a report names: models, chunks, pages, and what documents are made of."""
    return {
        "generator": config.generation.model,
        "embedder": config.embedding.model,
        "chunker": config.chunking.chunker,
        "chunk_tokens": config.chunking.max_tokens,
        "k": config.retrieval.k,
        "pages": asdict(config.pages),
        "seed": seed,
        "texts": "public" if public_texts else "made",
    }


def _data_folder(data: Path | None) -> Path | None:
    folder = data or (Path(os.environ["RAGKIT_DATA"]) if os.environ.get("RAGKIT_DATA") else None)
    if folder is not None and not folder.is_dir():
        raise UsageError(f"the folder {folder} of public texts does not exist; give another with --data or RAGKIT_DATA")
    return folder


def _variants(options: LongOptions, strategies: Sequence[str]) -> dict[str, Any]:
    """Return what `ragkit.bench.long_answers.PagesVariants`, which imports torch, takes."""
    given = (options.selectors, options.budgets, options.own_prefill or None)
    if "pages" not in strategies and any(value is not None for value in given):
        raise UsageError("--selectors, --budgets and --own-prefill are for pages: add it to --strategies")
    names = f"some of {', '.join(PageSelectorName)}"
    return {
        "selectors": listed_values("--selectors", options.selectors, PageSelectorName, names),
        "budgets": listed_values("--budgets", options.budgets, _length, "whole numbers from 1 on"),
        "own_prefill": options.own_prefill,
    }


def _length(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value


def _strategy(text: str) -> str:
    if text not in STRATEGIES:
        raise ValueError(text)
    return text
