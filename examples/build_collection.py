"""Builds `examples/collection/` from the Debian package sqlite3-doc: `python examples/build_collection.py [FOLDER]`.

The collection is checked in; this script says where every file of it comes from and gives the same bytes again.
Most pages are copied unchanged. Three are set in another format, so that the collection holds PDF, Markdown and CSV
as well: the same words, in a PDF of Helvetica and Courier, in Markdown, and as one CSV row per result code.
"""

from __future__ import annotations

import csv
import io
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lxml import html

SOURCE = Path("/usr/share/doc/sqlite3")
COLLECTION = Path(__file__).resolve().parent / "collection"

COPIED = """
    about appfileformat autoinc copyright datatype3 different faq footprint gencol howitworks
    howtocorrupt inmemorydb intern-v-extern-blob isolation lang_savepoint lang_transaction lockingv3 lts
    mmap mostdeployed onefile quirks security selfcontained serverless testing threadsafe transactional wal whentouse
    withoutrowid zeroconf
"""
AS_PDF = {"limits": "Limits In SQLite"}
AS_MARKDOWN = {"stricttables": "STRICT Tables"}
RESULT_CODES = "rescode"

SKIPPED_TAGS = {"script", "style", "svg", "button", "form"}
SKIPPED_CLASSES = {"nosearch", "imgcontainer"}
HEADINGS = {"h1": 2, "h2": 3, "h3": 4}
INLINE_MARKS = {"br": "\n", "sup": "^"}
BLOCK_TAGS = set(HEADINGS) | {"p", "li", "ul", "ol", "div", "pre", "blockquote", "table", "tr", "td", "th", "body"}


@dataclass(frozen=True)
class Block:
    """One paragraph of a page; `kind` is heading, paragraph, item or code, `level` that of a heading."""

    kind: str
    text: str
    level: int = 0


def read_blocks(page: bytes, title: str) -> list[Block]:
    """Return the blocks of an SQLite documentation page, without its menu, its drawings and its own title."""
    reader = _PageReader(title)
    reader.walk(html.fromstring(page.decode("utf-8")).find("body"))
    return reader.blocks


class _PageReader:
    """Walks a page; text between two block elements becomes one block."""

    def __init__(self, title: str) -> None:
        self.blocks: list[Block] = []
        self._title = title
        self._text: list[str] = []
        self._kind = "paragraph"
        self._level = 0

    def walk(self, element: html.HtmlElement) -> None:
        """Read `element` and everything in it, its tail left out."""
        if not isinstance(element.tag, str) or element.tag in SKIPPED_TAGS:
            return
        if SKIPPED_CLASSES & set((element.get("class") or "").split()):
            return
        is_block = element.tag in BLOCK_TAGS
        if is_block:
            self._end_block()
            self._kind = self._kind_of(element.tag)
            self._level = HEADINGS.get(element.tag, 0)
        elif element.tag in INLINE_MARKS:
            self._text.append(INLINE_MARKS[element.tag])
        self._text.append(element.text or "")
        for child in element:
            self.walk(child)
            self._text.append(child.tail or "")
        if is_block:
            self._end_block()
            self._kind = "paragraph"

    def _kind_of(self, tag: str) -> str:
        if tag in HEADINGS:
            return "heading"
        if tag in ("pre", "blockquote"):
            return "code"
        # The first paragraph of a list item carries its bullet.
        return "item" if tag == "li" or (tag == "p" and self._kind == "item") else "paragraph"

    def _end_block(self) -> None:
        text = "".join(self._text)
        text = text.strip("\n") if self._kind == "code" else re.sub(r"\s+", " ", text).strip()
        self._text.clear()
        if text and text != self._title and not text.startswith("This page last modified"):
            self.blocks.append(Block(self._kind, text, self._level))
            self._kind = "paragraph"


def as_markdown(title: str, blocks: list[Block]) -> str:
    """Return a Markdown page."""
    parts = [f"# {title}"]
    for block in blocks:
        if block.kind == "heading":
            parts.append("#" * block.level + " " + block.text)
        elif block.kind == "item":
            parts.append(f"- {block.text}")
        elif block.kind == "code":
            parts.append(f"```\n{block.text}\n```")
        else:
            parts.append(block.text)
    return "\n\n".join(parts) + "\n"


# Advance widths of Helvetica for the characters from space to tilde, in thousandths of the size (Adobe Font Metrics).
# fmt: off
HELVETICA = (
    278, 278, 355, 556, 556, 889, 667, 191, 333, 333, 389, 584, 278, 333, 278, 278, 556, 556, 556, 556, 556, 556, 556,
    556, 556, 556, 278, 278, 584, 584, 584, 556, 1015, 667, 667, 722, 722, 667, 611, 778, 722, 278, 500, 667, 556, 833,
    722, 778, 667, 778, 722, 667, 611, 722, 667, 944, 667, 667, 611, 278, 278, 278, 469, 556, 333, 556, 556, 500, 556,
    556, 278, 556, 556, 222, 222, 500, 222, 833, 556, 556, 556, 556, 333, 500, 278, 556, 500, 722, 500, 500, 500, 334,
    260, 334, 584,
)
# fmt: on
PAGE_WIDTH, PAGE_HEIGHT, MARGIN = 595, 842, 64


@dataclass(frozen=True)
class Line:
    """One line of a PDF page: a font of the page's resources, its size, the indent, and the space before it."""

    font: str
    size: float
    indent: float
    before: float
    text: str


