"""`ragkit chunk`: how one file would be cut. Needs no store."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ragkit.cli.common import Session, command, flag
from ragkit.cli.output import bold, one_line
from ragkit.cli.query import place_of

if TYPE_CHECKING:
    from ragkit.config import PipelineConfig
    from ragkit.pipeline import Pipeline
    from ragkit.types import Chunk, Document

    Cut = list[tuple[Document, list[Chunk]]]

EXCERPT_CHARS = 160


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command("chunk")(command(chunk))


def chunk(
    session: Session,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The file, or - for stdin.")],
    chunker: Annotated[str | None, typer.Option("--chunker", metavar="NAME", help="How it is cut.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", min=1, metavar="N", help="Most tokens of a chunk.")
    ] = None,
) -> None:
    """Show how a file would be cut, without storing anything."""
    settings = session.settings(
        {"chunking.chunker": flag(chunker, "--chunker"), "chunking.max_tokens": flag(max_tokens, "--max-tokens")}
    )
    name, cut = _cut(file, settings.config)
    chunks = [_chunk_json(document, item) for document, items in cut for item in items]
    session.output.result({"chunker": name, "chunks": chunks}, _lines(cut))


def _cut(file: Path, config: PipelineConfig) -> tuple[str, Cut]:
    from ragkit.chunking.registry import MODEL_CHUNKERS, create_chunker
    from ragkit.models import resolve
    from ragkit.models.tokenizer import ModelTokenizer
    from ragkit.readers import read_documents

    documents = read_documents(file, config.ingest)
    tokenizer = ModelTokenizer(resolve(config.generation.model, offline=config.offline))
    models = _models(config) if config.chunking.chunker in MODEL_CHUNKERS else None
    chunker = create_chunker(config.chunking, tokenizer, models)
    return chunker.name, [(document, chunker.chunk(document)) for document in documents]


def _models(config: PipelineConfig) -> Pipeline:
    """Return a pipeline for its models alone: no store is opened."""
    from ragkit.pipeline import Pipeline

    return Pipeline(Path(), config)


def _chunk_json(document: Document, chunk: Chunk) -> dict[str, Any]:
    return {
        "index": chunk.index,
        "char_start": chunk.char_start,
        "char_stop": chunk.char_stop,
        "token_count": chunk.token_count,
        "text": chunk.text,
        "page": chunk.page,
        "uri": document.uri,
        "chunk_id": chunk.chunk_id,
    }


def _lines(cut: Sequence[tuple[Document, Sequence[Chunk]]]) -> Iterator[str]:
    for document, chunks in cut:
        for item in chunks:
            place = place_of(document.uri, item.page)
            head = bold(f"{item.index:>4}", sys.stdout)
            yield f"{head} {place} [{item.char_start}:{item.char_stop}] {item.token_count:,} tokens"
            yield f"     {one_line(item.text, EXCERPT_CHARS)}"
