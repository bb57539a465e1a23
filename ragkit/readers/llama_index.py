"""Documents from any LlamaIndex reader. The reader is the caller's own object, so LlamaIndex is not imported here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
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
    """What is needed of a LlamaIndex reader: `llama_index.core.readers.base.BaseReader` has it."""

    def load_data(self, *args: Any, **load_kwargs: Any) -> Iterable[Any]:
        """Return LlamaIndex documents."""
        ...


def read_llama_index(
    reader: LlamaIndexReader, arguments: Mapping[str, object] | None = None, *, prefix: str = "llama-index:"
) -> Iterator[Document]:
    """Yield the documents that `reader.load_data(**arguments)` gives, with offsets and pages of our own.

    Readers that give one document a page (`page_label` in the metadata) are read as one document with page spans, so
    that citations name pages. The uri is the file path or URL that the metadata name, else `prefix` and the
    LlamaIndex id; where one place gives several documents, `#part=N` follows. Text that is blank is left out.

    Raises:
        UsageError: `reader` has no `load_data`, or gives something other than LlamaIndex documents.
        ReadError: `crash`, where the reader fails.
    """
    load = getattr(reader, "load_data", None)
    if not callable(load):
        raise UsageError(f"a LlamaIndex reader has a method load_data, got {type(reader).__name__}")
    try:
        loaded = list(load(**(arguments or {})))
    except Exception as error:
        raise ReadError(
            f"{type(reader).__name__} failed: {type(error).__name__}: {error}", code="crash", stage="read"
        ) from error
    return _converted(loaded, prefix)


def _converted(loaded: list[Any], prefix: str) -> Iterator[Document]:
    parts: dict[str, int] = {}
    for (place, paged), group in groupby(loaded, key=lambda item: (_place(item), _page(item) is not None)):
        items = list(group)
        for run in _runs(items) if paged and place else [[item] for item in items]:
            uri = place or prefix + str(getattr(run[0], "id_", ""))
            parts[uri] = parts.get(uri, 0) + 1
            document = _document(run, uri if parts[uri] == 1 else f"{uri}#part={parts[uri]}")
            if not is_blank(document.text):
                yield document


def _runs(items: list[Any]) -> Iterator[list[Any]]:
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
