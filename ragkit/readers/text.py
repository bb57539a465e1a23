"""Plain text and Markdown: the document's text is the file's content, so offsets are the file's own."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from ragkit.readers.base import ParseContext, Parsed, ParsedDocument
from ragkit.readers.encodings import Decoded, decode
from ragkit.readers.invisible import invisible_warnings
from ragkit.readers.media_type import MediaType

_TITLE_WINDOW = 16 * 1024
_ATX_TITLE = re.compile(r"^ {0,3}#{1,2}[ \t]+(\S[^\n]{0,300}?)[ \t#]*\r?$", re.M)
_SETEXT_TITLE = re.compile(r"^ {0,3}(\S[^\n]{0,300}?)[ \t]*\r?\n={3,}[ \t]*\r?$", re.M)
_FRONT_MATTER_TITLE = re.compile(r"^title:[ \t]*(['\"]?)(\S[^\n]{0,300}?)\1[ \t]*\r?$", re.M)


class TextReader:
    """Reads text in any encoding. UTF-8 content is kept unchanged, newlines included."""

    name = "text"
    version = 1
    media_types = frozenset((MediaType.TEXT,))

    def read(self, path: Path, context: ParseContext) -> Iterator[Parsed]:
        """Yield the one document of the file."""
        yield self.parse(path.read_bytes())

    def parse(self, data: bytes | bytearray) -> ParsedDocument:
        """Return the document that `data` holds."""
        decoded = decode(data)
        warnings = (*decoded.warnings, *invisible_warnings(decoded.text))
        return ParsedDocument(decoded.text, metadata=self._metadata(decoded), warnings=warnings)

    def _metadata(self, decoded: Decoded) -> dict[str, str | int | float | bool | None]:
        return decoded.metadata


class MarkdownReader(TextReader):
    """Reads Markdown as the text it is, and takes the title from the front matter or the first heading."""

    name = "markdown"
    media_types = frozenset((MediaType.MARKDOWN,))

    def _metadata(self, decoded: Decoded) -> dict[str, str | int | float | bool | None]:
        title = markdown_title(decoded.text)
        return {**decoded.metadata, "title": title} if title else decoded.metadata


def markdown_title(text: str) -> str | None:
    """Return the title of a Markdown text, looked for in its first 16,384 characters."""
    head = text[:_TITLE_WINDOW]
    if head.startswith("---"):
        front = head.split("\n---", 1)[0]
        named = _FRONT_MATTER_TITLE.search(front)
        if named:
            return named.group(2)
        head = head[len(front) :]
    found = [match for match in (_ATX_TITLE.search(head), _SETEXT_TITLE.search(head)) if match]
    return min(found, key=lambda match: match.start()).group(1) if found else None
