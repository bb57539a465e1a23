"""HTML to readable text: blocks become lines, what a reader would not see is left out, nothing is fetched or run."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ragkit.readers.base import ParseContext, Parsed, ParsedDocument
from ragkit.readers.block_text import BlockText
from ragkit.readers.encodings import decode
from ragkit.readers.invisible import strip_invisible
from ragkit.readers.media_type import MediaType

_SKIPPED = frozenset(
    (
        "script",
        "style",
        "template",
        "noscript",
        "svg",
        "iframe",
        "object",
        "embed",
        "audio",
        "video",
        "canvas",
        "map",
        "head",
        "title",
        "input",
        "button",
        "select",
        "option",
        "optgroup",
        "datalist",
        "textarea",
        "nav",
        "annotation",
        "annotation-xml",
        "rp",
        "rt",
        "_comment",
        "-comment",
        "-doctype",
        "!doctype",
    )
)
_HEADINGS = {f"h{level}": level for level in range(1, 7)}
_BLANK = frozenset(
    (
        "p",
        "table",
        "ul",
        "ol",
        "dl",
        "blockquote",
        "pre",
        "hr",
        "figure",
        "h1",
        "h2",
        "h3",
        "h4",
        "h5",
        "h6",
        "article",
        "section",
        "main",
        "fieldset",
    )
)
_LINE = frozenset(
    (
        "div",
        "li",
        "dt",
        "dd",
        "tr",
        "caption",
        "header",
        "footer",
        "aside",
        "address",
        "form",
        "details",
        "summary",
        "figcaption",
        "body",
        "html",
        "center",
        "legend",
        "thead",
        "tbody",
        "tfoot",
        "menu",
        "hgroup",
    )
)
_CELLS = frozenset(("td", "th"))
_LISTS = frozenset(("ul", "ol", "menu"))
# Navigation bars of documentation generators that have no <nav> element (DocBook, Sphinx).
_NAVIGATION_CLASSES = frozenset(("navheader", "navfooter", "sphinxsidebar", "headerlink"))
_HIDDEN_STYLE = re.compile(r"(?<![-\w])(?:display\s*:\s*none|visibility\s*:\s*hidden|mso-hide\s*:\s*all)", re.I)
_INVISIBLE_STYLE = re.compile(
    r"(?<![-\w])(?:font-size\s*:\s*0+(?:\.0+)?(?![\d.])|opacity\s*:\s*0+(?:\.0+)?(?![\d.]))", re.I
)
_WHITE_STYLE = re.compile(r"(?<![-\w])color\s*:\s*(?:white\b|#fff(?:fff)?\b|rgba?\(\s*255\s*,\s*255\s*,\s*255\b)", re.I)
_BACKGROUND_STYLE = re.compile(r"(?<![-\w])background", re.I)
_CHARSET = re.compile(rb"<meta[^>]{0,200}?charset\s*=\s*[\"']?\s*([\w-]{2,40})", re.I)
_XML_ENCODING = re.compile(rb"^\s*<\?xml[^>]{0,200}?encoding\s*=\s*[\"']([\w-]{2,40})", re.I)
_DECLARATION_WINDOW = 4096


class HtmlReader:
    """Reads HTML and XHTML."""

    name = "html"
    version = 1
    media_types = frozenset((MediaType.HTML,))

    def read(self, path: Path, context: ParseContext) -> Iterator[Parsed]:
        """Yield the one document of the file."""
        data = path.read_bytes()
        decoded = decode(data, declared_encoding(data))
        del data
        page = parse_html(decoded.text)
        metadata = {**decoded.metadata, **page.metadata}
        yield ParsedDocument(page.text, metadata=metadata, warnings=(*decoded.warnings, *page.warnings))


@dataclass(frozen=True, slots=True)
class HtmlPage:
    """The readable text of a page, its title and author, and what looked like hidden text."""

    text: str
    metadata: dict[str, str | int | float | bool | None]
    warnings: tuple[str, ...] = ()


def declared_encoding(data: bytes) -> str | None:
    """Return the encoding that a page names in its XML declaration or a <meta> element."""
    head = data[:_DECLARATION_WINDOW]
    found = _XML_ENCODING.search(head) or _CHARSET.search(head)
    return found.group(1).decode("ascii") if found else None


def parse_html(markup: str) -> HtmlPage:
    """Return the readable text of `markup`. A page that is nothing but navigation gives its navigation."""
    from selectolax.lexbor import LexborHTMLParser

    tree = LexborHTMLParser(strip_invisible(markup))
    metadata = _metadata(tree)
    root = tree.root
    if root is None:
        return HtmlPage("", metadata)
    walk = _Walk(keep_navigation=False)
    text = walk.text(root) or _Walk(keep_navigation=True).text(root)
    warnings: tuple[str, ...] = ()
    if walk.hidden:
        warnings = (f"{walk.hidden} characters of text hidden by its colour or size were left out",)
    return HtmlPage(text, metadata, warnings)


def _metadata(tree: Any) -> dict[str, str | int | float | bool | None]:
    metadata: dict[str, str | int | float | bool | None] = {}
    title = tree.css_first("head > title")
    if title is not None and (text := " ".join(title.text().split())):
        metadata["title"] = text
    author = tree.css_first("meta[name=author]")
    if author is not None and (name := " ".join((author.attributes.get("content") or "").split())):
        metadata["author"] = name
    return metadata


class _Walk:
    """One pass over the tree, without recursion: pages nest as deep as they like."""

    def __init__(self, *, keep_navigation: bool) -> None:
        self._keep_navigation = keep_navigation
        self._out = BlockText()
        self._pre = 0
        self._lists: list[int] = []  # next number of each open list, 0 for bullets
        self._rows: list[int] = []  # cells so far of each open row
        self.hidden = 0

    def text(self, root: Any) -> str:
        path = [root]
        self._open(root.tag, root.attributes)
        node = root.first_child
        while path:
            if node is None:
                parent = path.pop()
                self._close(parent.tag)
                node = parent.next if path else None
                continue
            tag = node.tag
            if tag == "-text":
                self._text(node.text_content)
            elif self._enters(node, tag):
                path.append(node)
                node = node.first_child
                continue
            node = node.next
        return self._out.text()

    def _text(self, text: str | None) -> None:
        if text:
            (self._out.verbatim if self._pre else self._out.inline)(text)

    def _enters(self, node: Any, tag: str) -> bool:
        """Open an element and return whether its children are walked."""
        if tag in _SKIPPED and not (tag == "nav" and self._keep_navigation):
            return False
        if tag == "br":
            self._text("\n") if self._pre else self._out.line()
            return False
        attributes = node.attributes
        if attributes and self._is_hidden(node, attributes):
            return False
        self._open(tag, attributes)
        return True

    def _open(self, tag: str, attributes: dict[str, str | None]) -> None:
        out = self._out
        if tag in _CELLS:
            if self._rows:
                out.cell(self._rows[-1])
                self._rows[-1] += 1
            return
        if tag in _BLANK and not (tag in _LISTS and self._lists):
            out.blank()
        elif tag in _LINE or tag in _LISTS:
            out.line()
        if tag in _HEADINGS:
            out.heading(_HEADINGS[tag])
        elif tag in _LISTS:
            self._lists.append(_list_start(attributes) if tag == "ol" else 0)
        elif tag == "li":
            self._item()
        elif tag == "tr":
            out.row()
            self._rows.append(0)
        elif tag == "pre":
            self._pre += 1

    def _item(self) -> None:
        number = self._lists[-1] if self._lists else 0
        self._out.item(max(1, len(self._lists)), f"{number}. " if number else "- ")
        if number:
            self._lists[-1] += 1

    def _close(self, tag: str) -> None:
        out = self._out
        if tag in _HEADINGS or tag == "li":
            out.end_marked()
        if tag == "tr":
            if self._rows:
                self._rows.pop()
            out.end_row()
        elif tag == "pre":
            self._pre -= 1
            out.end_verbatim()
        elif tag in _LISTS and self._lists:
            self._lists.pop()
        if tag in _BLANK and not (tag in _LISTS and self._lists):
            out.blank()
        elif tag in _LINE or tag in _LISTS:
            out.line()

    def _is_hidden(self, node: Any, attributes: dict[str, str | None]) -> bool:
        if "hidden" in attributes or attributes.get("aria-hidden") == "true":
            return True
        if not self._keep_navigation and self._is_navigation(attributes):
            return True
        style = attributes.get("style")
        if not style:
            return False
        if _HIDDEN_STYLE.search(style):
            return True
        if _INVISIBLE_STYLE.search(style) or (_WHITE_STYLE.search(style) and not _has_background(node)):
            self.hidden += len((node.text() or "").strip())
            return True
        return False

    def _is_navigation(self, attributes: dict[str, str | None]) -> bool:
        if attributes.get("role") == "navigation":
            return True
        names = attributes.get("class")
        return bool(names) and not _NAVIGATION_CLASSES.isdisjoint((names or "").split())


def _list_start(attributes: dict[str, str | None]) -> int:
    start = attributes.get("start") or ""
    return int(start) if start.isascii() and start.isdigit() and len(start) < 9 else 1


def _has_background(node: Any) -> bool:
    """Return whether an element or one around it is painted, so that white text on it can be seen."""
    while node is not None and node.tag != "-document":
        attributes = node.attributes
        if attributes and ("bgcolor" in attributes or _BACKGROUND_STYLE.search(attributes.get("style") or "")):
            return True
        node = node.parent
    return False
