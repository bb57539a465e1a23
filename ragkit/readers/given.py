"""Documents that the caller hands over, as sources: each is one of its own, named by its URI."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ragkit.errors import ReadError, UsageError
from ragkit.readers.base import ParseContext
from ragkit.readers.invisible import is_blank
from ragkit.readers.media_type import MediaType
from ragkit.readers.origin import ReadLocal, Skipped, Source
from ragkit.readers.result import ReadResult, SpilledDocuments
from ragkit.types import Document

_READER = "given/1"


@dataclass(frozen=True, slots=True)
class GivenDocument:
    """One of the documents that were handed over; sent to another process it takes its document along.

    Attributes:
        documents: all of them; on disk where they are many.
        index: which one.
    """

    documents: Sequence[Document]
    index: int

    def read(self, source: Source, context: ParseContext, read_local: ReadLocal) -> ReadResult:
        """Return the document; see `Origin`.

        Raises:
            ReadError: `empty` or `too_large`.
        """
        document = self.documents[self.index]
        if is_blank(document.text):
            raise ReadError(f"{source.uri}: there is no text in it", code="empty")
        if source.size > context.limits.max_text_bytes:
            raise ReadError(
                f"{source.uri}: {source.size} bytes of text are over the limit of {context.limits.max_text_bytes}",
                code="too_large",
            )
        return ReadResult(source, MediaType.GIVEN, _READER, content_digest(document), (document,))

    def __reduce__(self) -> tuple[type[GivenDocument], tuple[tuple[Document], int]]:
        return GivenDocument, ((self.documents[self.index],), 0)


def given_sources(
    documents: Iterable[Document],
    on_skip: Callable[[Skipped], None],
    on_fail: Callable[[str, ReadError], None] | None = None,
) -> Iterator[Source]:
    """Yield a source for each of `documents`, which are drawn one at a time and kept on disk where they are many.

    Raises:
        UsageError: something among them is no document.
        ReadError: drawing one failed, and `on_fail` is left out.
    """
    held = SpilledDocuments("")
    seen: set[str] = set()
    for document in _until_failure(documents, on_fail):
        if not isinstance(document, Document):
            raise UsageError(
                f"a source is a path, a URL or an iterable of documents; got a {type(document).__name__} in one"
            )
        if document.uri in seen:
            on_skip(Skipped(document.uri, "stands twice among the given documents; the first is taken"))
            continue
        seen.add(document.uri)
        held.append(document)
        stamp = int(content_digest(document)[:14], 16)
        size = len(document.text.encode("utf-8", "surrogatepass"))
        yield Source(document.uri, Path(), size, stamp, origin=GivenDocument(held, len(held) - 1))


def content_digest(document: Document) -> str:
    """Return the hex SHA-256 of a document's text, pages and metadata."""
    facts = json.dumps([document.doc_id, sorted(document.metadata.items())])
    return hashlib.sha256(facts.encode()).hexdigest()


def _until_failure(
    documents: Iterable[Document], on_fail: Callable[[str, ReadError], None] | None
) -> Iterator[Document]:
    try:
        yield from documents
    except ReadError as error:
        if on_fail is None:
            raise
        on_fail(getattr(documents, "name", type(documents).__name__), error)
