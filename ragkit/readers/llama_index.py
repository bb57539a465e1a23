"""Documents from LlamaIndex readers and document stores. They are the caller's own objects: LlamaIndex is not imported.

What comes out can be ingested as it is, `pipeline.ingest([read_llama_index(reader)])`, and ingested again: a document
has the same URI each time, so that unchanged ones are recognised.
"""

from __future__ import annotations

import inspect
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import groupby
from typing import Any, Protocol

from ragkit.errors import ReadError, UsageError
from ragkit.readers.encodings import clean
from ragkit.readers.invisible import is_blank
from ragkit.readers.table_rows import to_scalar
from ragkit.types import Document, MetadataValue, PageSpan

_PAGE_GAP = "\n\n"
_PLACE_KEYS = ("file_path", "url", "source", "file_name")
_PAGE_KEYS = ("page_label", "page")


class LlamaIndexReader(Protocol):
    """What is needed of a LlamaIndex reader: `llama_index.core.readers.base.BaseReader` has it.

    `lazy_load_data`, where a reader has it, is used instead: documents are then drawn one at a time.
    """

    def load_data(self, *args: Any, **load_kwargs: Any) -> Iterable[Any]:
        """Return LlamaIndex documents."""
        ...


class LlamaIndexDocumentStore(Protocol):
    """What is needed of a LlamaIndex document store: `llama_index.core.storage.docstore.BaseDocumentStore` has it."""

    @property
    def docs(self) -> Mapping[str, Any]:
        """The nodes by their ids."""
        ...


class LlamaIndexDocuments:
    """An iterator over documents that says where they come from.

    Attributes:
        name: the class of the reader or store, for error lines.
    """

    def __init__(self, name: str, documents: Iterator[Document]) -> None:
        self.name = name
        self._documents = documents

    def __iter__(self) -> LlamaIndexDocuments:
        return self

    def __next__(self) -> Document:
        return next(self._documents)


def read_llama_index(
    reader: LlamaIndexReader, arguments: Mapping[str, object] | None = None, *, prefix: str = "llama-index:"
) -> LlamaIndexDocuments:
    """Yield the documents that `reader` loads with `arguments`, with offsets and pages of our own.

    Readers that give one document a page (`page_label` in the metadata) are read as one document with page spans, so
    that citations name pages. The uri is the file path or URL that the metadata name, else `prefix` and the LlamaIndex
    id; an id that was drawn at random, which is another one each time, is replaced by that of the content. Where one
    place gives several documents, `#part=N` follows. Text that is blank is left out.

    Raises:
        UsageError: `reader` has no `load_data`; while iterating, it gives something other than LlamaIndex documents.
        ReadError: `crash`, while iterating, where the reader fails.
    """
    if not callable(getattr(reader, "load_data", None)):
        raise UsageError(f"a LlamaIndex reader has a method load_data, got {type(reader).__name__}")
    name = type(reader).__name__
    loaded = _translated(name, lambda: _load(reader, arguments or {}))
    return LlamaIndexDocuments(name, _numbered(_joined(loaded, prefix)))


def read_llama_index_store(store: LlamaIndexDocumentStore, *, prefix: str = "llama-index:") -> LlamaIndexDocuments:
    """Yield the nodes of a document store as documents, each named `prefix` and its id, which the store keeps.

    Raises:
        UsageError: `store` has no `docs`; while iterating, a node has no text.
        ReadError: `crash`, while iterating, where the store fails.
    """
    name = type(store).__name__
    if not hasattr(type(store), "docs"):
        raise UsageError(f"a LlamaIndex document store has docs, got {name}")
    nodes = _translated(name, lambda: store.docs.items())
    documents = (_document([node], prefix + str(node_id)) for node_id, node in nodes)
    return LlamaIndexDocuments(name, (document for document in documents if not is_blank(document.text)))


