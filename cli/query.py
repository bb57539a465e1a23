"""`ragkit query`: an answer with citations."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ragkit.answers.json_form import answer_json
from ragkit.cli.common import Session, command
from ragkit.cli.output import Output, Waiting, bold, human_bytes, one_line, printable
from ragkit.cli.progress import progress_for
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
from ragkit.config import DraftMode, Strategy
from ragkit.errors import UsageError
from ragkit.progress import Progress

if TYPE_CHECKING:
    from ragkit.types import Answer, Citation, DraftUse, Metadata

_SHOWN_SPANS = 3


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command("query")(command(query))


def query(
    session: Session,
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="The question.")],
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
    """Answer a question from the store, with citations."""
    require_text(question)
    chosen = parse_filters(filter)
    settings = session.settings(
        answer_settings(k, strategy, ratio, system_prompt, max_new_tokens, temperature, top_p, seed, generator)
        | draft_settings(draft, exact)
    )
    check_draft_mode(exact, settings)
    check_ratio(ratio, settings)
    given = None if ratio is None else settings.config.blend.ratio  # an answer says where it had no part
    output = session.output
    progress = progress_for(output)
    with session.open(settings) as pipeline:
        if output.json:
            answer = pipeline.query(question, filter=chosen, document=document, ratio=given, progress=progress)
            output.result(answer_json(answer), ())
            return
        with output.waiting("loading models, retrieving …") as waiting:
            shown = _InsteadOf(waiting, progress)
            stream = pipeline.stream(question, filter=chosen, document=document, ratio=given, progress=shown)
            for piece in stream:
                waiting.done()
                output.write(printable(piece))
        _show_rest(stream.answer, output)


def place_of(uri: str, page: int | None) -> str:
    """Return where something stands, for people: `docs/a.pdf, page 3`, seen from the working folder."""
    here = f"{Path.cwd()}/"
    place = one_line(uri.removeprefix(here))
    return place if page is None else f"{place}, page {page}"


def heading_of(metadata: Metadata) -> str:
    """Return the headings above a chunk, for people: `  Guide > Install`, or nothing."""
    path = metadata.get("heading_path")
    return f"  {one_line(str(path))}" if path else ""


def timings_line(timings_ms: dict[str, float]) -> str:
    """Return the timings on one line: `retrieve 41 ms, total 310 ms`."""
    return ", ".join(f"{name.replace('_', ' ')} {value:,.0f} ms" for name, value in timings_ms.items())


def _show_rest(answer: Answer, output: Output) -> None:
    output.write("\n")
    if not answer.found:
        output.write("(not found: nothing in the store supports an answer)\n")
    if output.quiet:
        return
    for line in _citation_lines(answer.citations):
        output.write(line + "\n")
    for warning in answer.warnings:
        output.note(f"warning: {one_line(warning)}")
    tokens = answer.tokens
    output.note(
        f"{timings_line(dict(answer.timings_ms))}; {tokens.prompt:,} prompt and {tokens.generated:,} new tokens"
    )
    if answer.draft.steps:
        output.note(_draft_line(answer.draft))
    if answer.strategy == Strategy.PAGES:
        output.note(_pages_line(answer))
    elif answer.kv.hits or answer.kv.misses or answer.kv.recomputed:
        output.note(_reuse_line(answer))


def _draft_line(draft: DraftUse) -> str:
    passes = f"{draft.steps:,} passes of {draft.ms_per_step:,.1f} ms"
    if not draft.drafted:  # whatever the mode, the answer is the model's own
        return f"nothing was drafted by {draft.drafter} ({draft.mode}), as nothing seemed to pay; {passes}"
    changed = "" if draft.mode == DraftMode.EXACT else "; the answer is not the model's own, but moved to its drafter's"
    return (
        f"drafted by {draft.drafter} ({draft.mode}): {draft.accepted:,} of {draft.drafted:,} tokens stood, "
        f"{passes}{changed}"
    )


def _reuse_line(answer: Answer) -> str:
    tokens, kv = answer.tokens, answer.kv
    tiers = ", ".join(f"{human_bytes(count)} from {name}" for name, count in kv.bytes_by_tier.items())
    found = f"{kv.hits:,} found ({tiers})" if tiers else f"{kv.hits:,} found"
    sooner = f", {kv.recomputed:,} computed because that is sooner than loading" if kv.recomputed else ""
    prompt = f"{tokens.reused:,} prompt tokens reused, {tokens.recomputed:,} recomputed"
    return f"{prompt}; KV of chunks: {found}, {kv.misses:,} computed{sooner}"


def _pages_line(answer: Answer) -> str:
    tiers = ", ".join(f"{human_bytes(count)} from {name}" for name, count in answer.kv.bytes_by_tier.items())
    places = ", ".join(f"{span.char_start:,} to {span.char_stop:,}" for span in answer.attended[:_SHOWN_SPANS])
    found = f"; attended to most, beside the beginning and the end: characters {places}" if places else ""
    repaired = f", {answer.kv.misses:,} damaged windows computed again" if answer.kv.misses else ""
    return f"{answer.tokens.reused:,} tokens in pages ({tiers or 'decoded already'}{repaired}){found}"


class _InsteadOf:
    """A `Progress` that takes the place of what says that one has to wait."""

    def __init__(self, waiting: Waiting, progress: Progress) -> None:
        self._waiting = waiting
        self.advance = progress.advance
        self.close = progress.close
        self._progress = progress

    def start(self, total_documents: int, total_bytes: int, unit: str = "documents") -> None:
        """Say how much work there is."""
        self._waiting.done()
        self._progress.start(total_documents, total_bytes, unit)

    def message(self, text: str) -> None:
        """Show one line."""
        self._waiting.done()
        self._progress.message(text)


def _citation_lines(citations: Sequence[Citation]) -> Iterator[str]:
    if citations:
        yield ""
    for number, citation in enumerate(citations, start=1):
        place = place_of(citation.uri, citation.page)
        yield f'{bold(f"[{number}]", sys.stdout)} {place}: "{one_line(citation.quote)}"'


def require_text(question: str) -> None:
    """Raise `UsageError` where a question has no characters."""
    if not question.strip():
        raise UsageError("the question is empty; give one in quotes")
