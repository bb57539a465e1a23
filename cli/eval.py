"""`ragkit eval`: how well parts of ragkit do what they are for, on questions with known answers; here `chunking`."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ragkit.bench.caps import DEFAULT_CAPS, CapUnit
from ragkit.cli import eval_needle, eval_ruler
from ragkit.cli.common import Session, command
from ragkit.cli.measuring import check_places, listed_values, run_measurement, write_results
from ragkit.cli.output import Output, bold, json_text, one_line, table
from ragkit.errors import UsageError

if TYPE_CHECKING:
    from ragkit.bench.chunking_quality import ChunkingReport, EvaluationTools
    from ragkit.bench.chunking_tables import ChromaRow, ComparisonRow, Difference
    from ragkit.bench.question_sets import QuestionSet
    from ragkit.config import PipelineConfig


def register(app: typer.Typer) -> None:
    """Add the group to `app`."""
    group = typer.Typer(
        help="Measure quality on questions with known answers.", no_args_is_help=True, rich_markup_mode=None
    )
    group.callback()(_group)
    group.command("chunking")(command(chunking))
    eval_needle.register(group)
    eval_ruler.register(group)
    app.add_typer(group, name="eval")


def _group() -> None:
    """Measure quality on questions with known answers."""


def chunking(
    session: Session,
    files: Annotated[
        list[Path] | None, typer.Argument(metavar="FILE", help="Your own documents; they need --questions.")
    ] = None,
    questions: Annotated[
        Path | None,
        typer.Option(
            "--questions",
            metavar="FILE",
            help='JSON lines with "question", "answer" (exact text) or "spans" ([[first, stop]]), and "document".',
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option("--data", metavar="DIR", help="Folder of the public question sets. [env: RAGKIT_DATA]"),
    ] = None,
    sets: Annotated[
        str | None,
        typer.Option("--sets", metavar="NAME,NAME", help="Which public sets. [default: those that the folder holds]"),
    ] = None,
    chunkers: Annotated[
        str | None,
        typer.Option("--chunkers", metavar="NAME,NAME", help="What is compared. [default: all that run in minutes]"),
    ] = None,
    caps: Annotated[
        str | None,
        typer.Option(
            "--caps", metavar="N,N", help="Most tokens of a chunk. [default: 64,128,256; 200,400,800 characters]"
        ),
    ] = None,
    unit: Annotated[CapUnit, typer.Option("--unit", help="What caps are counted in.")] = CapUnit.TOKENS,
    characters: Annotated[
        int | None,
        typer.Option("--characters", min=1, metavar="N", help="Characters a question retrieves. [default: the set's]"),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option("--limit", min=1, metavar="N", help="Only the first N questions and their documents."),
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option("--cache", metavar="DIR", help="Keep vectors and losses of texts here from run to run."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Also write the raw numbers to this file, as JSON.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE.svg", help="Draw what is found by characters retrieved.")
    ] = None,
) -> None:
    """Compare chunkers by what questions find at equal retrieved characters.

    Without FILE the public sets are taken. Ctrl-C stops and shows what is done.
    """
    from ragkit.bench.chunking_variants import DEFAULT_VARIANTS, check_variants
    from ragkit.figures import check_figure_path

    check_places(out, plot, check_figure_path)
    if cache is not None:
        _check_cache(cache)
    names = listed_values("--chunkers", chunkers, str, "names") or DEFAULT_VARIANTS
    check_variants(names)
    config = session.settings().config
    found = _own_set(files, questions, data, sets, config) if files or questions else _public_sets(data, sets)
    if characters is not None:
        found = [replace(one, characters=characters) for one in found]
    if limit is not None:
        found = [one.first(limit) for one in found]
    for one in found:
        _note_small(one, session.output)
    limits = listed_values("--caps", caps, _cap, "whole numbers from 1 on") or DEFAULT_CAPS[unit]
    with session.output.waiting("loading models …"):
        tools = _tools(config, cache, unit)
    from ragkit.bench.chunking_quality import ChunkingEvaluation

    evaluation = ChunkingEvaluation(found, names, limits, tools)
    exit_code = run_measurement(evaluation, session.output)
    report = evaluation.report()
    _show(report, _json(report, found, tools, unit, interrupted=bool(exit_code)), session.output, out, plot)
    if exit_code:
        raise typer.Exit(exit_code)


def _check_cache(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--cache: the folder {folder} cannot be made: {error.strerror}; name another") from error


def _own_set(
    files: list[Path] | None, questions: Path | None, data: Path | None, sets: str | None, config: PipelineConfig
) -> list[QuestionSet]:
    if not files or questions is None:
        raise UsageError("your own documents and --questions belong together: give FILE... and --questions FILE")
    if data is not None or sets is not None:
        raise UsageError("--data and --sets are for the public sets; leave them out, or FILE... and --questions")
    from ragkit.bench.own_questions import own_question_set
    from ragkit.readers import read_documents

    documents = [document for file in files for document in read_documents(file, config.ingest)]
    return [own_question_set(documents, questions)]


def _note_small(data: QuestionSet, output: Output) -> None:
    size = sum(len(document.text) for document in data.documents.values())
    if size <= data.characters:
        output.note(
            f"{one_line(data.name)}: a question retrieves {data.characters:,} characters, and the documents have "
            f"{size:,}: everything is found; compare with fewer --characters or more text"
        )


def _public_sets(data: Path | None, sets: str | None) -> list[QuestionSet]:
    from ragkit.bench.question_sets import PUBLIC_SETS, load_question_set

    folder = data or (Path(os.environ["RAGKIT_DATA"]) if os.environ.get("RAGKIT_DATA") else None)
    if folder is None:
        raise UsageError(
            "there is nothing to ask about: give FILE... with --questions, or the folder of the public sets with --data"
        )
    names = listed_values("--sets", sets, str, "names") or tuple(
        name for name in PUBLIC_SETS if (folder / name).is_dir()
    )
    if not names:
        raise UsageError(f"{folder} holds none of the question sets {', '.join(PUBLIC_SETS)}")
    return [load_question_set(name, folder) for name in names]


def _tools(config: PipelineConfig, cache: Path | None, unit: CapUnit) -> EvaluationTools:
    from ragkit.bench.cached_embedder import CachedEmbedder
    from ragkit.bench.chunking_quality import EvaluationTools
    from ragkit.chunking.characters import CharacterTokenizer
    from ragkit.pipeline import Pipeline
    from ragkit.retrieval.chunk_vectors import chunk_embedder

    pipeline = Pipeline(Path(), config)  # for its models alone: no store is opened
    late = chunk_embedder(pipeline.embedder, config.embedding) if config.embedding.late_chunking else None
    embedder = CachedEmbedder(pipeline.embedder, cache)
    tokenizer = CharacterTokenizer() if unit is CapUnit.CHARACTERS else pipeline.tokenizer
    return EvaluationTools(tokenizer, embedder, late, lambda: pipeline.engine, config.chunking, cache)


def _json(
    report: ChunkingReport, sets: list[QuestionSet], tools: EvaluationTools, unit: CapUnit, *, interrupted: bool
) -> dict[str, Any]:
    """Return the object that `--json` prints and `--out` writes."""
    from ragkit.bench.machine import machine_facts, versions

    return {
        "evaluation": "chunking",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "embedder": (tools.chunk_embedder or tools.embedder).embedder_id,
        "cap_unit": str(unit),
        "sets": [_set_json(one) for one in sets],
        **asdict(report),
        "interrupted": interrupted,
        "machine": machine_facts(),
        "versions": versions(),
    }


def _show(report: ChunkingReport, data: dict[str, Any], output: Output, out: Path | None, plot: Path | None) -> None:
    if out is not None:
        write_results(out, json_text(data))
    if plot is not None and report.rows:
        from ragkit.bench.chunking_plots import plot_frontier

        plot_frontier(report, plot)
    output.result(data, _lines(report))


def _set_json(data: QuestionSet) -> dict[str, Any]:
    return {
        "name": data.name,
        "documents": len(data.documents),
        "questions": len(data.questions),
        "characters": data.characters,
        "metric": str(data.metric),
    }


def _lines(report: ChunkingReport) -> Iterator[str]:
    if not report.rows:
        yield "nothing was measured"
    for name in dict.fromkeys(row.data for row in report.rows):
        rows = [row for row in report.rows if row.data == name]
        yield from _set_lines(rows)
    if report.chroma:
        yield from _chroma_lines(list(report.chroma))


def _set_lines(rows: list[ComparisonRow]) -> Iterator[str]:
    from ragkit.bench.chunking_rankings import Mode
    from ragkit.bench.chunking_variants import BASELINE

    first = rows[0]
    what = {"hit": "answers whole in one piece", "recall": "answers' characters"}[str(first.metric)]
    yield bold(f"{one_line(first.data)}: % of {what} within {first.characters:,} retrieved characters", sys.stdout)
    header = ["chunker", "cap", "chunks", "mean characters", *Mode, f"dense against {BASELINE} (95%)"]
    hit = str(first.metric) == "hit"
    header += ["dense, first chunk", "against"] if hit else []
    cells: list[list[object]] = []
    for row in rows:
        scores = [_percent(row.scores[mode]) for mode in Mode]
        against = _difference(row.against_baseline.get(Mode.DENSE))
        cells.append([row.chunker, row.cap, row.chunks, round(row.mean_characters), *scores, against])
        if hit:
            cells[-1].append(_percent(row.first_chunk[Mode.DENSE]))
            cells[-1].append(_difference(row.first_chunk_against_baseline.get(Mode.DENSE)))
    yield from table(header, cells)
    yield ""


def _chroma_lines(rows: list[ChromaRow]) -> Iterator[str]:
    yield bold("chunking_evaluation: Chroma's published rows, and the best of these runs (dense)", sys.stdout)
    header = ["row", "characters", "recall", "ours", "by", "IoU", "ours", "by"]
    cells = []
    for row in rows:
        recall = (_percent(row.their_recall), _percent(row.our_recall), row.by_recall)
        cells.append([row.name, row.characters, *recall, _percent(row.their_iou), _percent(row.our_iou), row.by_iou])
    yield from table(header, cells)
    yield ""


def _percent(value: float) -> str:
    return f"{value:.1f}"


def _difference(value: Difference | None) -> str:
    return "" if value is None else f"{value.mean:+.1f} [{value.low:+.1f}, {value.high:+.1f}]"


def _cap(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value