def _width(text: str, size: float) -> float:
    return sum(HELVETICA[ord(char) - 32] if " " <= char <= "~" else 556 for char in text) * size / 1000


def _wrap(text: str, size: float, width: float) -> Iterator[str]:
    current = ""
    for word in text.split(" "):
        longer = f"{current} {word}" if current else word
        if current and _width(longer, size) > width:
            yield current
            current = word
        else:
            current = longer
    yield current


def _set_lines(title: str, blocks: list[Block]) -> list[Line]:
    lines = [Line("Bold", 18, 0, 0, title)]
    for block in blocks:
        if block.kind == "code":
            for number, text in enumerate(block.text.splitlines()):
                lines.append(Line("Code", 9, 18, 8 if number == 0 else 0, text))
            continue
        font, size, indent = {
            "heading": ("Bold", 12.0, 0.0),
            "item": ("Text", 10.0, 12.0),
            "paragraph": ("Text", 10.0, 0.0),
        }[block.kind]
        width = (PAGE_WIDTH - 2 * MARGIN - indent) * (0.93 if font == "Bold" else 1)
        text = f"\u2022 {block.text}" if block.kind == "item" else block.text
        for number, part in enumerate(_wrap(text, size, width)):
            lines.append(Line(font, size, indent, 7 if number == 0 else 0, part))
    return lines


def _pages(lines: list[Line]) -> list[str]:
    pages: list[str] = []
    content: list[str] = []
    y = float(PAGE_HEIGHT - MARGIN)
    for line in lines:
        y -= line.before + line.size * 1.3
        if y < MARGIN:
            pages.append("\n".join(content))
            content, y = [], PAGE_HEIGHT - MARGIN - line.size * 1.3
        text = line.text.replace("\\", r"\\").replace("(", r"\(").replace(")", r"\)")
        content.append(f"BT /{line.font} {line.size:g} Tf {MARGIN + line.indent:g} {y:.1f} Td ({text}) Tj ET")
    return [*pages, "\n".join(content)]


def as_pdf(title: str, blocks: list[Block]) -> bytes:
    """Return a PDF 1.4 file of A4 pages in the standard fonts; it holds no date, so the bytes are always the same."""
    pages = _pages(_set_lines(title, blocks))
    font = "<< /Type /Font /Subtype /Type1 /BaseFont /{} /Encoding /WinAnsiEncoding >>"
    first_page = 7
    kids = " ".join(f"{first_page + 2 * number} 0 R" for number in range(len(pages)))
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        f"<< /Type /Pages /Kids [{kids}] /Count {len(pages)} >>".encode(),
        font.format("Helvetica").encode(),
        font.format("Helvetica-Bold").encode(),
        font.format("Courier").encode(),
        f"<< /Title ({title}) /Author (The SQLite authors) >>".encode(),
    ]
    for number, content in enumerate(pages):
        objects.append(
            f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 {PAGE_WIDTH} {PAGE_HEIGHT}] "
            f"/Resources << /Font << /Text 3 0 R /Bold 4 0 R /Code 5 0 R >> >> "
            f"/Contents {first_page + 2 * number + 1} 0 R >>".encode()
        )
        stream = content.encode("cp1252")
        objects.append(b"<< /Length %d >>\nstream\n%s\nendstream" % (len(stream), stream))
    out = io.BytesIO(b"")
    out.write(b"%PDF-1.4\n%\xe2\xe3\xcf\xd3\n")
    offsets = []
    for number, body in enumerate(objects, start=1):
        offsets.append(out.tell())
        out.write(b"%d 0 obj\n%s\nendobj\n" % (number, body))
    start = out.tell()
    out.write(b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1))
    for offset in offsets:
        out.write(b"%010d 00000 n \n" % offset)
    out.write(b"trailer\n<< /Size %d /Root 1 0 R /Info 6 0 R >>\n" % (len(objects) + 1))
    out.write(b"startxref\n%d\n%%%%EOF\n" % start)
    return out.getvalue()


def as_csv(blocks: list[Block]) -> str:
    """Return the primary result codes (0 to 101) as CSV: code, name and what the page says about it."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["code", "name", "meaning"])
    code, name, meaning = -1, "", []
    for block in [*blocks, Block("heading", "(256) END")]:
        if block.kind != "heading":
            meaning.append(block.text)
            continue
        if name:
            writer.writerow([code, name, " ".join(meaning)])
        match = re.fullmatch(r"\((\d+)\) (\w+)", block.text)
        code, name, meaning = (int(match[1]), match[2], []) if match else (-1, "", [])
        if code >= 256:
            break
    return out.getvalue()


def main(folder: Path = SOURCE) -> None:
    """Write the collection from the HTML pages in `folder`."""
    COLLECTION.mkdir(exist_ok=True)
    for name in COPIED.split():
        (COLLECTION / f"{name}.html").write_bytes((folder / f"{name}.html").read_bytes())
    for name, title in AS_PDF.items():
        (COLLECTION / f"{name}.pdf").write_bytes(as_pdf(title, read_blocks(_page(folder, name), title)))
    for name, title in AS_MARKDOWN.items():
        text = as_markdown(title, read_blocks(_page(folder, name), title))
        (COLLECTION / f"{name}.md").write_text(text, encoding="utf-8")
    codes = as_csv(read_blocks(_page(folder, RESULT_CODES), ""))
    (COLLECTION / "result_codes.csv").write_text(codes, encoding="utf-8")


def _page(folder: Path, name: str) -> bytes:
    return (folder / f"{name}.html").read_bytes()


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:2]))
