"""`ragkit search`: the chunks that a query would read."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ragkit.cli.common import Session, command, flag
from ragkit.cli.output import bold, one_line
from ragkit.cli.query import heading_of, place_of, require_text, timings_line
from ragkit.cli.query_options import FilterOption, TopKOption, parse_filters
from ragkit.config import SearchMode

if TYPE_CHECKING:
    from ragkit.reports import Hit, SearchResult

EXCERPT_CHARS = 240


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command("search")(command(search))


def search(
    session: Session,
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="What to look for.")],
    k: TopKOption = None,
    mode: Annotated[SearchMode | None, typer.Option("--mode", help="Which legs the search uses.")] = None,
    filter: FilterOption = None,
) -> None:
    """Find the chunks nearest to a question, best first."""
    require_text(question)
    chosen = parse_filters(filter)
    settings = session.settings({"retrieval.k": flag(k, "-k"), "retrieval.mode": flag(mode, "--mode")})
    output = session.output
    with session.open(settings) as pipeline, output.waiting("searching …"):
        result = pipeline.search(question, filter=chosen)
    output.result(result_json(result), _lines(result))
    if not output.json:
        for warning in result.warnings:
            output.note(f"warning: {one_line(warning)}")
        output.note(timings_line(dict(result.timings_ms)))


def result_json(result: SearchResult) -> dict[str, Any]:
    """Return the object that `--json` prints."""
    return {
        "hits": [_hit_json(hit) for hit in result.hits],
        "timings_ms": dict(result.timings_ms),
        "warnings": list(result.warnings),
    }


def _hit_json(hit: Hit) -> dict[str, Any]:
    return {
        "rank": hit.rank,
        "score": hit.score,
        "uri": hit.uri,
        "page": hit.page,
        "char_start": hit.char_start,
        "char_stop": hit.char_stop,
        "text": hit.text,
        "chunk_id": hit.chunk_id,
        "metadata": dict(hit.metadata),
    }


def _lines(result: SearchResult) -> Iterator[str]:
    if not result.hits:
        yield "nothing found"
    for hit in result.hits:
        place = f"{place_of(hit.uri, hit.page)} [{hit.char_start}:{hit.char_stop}]"
        yield f"{bold(f'{hit.rank:>2}.', sys.stdout)} {hit.score:.4f}  {place}{heading_of(hit.metadata)}"
        yield f"    {one_line(hit.text, EXCERPT_CHARS)}"
