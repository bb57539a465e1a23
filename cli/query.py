"""`ragkit query`: an answer with citations."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ragkit.cli.common import Session, command, flag
from ragkit.cli.output import Output, Waiting, bold, human_bytes, one_line, printable
from ragkit.cli.progress import progress_for
from ragkit.config import AUTO, Strategy
from ragkit.errors import UsageError
from ragkit.progress import Progress

if TYPE_CHECKING:
    from ragkit.types import Answer, Citation, Metadata

_SHOWN_SPANS = 3


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command("query")(command(query))


FilterOption = Annotated[
    list[str] | None,
    typer.Option(
        "--filter", metavar="K=V", help="Only documents whose metadata K is V (uri takes a glob). Repeatable."
    ),
]
TopKOption = Annotated[int | None, typer.Option("-k", min=1, metavar="N", help="Chunks to retrieve.")]


def query(
    session: Session,
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="The question.")],
    k: TopKOption = None,
    strategy: Annotated[Strategy | None, typer.Option("--strategy", help="How the prompt is prefilled.")] = None,
    ratio: Annotated[
        str | None,
        typer.Option(
            "--ratio", metavar="R", help="Part of the chunks' tokens that blend recomputes, from 0 to 1, or auto."
        ),
    ] = None,
    document: Annotated[
        str | None, typer.Option("--document", metavar="URI", help="Answer from this document only.")
    ] = None,
    system_prompt: Annotated[
        str | None, typer.Option("--system-prompt", metavar="TEXT", help="Instructions for the model.")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", min=1, metavar="N", help="Most tokens of the answer.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option("--temperature", metavar="T", help="0 takes the likeliest token each time.")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option("--top-p", metavar="P", help="Sample from the likeliest tokens of this mass.")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", metavar="N", help="Makes sampling repeatable.")] = None,
    filter: FilterOption = None,
    generator: Annotated[
        str | None, typer.Option("--generator", metavar="NAME", help="Language model: a name, folder or hub id.")
    ] = None,
) -> None:
    """Answer a question from the store, with citations."""
    require_text(question)
    chosen = parse_filters(filter)
    settings = session.settings(
        {
            "retrieval.k": flag(k, "-k"),
            "generation.strategy": flag(strategy, "--strategy"),
            "blend.ratio": flag(_ratio(ratio), "--ratio"),
            "generation.system_prompt": flag(system_prompt, "--system-prompt"),
            "generation.max_new_tokens": flag(max_new_tokens, "--max-new-tokens"),
            "generation.temperature": flag(temperature, "--temperature"),
            "generation.top_p": flag(top_p, "--top-p"),
            "generation.seed": flag(seed, "--seed"),
            "generation.model": flag(generator, "--generator"),
        }
    )
    output = session.output
    progress = progress_for(output)
    with session.open(settings) as pipeline:
        if output.json:
            answer = pipeline.query(question, filter=chosen, document=document, progress=progress)
            output.result(answer_json(answer), ())
            return
        with output.waiting("loading models, retrieving …") as waiting:
            shown = _InsteadOf(waiting, progress)
            stream = pipeline.stream(question, filter=chosen, document=document, progress=shown)
            for piece in stream:
                waiting.done()
                output.write(printable(piece))
        _show_rest(stream.answer, output)


def parse_filters(filters: Sequence[str] | None) -> dict[str, str] | None:
    """Return `K=V` options as a mapping; None where there are none.

    Raises:
        UsageError: an option has no `=` or no key, or a key comes twice.
    """
    parsed: dict[str, str] = {}
    for text in filters or ():
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise UsageError(f"--filter takes KEY=VALUE, got {text!r}")
        if key in parsed:
            raise UsageError(f"--filter {key} was given twice: {parsed[key]!r} and {value!r}; a document has one")
        parsed[key] = value
    return parsed or None


def _ratio(text: str | None) -> float | str | None:
    """Return `--ratio` as settings take it; its range is theirs to check."""
    if text is None or text == AUTO:
        return text
    try:
        return float(text)
    except ValueError as error:
        raise UsageError(f"--ratio takes a number from 0 to 1 or auto, got {text!r}") from error


def answer_json(answer: Answer) -> dict[str, Any]:
    """Return the object that `--json` prints. Nothing is drafted yet: those counts are 0."""
    tokens, timings = answer.tokens, dict(answer.timings_ms)
    decoding = timings.get("total", 0.0) - timings.get("first_token", 0.0)
    return {
        "answer": answer.text,
        "found": answer.found,
        "citations": [_citation_json(citation) for citation in answer.citations],
        "strategy": str(answer.strategy),
        "model": answer.model,
        "tokens": {
            "prompt": tokens.prompt,
            "reused": tokens.reused,
            "recomputed": tokens.recomputed,
            "generated": tokens.generated,
        },
        "dropped_chunks": list(answer.dropped_chunks),
        "warnings": list(answer.warnings),
        "kv": {
            "hits": answer.kv.hits,
            "misses": answer.kv.misses,
            "holes": answer.kv.holes,
            "bytes_by_tier": dict(answer.kv.bytes_by_tier),
            "recomputed": answer.kv.recomputed,
        },
        "draft": {
            "mode": "none",
            "drafted": 0,
            "accepted": 0,
            "ms_per_step": decoding / (tokens.generated - 1) if tokens.generated > 1 else None,
        },
        "timings_ms": timings,
        "attended": [asdict(span) for span in answer.attended],
    }


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
    if answer.strategy == Strategy.PAGES:
        output.note(_pages_line(answer))
    elif answer.kv.hits or answer.kv.misses or answer.kv.recomputed:
        output.note(_reuse_line(answer))


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


def _citation_json(citation: Citation) -> dict[str, Any]:
    return {
        "uri": citation.uri,
        "page": citation.page,
        "char_start": citation.char_start,
        "char_stop": citation.char_stop,
        "quote": citation.quote,
        "score": citation.score,
        "doc_id": citation.doc_id,
    }


def require_text(question: str) -> None:
    """Raise `UsageError` where a question has no characters."""
    if not question.strip():
        raise UsageError("the question is empty; give one in quotes")
