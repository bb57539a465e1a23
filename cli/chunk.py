"""`ragkit chunk`: how one file would be cut, and why there. Needs no store."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ragkit.cli.common import CHUNKER_NAMES, Session, command, flag
from ragkit.cli.output import bold, dim, one_line
from ragkit.cli.query import heading_of, place_of
from ragkit.errors import UsageError

if TYPE_CHECKING:
    from ragkit.chunking.base import Chunker
    from ragkit.chunking.signals import BoundaryKind, BoundarySignals
    from ragkit.config import PipelineConfig
    from ragkit.pipeline import Pipeline
    from ragkit.types import Chunk, Document

EXCERPT_CHARS = 160
_TAIL_CHARS = 60  # of an excerpt: what stands before the next boundary


@dataclass(frozen=True, slots=True)
class _Cut:
    """One document in chunks; `kinds` are those of the boundaries between them, `signals` what they were chosen by."""

    document: Document
    chunks: Sequence[Chunk]
    kinds: Sequence[BoundaryKind]
    signals: BoundarySignals | None

    def signal_before(self, index: int) -> float | None:
        """Return the signal at the boundary between the chunks `index - 1` and `index`, where there is one."""
        return self.signals.value_at(self.chunks[index - 1].char_stop) if self.signals else None


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command("chunk")(command(chunk))


def chunk(
    session: Session,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The file, or - for stdin.")],
    chunker: Annotated[
        str | None, typer.Option("--chunker", metavar="NAME", help=f"How it is cut: {CHUNKER_NAMES}.")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", min=1, metavar="N", help="Most tokens of a chunk.")
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", metavar="FILE.svg", help="Draw what the chunker went by along the text, with its cuts."),
    ] = None,
) -> None:
    """Show how a file would be cut and by which signal, without storing anything."""
    settings = session.settings(
        {"chunking.chunker": flag(chunker, "--chunker"), "chunking.max_tokens": flag(max_tokens, "--max-tokens")}
    )
    if plot is not None:
        from ragkit.figures import check_figure_path

        check_figure_path(plot)
    documents = _documents(file, settings.config, plot)
    with session.output.waiting("loading models …"):
        made = _chunker(settings.config, plot)
    with session.output.waiting("cutting …"):
        cuts = [_cut(document, made) for document in documents]
    if plot is not None:
        from ragkit.chunking.signal_plot import plot_signals

        for cut in cuts:
            if cut.signals:
                plot_signals(cut.signals, cut.chunks, plot, f"{Path(cut.document.uri).name}, {made.name}")
    counts = [item.token_count for cut in cuts for item in cut.chunks]
    figures = _statistics(counts, settings.config.chunking.max_tokens)
    data = {
        "chunker": made.name,
        "chunks": [chunk for cut in cuts for chunk in _chunks_json(cut)],
        "statistics": figures,
        "signals": [_signals_json(cut.document, cut.signals) for cut in cuts if cut.signals],
    }
    session.output.result(data, _lines(cuts, figures))


def _chunker(config: PipelineConfig, plot: Path | None) -> Chunker:
    from ragkit.chunking.registry import MODEL_CHUNKERS, create_chunker
    from ragkit.chunking.signals import SignalChunker
    from ragkit.models import resolve
    from ragkit.models.tokenizer import ModelTokenizer

    tokenizer = ModelTokenizer(resolve(config.generation.model, offline=config.offline))
    models = _models(config) if config.chunking.chunker in MODEL_CHUNKERS else None
    chunker = create_chunker(config.chunking, tokenizer, models)
    if plot is not None and not isinstance(chunker, SignalChunker):
        raise UsageError(
            f"the chunker {chunker.name!r} goes by no signal that could be plotted, it packs text up to the cap; "
            "take one that scores boundaries, such as semantic, perplexity or structural"
        )
    return chunker


def _models(config: PipelineConfig) -> Pipeline:
    """Return a pipeline for its models alone: no store is opened."""
    from ragkit.pipeline import Pipeline

    return Pipeline(Path(), config)


def _documents(file: Path, config: PipelineConfig, plot: Path | None) -> Sequence[Document]:
    from ragkit.readers import read_documents

    documents = read_documents(file, config.ingest)
    if plot is not None and len(documents) != 1:
        raise UsageError(f"--plot draws one document, and {file} holds {len(documents):,}; give a file with one")
    return documents


def _cut(document: Document, chunker: Chunker) -> _Cut:
    from ragkit.chunking.metadata import with_metadata
    from ragkit.chunking.signals import SignalChunker, boundary_kinds

    signals = None
    if isinstance(chunker, SignalChunker):
        plain, signals = chunker.chunk_with_signals(document)
    else:
        plain = chunker.chunk(document)
    chunks = with_metadata(document, plain)
    return _Cut(document, chunks, boundary_kinds(document.text, [item.char_stop for item in chunks[:-1]]), signals)


def _statistics(counts: Sequence[int], cap: int) -> dict[str, Any]:
    spread = {"min": min(counts), "median": statistics.median(counts), "max": max(counts)} if counts else None
    return {"chunks": len(counts), "tokens": spread, "cap": cap, "over_cap": sum(count > cap for count in counts)}


def _chunks_json(cut: _Cut) -> Iterator[dict[str, Any]]:
    for place, item in enumerate(cut.chunks):
        yield {
            "index": item.index,
            "char_start": item.char_start,
            "char_stop": item.char_stop,
            "token_count": item.token_count,
            "text": item.text,
            "page": item.page,
            "uri": cut.document.uri,
            "chunk_id": item.chunk_id,
            "metadata": dict(item.metadata),
            "boundary": {"kind": str(cut.kinds[place - 1]), "signal": cut.signal_before(place)} if place else None,
        }


def _signals_json(document: Document, signals: BoundarySignals) -> dict[str, Any]:
    return {
        "uri": document.uri,
        "measure": signals.measure,
        "threshold": signals.threshold,
        "offsets": signals.offsets.tolist(),
        "values": signals.values.tolist(),
        "cut": signals.cut.tolist(),
    }


def _lines(cuts: Sequence[_Cut], figures: dict[str, Any]) -> Iterator[str]:
    for cut in cuts:
        for place, item in enumerate(cut.chunks):
            if place:
                signal = cut.signal_before(place)
                shown = "" if signal is None or cut.signals is None else f", {cut.signals.name} {signal:.3f}"
                yield dim(f"     ── {cut.kinds[place - 1]}{shown}", sys.stdout)
            head = bold(f"{item.index:>4}", sys.stdout)
            where = f"{place_of(cut.document.uri, item.page)} [{item.char_start}:{item.char_stop}]"
            yield f"{head} {where} {item.token_count:,} tokens{heading_of(item.metadata)}"
            yield f"     {_excerpt(item.text)}"
        if cut.signals and len(cut.signals.cut):
            yield dim(_signal_line(cut.signals), sys.stdout)
    tokens = figures["tokens"]
    spread = (
        f", tokens {tokens['min']:,} / {tokens['median']:,g} / {tokens['max']:,} (min / median / max)" if tokens else ""
    )
    chunks = "1 chunk" if figures["chunks"] == 1 else f"{figures['chunks']:,} chunks"
    yield f"{chunks}{spread}, over the cap of {figures['cap']:,}: {figures['over_cap']}"


def _excerpt(text: str) -> str:
    """Return the beginning of a chunk and, where that is not all of it, its end."""
    line = one_line(text)
    if len(line) <= EXCERPT_CHARS:
        return line
    return f"{line[: EXCERPT_CHARS - _TAIL_CHARS].rstrip()} … {line[-_TAIL_CHARS:].lstrip()}"


def _signal_line(signals: BoundarySignals) -> str:
    threshold = "" if signals.threshold is None else f", threshold {signals.threshold:.3f}"
    return f"signal: {signals.measure}{threshold}; {int(signals.cut.sum()):,} of {len(signals.cut):,} boundaries cut"