def _load(reader: Any, arguments: Mapping[str, object]) -> Iterable[Any]:
    lazy = getattr(reader, "lazy_load_data", None)
    if callable(lazy):
        try:
            inspect.signature(lazy).bind(**arguments)
            loaded: Iterable[Any] = lazy(**arguments)
            return loaded
        except (NotImplementedError, TypeError):  # the base class has the method and refuses, or takes other arguments
            pass
    return list(reader.load_data(**arguments))


def _translated(name: str, load: Callable[[], Iterable[Any]]) -> Iterator[Any]:
    try:
        yield from load()
    except Exception as error:  # readers fail in ways of their own
        raise ReadError(f"{name} failed: {type(error).__name__}: {error}", code="crash", stage="read") from error


def _joined(loaded: Iterator[Any], prefix: str) -> Iterator[Document]:
    """Yield documents, the pages of a file joined."""
    for (place, paged), group in groupby(loaded, key=lambda item: (_place(item), _page(item) is not None)):
        if place and paged:
            for run in _runs(group):
                yield _document(run, place)
            continue
        for item in group:
            document = _document([item], place or prefix + str(getattr(item, "id_", "")))
            if not place and _is_random(getattr(item, "id_", "")):
                document = replace(document, uri=prefix + document.doc_id)
            yield document


def _numbered(documents: Iterator[Document]) -> Iterator[Document]:
    """Yield the documents that have text, those of one place with numbers."""
    parts: dict[str, int] = {}
    for document in documents:
        uri = document.uri
        parts[uri] = part = parts.get(uri, 0) + 1
        if not is_blank(document.text):
            yield document if part == 1 else replace(document, uri=f"{uri}#part={part}")


def _is_random(identity: object) -> bool:
    """Return whether an id is what LlamaIndex draws for a document that was given none."""
    try:
        return uuid.UUID(str(identity)).version == 4
    except ValueError:
        return False


def _runs(items: Iterable[Any]) -> Iterator[list[Any]]:
    """Yield stretches of ascending page numbers: a page that comes again begins another document."""
    run: list[Any] = []
    for item in items:
        if run and (_page(item) or 0) <= (_page(run[-1]) or 0):
            yield run
            run = []
        run.append(item)
    yield run


def _document(items: list[Any], uri: str) -> Document:
    """Return one document of the items of a run; a single item keeps its page, if it has one."""
    texts = [clean(_text(item))[0] for item in items]
    pages, start = [], 0
    for item, text in zip(items, texts, strict=True):
        number = _page(item)
        if number is not None and text:
            pages.append(PageSpan(number, start, start + len(text)))
        start += len(text) + len(_PAGE_GAP)
    return Document.from_text(_PAGE_GAP.join(texts), uri, pages, _facts(items[0], with_page=len(items) == 1))


def _text(item: Any) -> str:
    text = getattr(item, "text", None)
    if not isinstance(text, str):
        raise UsageError(f"a LlamaIndex document has a text, got {type(item).__name__}")
    return text


def _place(item: Any) -> str:
    metadata = getattr(item, "metadata", None) or {}
    return next((str(metadata[key]) for key in _PLACE_KEYS if metadata.get(key)), "")


def _page(item: Any) -> int | None:
    """Return the page number, where the label is one; labels such as `iv` are not."""
    metadata = getattr(item, "metadata", None) or {}
    label = next((str(metadata[key]) for key in _PAGE_KEYS if key in metadata), "")
    return int(label) if label.isascii() and label.isdigit() and len(label) < 9 and int(label) > 0 else None


def _facts(item: Any, *, with_page: bool) -> dict[str, MetadataValue]:
    """Return the flat metadata, valid as text; nested values are left out."""
    facts: dict[str, MetadataValue] = {}
    for key, value in (getattr(item, "metadata", None) or {}).items():
        if isinstance(value, dict | list | tuple | set | bytes) or (key in _PAGE_KEYS and not with_page):
            continue
        scalar = to_scalar(value)
        facts[clean(str(key))[0]] = clean(scalar)[0] if isinstance(scalar, str) else scalar
    return facts
