"""DOCX: paragraphs, headings, lists and tables of the main text in reading order, then the foot- and endnotes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ragkit.errors import ReadError
from ragkit.readers.archive import SafeArchive
from ragkit.readers.base import ParseContext, Parsed, ParsedDocument
from ragkit.readers.block_text import BlockText
from ragkit.readers.invisible import strip_invisible
from ragkit.readers.media_type import MediaType
from ragkit.readers.safe_xml import iterate_xml, parse_xml

_MAIN = "word/document.xml"
_NOTES = (("word/footnotes.xml", "footnote"), ("word/endnotes.xml", "endnote"))
_WORD = (
    "{http://schemas.openxmlformats.org/wordprocessingml/2006/main}",
    "{http://purl.oclc.org/ooxml/wordprocessingml/main}",
)
_FALLBACK = "{http://schemas.openxmlformats.org/markup-compatibility/2006}Fallback"
_TITLE = "{http://purl.org/dc/elements/1.1/}title"
_AUTHOR = "{http://purl.org/dc/elements/1.1/}creator"
# Deleted text, field codes, and the second copy of what newer versions of Word draw otherwise.
_SKIPPED = frozenset(("del", "moveFrom", "instrText", "delText", "rPrChange", "pPrChange", "sectPr", "rt"))
_OFF = frozenset(("0", "false", "off", "none"))
_MAX_LEVEL = 6


class DocxReader:
    """Reads Word documents of the Office Open XML kind."""

    name = "docx"
    version = 1
    media_types = frozenset((MediaType.DOCX,))

    def read(self, path: Path, context: ParseContext) -> Iterator[Parsed]:
        """Yield the one document of the file."""
        with SafeArchive(path, context.limits) as archive:
            if _MAIN not in archive.names:
                raise ReadError(f"the archive holds no {_MAIN!r}", code="corrupt")
            levels = _heading_levels(archive)
            text = _Body(levels).text(archive.read(_MAIN), _MAIN)
            notes = [
                _Body(levels, note=kind).text(archive.read(name), name)
                for name, kind in _NOTES
                if name in archive.names
            ]
            metadata = _metadata(archive)
        text = "\n\n".join(filter(None, (text, *notes)))
        yield ParsedDocument(strip_invisible(text), metadata=metadata)


class _Body:
    """One pass over a part of the document."""

    def __init__(self, levels: dict[str, int], note: str | None = None) -> None:
        self._levels = levels
        self._note = note
        self._out = BlockText()
        self._cells: list[int] = []
        self._skip_from: Any = None
        self._hidden_run = False

    def text(self, data: bytes, name: str) -> str:
        """Return the text of the part called `name`."""
        for event, element in iterate_xml(data, name):
            if self._skip_from is not None:
                if event == "end" and element is self._skip_from:
                    self._skip_from = None
                    element.clear()
                continue
            tag = _local(element.tag)
            if event == "start":
                if tag in _SKIPPED or element.tag == _FALLBACK or self._is_separator(tag, element):
                    self._skip_from = element
                else:
                    self._start(tag)
            else:
                self._end(tag, element)
                if tag in ("p", "tr", "tbl", "r"):
                    element.clear()  # keeps memory at one paragraph
        return self._out.text()

    def _is_separator(self, tag: str, element: Any) -> bool:
        """Return whether this is one of the lines that Word keeps among the notes."""
        return tag == self._note and _value(element, "type") in ("separator", "continuationSeparator")

    def _start(self, tag: str) -> None:
        out = self._out
        if tag in ("p", "tbl"):
            out.blank()
        elif tag == "tr":
            out.row()
            self._cells.append(0)
        elif tag == "tc" and self._cells:
            out.cell(self._cells[-1])
            self._cells[-1] += 1
        elif tag == "r":
            self._hidden_run = False

    def _end(self, tag: str, element: Any) -> None:
        out = self._out
        if tag == "pPr":
            self._paragraph_properties(element)
        elif tag == "vanish":
            self._hidden_run = _value(element, "val") not in _OFF
        elif tag == "t":
            if element.text and not self._hidden_run:
                out.inline(element.text)
        elif tag in ("tab", "ptab"):
            if _local(element.getparent().tag) == "r":
                out.inline(" ")
        elif tag in ("br", "cr"):
            out.line()
        elif tag == "noBreakHyphen":
            out.inline("-")
        elif tag == "tr" and self._cells:
            self._cells.pop()
            out.end_row()
        elif tag == "p":
            out.end_marked()
            out.blank()
        elif tag == "tbl":
            out.blank()

    def _paragraph_properties(self, element: Any) -> None:
        """Begin a heading or a list item where the properties say so."""
        style, depth, level = None, None, None
        for child in element:
            tag = _local(child.tag)
            if tag == "pStyle":
                style = _value(child, "val")
            elif tag == "outlineLvl":
                level = _number(_value(child, "val"))
            elif tag == "numPr":
                values = {_local(part.tag): _number(_value(part, "val")) for part in child}
                if values.get("numId", 1):  # 0 takes a paragraph out of its list
                    depth = (values.get("ilvl") or 0) + 1
        heading = level + 1 if level is not None and level < 9 else self._levels.get(style or "")
        if heading:
            self._out.heading(min(heading, _MAX_LEVEL))
        elif depth:
            self._out.item(min(depth, 9))


def _heading_levels(archive: SafeArchive) -> dict[str, int]:
    """Return the heading level of each style that has one, by its own word or by the style it is based on."""
    if "word/styles.xml" not in archive.names:
        return {}
    own: dict[str, int] = {}
    based: dict[str, str] = {}
    for style in parse_xml(archive.read("word/styles.xml"), "word/styles.xml"):
        identity = _value(style, "styleId")
        if _local(style.tag) != "style" or not identity:
            continue
        for child in style.iter():
            tag = _local(child.tag)
            if tag == "basedOn":
                based[identity] = _value(child, "val")
            elif tag == "outlineLvl" and (level := _number(_value(child, "val"))) is not None and level < 9:
                own[identity] = level + 1
            elif tag == "name" and (level := _named_level(_value(child, "val"))):
                own.setdefault(identity, level)
    levels = {}
    for identity in {*own, *based}:
        style_id, steps = identity, 0
        while style_id not in own and style_id in based and steps < 20:
            style_id, steps = based[style_id], steps + 1
        if style_id in own:
            levels[identity] = own[style_id]
    return levels


def _named_level(name: str) -> int | None:
    """Return the level of a built-in style name, which Word writes in English whatever its language."""
    folded = name.casefold()
    if folded == "title":
        return 1
    kind, _, number = folded.rpartition(" ")
    return _number(number) if kind == "heading" else None


def _metadata(archive: SafeArchive) -> dict[str, str | int | float | bool | None]:
    if "docProps/core.xml" not in archive.names:
        return {}
    core = parse_xml(archive.read("docProps/core.xml"), "docProps/core.xml")
    found = {"title": core.findtext(_TITLE), "author": core.findtext(_AUTHOR)}
    return {key: " ".join(text.split()) for key, text in found.items() if text and text.strip()}


def _local(tag: Any) -> str:
    """Return the name of a Word element, an empty one for elements of other kinds."""
    if isinstance(tag, str):
        for namespace in _WORD:
            if tag.startswith(namespace):
                return tag[len(namespace) :]
    return ""


def _value(element: Any, name: str) -> str:
    return str(next((element.get(space + name) for space in _WORD if element.get(space + name) is not None), ""))


def _number(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 9 else None
