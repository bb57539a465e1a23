"""`ragkit batch`: a file of questions to a file of answers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ragkit.cli.common import Session, command
from ragkit.cli.engine import EngineOption, RayAddressOption, engine_flags
from ragkit.cli.errors import ExitCode
from ragkit.cli.output import Output, human_bytes, one_line
from ragkit.cli.progress import clock_text, progress_for
from ragkit.cli.query_options import (
    DocumentOption,
    DraftOption,
    ExactOption,
    FilterOption,
    GeneratorOption,
    MaxNewTokensOption,
    RatioOption,
    SeedOption,
    StrategyOption,
    SystemPromptOption,
    TemperatureOption,
    TopKOption,
    TopPOption,
    answer_settings,
    check_draft_mode,
    check_ratio,
    draft_settings,
    parse_filters,
)
from ragkit.cli.signals import finishing_first

if TYPE_CHECKING:
    from ragkit.jobs.batch import BatchJob
    from ragkit.jobs.batch_estimate import BatchEstimate
    from ragkit.jobs.batch_report import BatchReport
    from ragkit.parts import Parts

_SHOWN_FAILURES = 10
GO_ON = "stopped; answers that are counted are kept, and the same command goes on with the rest"


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command("batch")(command(batch))


def batch(
    session: Session,
    questions: Annotated[
        str,
        typer.Argument(
            metavar="QUESTIONS",
            help="JSON Lines (- for stdin), CSV or Parquet, a question a row; or an OpenAI batch file. A path or URL.",
        ),
    ],
    out: Annotated[
        str, typer.Option("--out", metavar="FILE", help="Where the answers go: .jsonl or .parquet; a path or URL.")
    ],
    limit: Annotated[int | None, typer.Option("--limit", min=1, metavar="N", help="Only the first N rows.")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace answers that are there, or a job begun with other settings.")
    ] = False,
    engine: EngineOption = None,
    ray_address: RayAddressOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what it would take, measured on a few rows, and write nothing.")
    ] = False,
    k: TopKOption = None,
    strategy: StrategyOption = None,
    ratio: RatioOption = None,
    document: DocumentOption = None,
    draft: DraftOption = None,
    exact: ExactOption = None,
    system_prompt: SystemPromptOption = None,
    max_new_tokens: MaxNewTokensOption = None,
    temperature: TemperatureOption = None,
    top_p: TopPOption = None,
    seed: SeedOption = None,
    filter: FilterOption = None,
    generator: GeneratorOption = None,
) -> None:
    """Answer a file of questions. Started again, it goes on with the rows that are not done."""
    chosen = parse_filters(filter)
    settings = session.settings(
        answer_settings(k, strategy, ratio, system_prompt, max_new_tokens, temperature, top_p, seed, generator)
        | draft_settings(draft, exact)
        | engine_flags(engine, ray_address)
    )
    check_draft_mode(exact, settings)
    check_ratio(ratio, settings)
    from ragkit.jobs.batch import BatchJob

    given = None if ratio is None else settings.config.blend.ratio  # an answer says where it had no part
    job = BatchJob(questions, out, limit, overwrite, chosen, document, given)
    with session.open(settings) as pipeline:
        if dry_run:
            _estimate(session.output, pipeline.parts, job)
        else:
            _run(session.output, pipeline.parts, job)


def _run(output: Output, parts: Parts, job: BatchJob) -> None:
    from ragkit.jobs.batch import run_batch

    progress = progress_for(output)

    def on_stop() -> None:
        progress.message("stopping after the next answer; once more stops at once")

    with finishing_first(on_stop) as request:
        try:
            report = run_batch(parts, job, progress=progress, stop=request.event)
        finally:
            progress.close()
    output.result(report_json(report), report_lines(report, output))
    if request.exit_code and report.interrupted:
        output.note(GO_ON)
        raise typer.Exit(request.exit_code)
    if report.failed:
        raise typer.Exit(ExitCode.PARTLY_DONE)


def _estimate(output: Output, parts: Parts, job: BatchJob) -> None:
    from ragkit.jobs.batch_estimate import estimate_batch

    with output.waiting("loading models, measuring …"):
        estimate = estimate_batch(parts, job)
    output.result({**asdict(estimate), "dry_run": True}, estimate_lines(estimate, output))


def report_json(report: BatchReport) -> dict[str, Any]:
    """Return the object that `--json` prints."""
    return {**asdict(report), "dry_run": False}


def report_lines(report: BatchReport, output: Output) -> Iterator[str]:
    """Yield what people read: the counts, then one line for each of the first failures."""
    done = report.answered + report.failed
    counts = f"{report.answered:,} answered"
    counts += f" ({report.not_found:,} not found)" if report.not_found else ""
    counts += f", {report.failed:,} failed" if report.failed else ""
    of = f" of {report.rows:,} rows" if done < report.rows else ""
    earlier = f", {report.resumed:,} of them by an earlier run" if report.resumed else ""
    yield f"{counts}{of}{earlier}; {report.tokens['generated']:,} tokens"
    if done == report.rows:
        yield f"written to {one_line(report.out)}"
    for failure in report.failures[:_SHOWN_FAILURES]:
        yield f"failed ({failure.code}): {one_line(str(failure.id))}: {one_line(failure.message)}"
    if report.failed > _SHOWN_FAILURES:
        yield f"and {report.failed - _SHOWN_FAILURES:,} more; each row says why"
    for warning in report.warnings:
        output.note(f"warning: {one_line(warning)}")
    hits, misses = report.kv["hits"], report.kv["misses"]
    found = f", {hits / (hits + misses):.0%} of chunk KV found" if hits or misses else ""
    speed = f"{report.rows_per_second:,.2f} rows/s, {report.tokens_per_second:,.1f} tokens/s"
    output.note(f"{clock_text(report.seconds)} with loading, {speed}{found}")


def estimate_lines(estimate: BatchEstimate, output: Output) -> Iterator[str]:
    """Yield what people read of a dry run."""
    bad = f", {estimate.bad_rows:,} of which cannot be asked" if estimate.bad_rows else ""
    yield f"{estimate.rows:,} rows{bad}"
    yield f"about {estimate.prompt_tokens:,} prompt tokens, at most {estimate.answer_tokens:,} new ones"
    yield f"at most about {clock_text(estimate.seconds)} (h:m:s or m:s), loading models apart"
    yield f"KV: {human_bytes(estimate.row_kv_bytes)} a running row" + (
        f", {human_bytes(estimate.stored_kv_bytes)} of chunks kept" if estimate.stored_kv_bytes else ""
    )
    if estimate.paged_rows:
        yield f"{estimate.paged_rows:,} of {estimate.sampled_rows:,} sampled rows read a document whole: not counted"
    for warning in estimate.warnings:
        output.note(f"warning: {one_line(warning)}")
    output.note(
        f"measured on {estimate.sampled_rows:,} rows: retrieval {estimate.retrieve_ms:,.0f} ms a row, prefill "
        f"{estimate.prefill_tokens_per_second:,.0f} and decoding {estimate.decode_tokens_per_second:,.0f} tokens/s"
    )
