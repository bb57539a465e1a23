"""PDF through PDFium: the text of every page in reading order, with page spans."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ragkit.errors import ReadError
from ragkit.readers.base import ParseContext, Parsed, ParsedDocument
from ragkit.readers.encodings import clean
from ragkit.readers.invisible import is_blank, strip_invisible
from ragkit.readers.media_type import MediaType
from ragkit.types import PageSpan

# PDFium writes a line-end hyphen that joins two lines as one of these, and leaves the line break out.
_SOFT_HYPHEN = re.compile("(?<![^\\W\\d_])([^\\W\\d_]*)[\x02\ufffe]([^\\W\\d_]*)")
_HYPHENED = re.compile(r"(?<![^\W\d_])[^\W\d_]+-[^\W\d_]+")
_CONTROLS = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufffe\uffff]")
_WORD = re.compile(r"[^\W\d_]+")
_PAGE_GAP = "\n\n"
_MAX_LISTED_PAGES = 10
_UNREADABLE_SHARE = 0.3
_WRAPPED_SHARE = 0.6


class PdfReader:
    """Reads the text layer of PDF files. Pages are numbered from 1; pages without text have no span."""

    name = "pdf"
    version = 1
    media_types = frozenset((MediaType.PDF,))

    def read(self, path: Path, context: ParseContext) -> Iterator[Parsed]:
        """Yield the one document of the file."""
        with _opened(path) as pdf:
            count = len(pdf)
            if not count:
                raise ReadError("the PDF has no pages", code="empty")
            raw, scanned, broken = _page_texts(pdf, count, context.limits.max_text_bytes)
            metadata = {**_metadata(pdf), "page_count": count}
        if not any(raw):
            raise _without_text(count, scanned, broken)
        texts = _joined_words(raw)
        text, pages = _with_spans(texts)
        yield ParsedDocument(text, pages, metadata, warnings=tuple(_warnings(text, scanned, broken)))


def _opened(path: Path) -> Any:
    import pypdfium2
    import pypdfium2.raw as pdfium

    try:
        return pypdfium2.PdfDocument(path)
    except pypdfium2.PdfiumError as error:
        reason = pdfium.FPDF_GetLastError()
        if reason == pdfium.FPDF_ERR_PASSWORD or "password" in str(error).lower():
            raise ReadError("the PDF needs a password; save a copy without one", code="encrypted") from error
        if reason == pdfium.FPDF_ERR_SECURITY:
            raise ReadError("the PDF is encrypted in a way that cannot be read", code="encrypted") from error
        raise ReadError(f"not readable as PDF: {error}", code="corrupt") from error


def _page_texts(pdf: Any, count: int, limit: int) -> tuple[list[str], list[int], list[int]]:
    """Return the raw text of every page, the pages that are pictures without text, and those that cannot be read."""
    import pypdfium2

    texts, scanned, broken, total = [], [], [], 0
    for index in range(count):
        try:
            page = pdf[index]
            text, has_picture = _page_text(page)
            page.close()
        except pypdfium2.PdfiumError:
            text, has_picture = "", False
            broken.append(index + 1)
        if has_picture:
            scanned.append(index + 1)
        total += len(text)
        if total > limit:
            raise ReadError(f"over {limit} characters of text after page {index + 1} of {count}", code="too_large")
        texts.append(text)
    return texts, scanned, broken


def _page_text(page: Any) -> tuple[str, bool]:
    """Return what stands within the visible box of a page, and whether there is a picture but no text."""
    import pypdfium2.raw as pdfium

    layer = page.get_textpage()
    text = layer.get_text_bounded()
    layer.close()
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\xa0", " ").strip()
    if not is_blank(_CONTROLS.sub("", text)):
        return text, False
    return "", next(iter(page.get_objects(filter=(pdfium.FPDF_PAGEOBJ_IMAGE,), max_depth=3)), None) is not None


def _joined_words(pages: list[str]) -> list[str]:
    """Return the pages with line-end hyphens resolved and control characters removed.

    `informa-` + `tion` becomes one word, `stock-` + `based` keeps its hyphen. Which it is, the rest of the document
    tells: the form that occurs elsewhere wins, and halves that are words of their own keep the hyphen.
    """
    if any(_SOFT_HYPHEN.search(page) for page in pages):
        whole = " ".join(pages)
        words = {word.casefold() for word in _WORD.findall(_SOFT_HYPHEN.sub(" ", whole))}
        hyphened = {pair.casefold() for pair in _HYPHENED.findall(whole)}

        def resolve(match: re.Match[str]) -> str:
            left, right = match.group(1), match.group(2)
            joined, pair = left + right, f"{left}-{right}"
            if not left or not right or right[0].isupper():
                return pair
            if joined.casefold() in words:
                return joined
            if pair.casefold() in hyphened or (left.casefold() in words and right.casefold() in words):
                return pair
            return joined

        pages = [_SOFT_HYPHEN.sub(resolve, page) for page in pages]
    return [_unwrapped(clean(strip_invisible(_CONTROLS.sub("", page)))[0]) for page in pages]


def _unwrapped(page: str) -> str:
    """Return a page with the line breaks within sentences turned into spaces; lines of tables keep theirs.

    A line goes on where the next begins with a small letter, if it is long and ends with a letter or a comma.
    """
    lines = page.split("\n")
    wide = _WRAPPED_SHARE * max(map(len, lines))
    pieces = [lines[0]]
    for previous, line in itertools.pairwise(lines):
        goes_on = line[:1].islower() and len(previous) >= wide and (previous[-1:].isalpha() or previous[-1:] in ",;")
        pieces.append((" " if goes_on else "\n") + line)
    return "".join(pieces)


def _with_spans(texts: list[str]) -> tuple[str, tuple[PageSpan, ...]]:
    """Return the whole text and the span of each page that has some."""
    pages, place = [], 0
    for number, text in enumerate(texts, 1):
        if text:
            pages.append(PageSpan(number, place, place + len(text)))
            place += len(text) + len(_PAGE_GAP)
    return _PAGE_GAP.join(filter(None, texts)), tuple(pages)


def _metadata(pdf: Any) -> dict[str, str | int | float | bool | None]:
    facts = pdf.get_metadata_dict(skip_empty=True)
    found = {key.lower(): " ".join(clean(facts[key])[0].split()) for key in ("Title", "Author") if facts.get(key)}
    return {key: value for key, value in found.items() if value}


def _without_text(count: int, scanned: list[int], broken: list[int]) -> ReadError:
    if scanned:
        return ReadError(
            f"{len(scanned)} of {count} pages are pictures and none has text; run OCR on the file first",
            code="needs_ocr",
        )
    if broken:
        return ReadError(f"{len(broken)} of {count} pages cannot be read and none has text", code="corrupt")
    return ReadError(f"none of {count} pages has text or a picture", code="empty")


def _warnings(text: str, scanned: list[int], broken: list[int]) -> Iterator[str]:
    if scanned:
        yield f"pages without text that may be scans: {_listed(scanned)}"
    if broken:
        yield f"pages that cannot be read: {_listed(broken)}"
    unmapped = sum(text.count(char) for char in "\ufffd") + len(re.findall("[\ue000-\uf8ff]", text))
    if unmapped > _UNREADABLE_SHARE * len(text):
        yield f"{unmapped} of {len(text)} characters have no Unicode value; the fonts of the file do not give them"


def _listed(pages: list[int]) -> str:
    shown = ", ".join(map(str, pages[:_MAX_LISTED_PAGES]))
    more = len(pages) - _MAX_LISTED_PAGES
    return f"{shown} and {more} more" if more > 0 else shown
