"""What the headings and tables around a chunk say of it: kept in its metadata, so that search results show it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ragkit.chunking.outline import heading_metadata, heading_paths, outline
from ragkit.chunking.tables import Table, find_tables, table_header
from ragkit.types import Chunk, Document, Metadata

_BLANK = 200  # code points of white space at the start of a chunk that are looked past
# Files whose `# ...` lines are comments, which would be taken for headings.
_HASH_COMMENTS = {
    *("bash", "cfg", "cmake", "coffee", "conf", "ex", "exs", "fish", "jl", "ksh", "mk", "nim", "pl", "pm", "ps1"),
    *("py", "pyi", "r", "rb", "sh", "tcl", "toml", "yaml", "yml", "zsh"),
}


def with_metadata(document: Document, chunks: Sequence[Chunk]) -> list[Chunk]:
    """Return the chunks of `document` with what `structural_metadata` says of them besides their own metadata.

    Chunks that have metadata already are taken to be complete, as the structural chunker's are; files in a language
    whose comments look like headings are left alone.
    """
    suffix = document.uri.rpartition(".")[2].lower()
    if suffix in _HASH_COMMENTS or any(chunk.metadata for chunk in chunks):
        return list(chunks)
    found = structural_metadata(document.text, [chunk.char_start for chunk in chunks])
    return [replace(chunk, metadata=some) if some else chunk for chunk, some in zip(chunks, found, strict=True)]


def structural_metadata(text: str, char_starts: Sequence[int]) -> list[Metadata]:
    """Return, for chunks of `text` that start at `char_starts` (ascending), what their place says of them.

    `heading_path` holds the headings above the chunk, `table_header` the column names where the chunk starts inside
    a table whose header lies in an earlier chunk. Keys that do not apply are left out.
    """
    tables = find_tables(text)
    # A chunk that starts with a heading (or white space before it) is below that heading.
    firsts = [start + _blanks(text[start : start + _BLANK]) for start in char_starts]
    paths = heading_paths(outline(text), firsts)
    return [
        {**heading_metadata(path), **_header_metadata(tables, first)} for path, first in zip(paths, firsts, strict=True)
    ]


def _blanks(text: str) -> int:
    return len(text) - len(text.lstrip())


def _header_metadata(tables: Sequence[Table], char: int) -> Metadata:
    header = table_header(tables, char)
    return {} if header is None else {"table_header": header}
