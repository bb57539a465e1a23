"""EPUB: the chapters in the order of the spine, each under its heading."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ragkit.errors import ReadError
from ragkit.readers.archive import SafeArchive, member_path
from ragkit.readers.base import ParseContext, Parsed, ParsedDocument
from ragkit.readers.encodings import decode
from ragkit.readers.html import declared_encoding, parse_html
from ragkit.readers.media_type import MediaType
from ragkit.readers.safe_xml import parse_xml

_CONTAINER = "META-INF/container.xml"
_ENCRYPTION = "META-INF/encryption.xml"
_CHAPTER_TYPES = frozenset(("application/xhtml+xml", "text/html", "application/xml"))
# Fonts may be obfuscated in an open book; any other algorithm is a lock.
_FONT_OBFUSCATION = ("http://www.idpf.org/2008/embedding", "http://ns.adobe.com/pdf/enc#RC")


class EpubReader:
    """Reads EPUB 2 and 3."""

    name = "epub"
    version = 1
    media_types = frozenset((MediaType.EPUB,))

    def read(self, path: Path, context: ParseContext) -> Iterator[Parsed]:
        """Yield the one document of the book."""
        with SafeArchive(path, context.limits) as archive:
            _refuse_locked(archive)
            package_name = _package_name(archive)
            package = parse_xml(archive.read(package_name), package_name)
            items = _manifest(package, package_name)
            labels = _labels(archive, package, items)
            chapters, missing = [], []
            for name in _spine(package, items):
                if name not in archive.names:
                    missing.append(name)
                    continue
                text = _chapter(archive.read(name), labels.get(name))
                if text:
                    chapters.append(text)
        warnings = (f"{len(missing)} chapters are missing from the archive: {missing[0]!r}",) if missing else ()
        yield ParsedDocument("\n\n".join(chapters), metadata=_metadata(package), warnings=warnings)


def _refuse_locked(archive: SafeArchive) -> None:
    if _ENCRYPTION not in archive.names:
        return
    for element in parse_xml(archive.read(_ENCRYPTION), _ENCRYPTION).iter("{*}EncryptionMethod"):
        if element.get("Algorithm") not in _FONT_OBFUSCATION:
            raise ReadError("the book is locked by copy protection", code="encrypted")


def _package_name(archive: SafeArchive) -> str:
    root = parse_xml(archive.read(_CONTAINER), _CONTAINER)
    for element in root.iter("{*}rootfile"):
        name = member_path("", element.get("full-path") or "")
        if name is not None:
            return name
    raise ReadError(f"{_CONTAINER!r} names no package", code="corrupt")


def _manifest(package: Any, package_name: str) -> dict[str, tuple[str, str, str]]:
    """Return member name, media type and properties of each item by its id."""
    items = {}
    for element in package.iter("{*}item"):
        name = member_path(package_name, element.get("href") or "")
        if name is not None and element.get("id"):
            items[element.get("id")] = (name, element.get("media-type") or "", element.get("properties") or "")
    return items


def _spine(package: Any, items: dict[str, tuple[str, str, str]]) -> Iterator[str]:
    """Yield the members to be read, each once; what a book leaves out of its linear order comes where it stands."""
    seen = set()
    for element in package.iter("{*}itemref"):
        name, media_type, properties = items.get(element.get("idref") or "", ("", "", ""))
        if name and name not in seen and media_type in _CHAPTER_TYPES and "nav" not in properties.split():
            seen.add(name)
            yield name


def _labels(archive: SafeArchive, package: Any, items: dict[str, tuple[str, str, str]]) -> dict[str, str]:
    """Return the title that the table of contents gives each member: EPUB 3's navigation page, else EPUB 2's NCX."""
    labels: dict[str, str] = {}
    for name, media_type, properties in items.values():
        if name not in archive.names:
            continue
        if "nav" in properties.split():
            entries = parse_xml(archive.read(name), name).iter("{http://www.w3.org/1999/xhtml}a")
            found = [(element.get("href"), "".join(element.itertext())) for element in entries]
        elif media_type == "application/x-dtbncx+xml":
            points = parse_xml(archive.read(name), name).iter("{*}navPoint")
            found = [(_source(point), point.findtext("{*}navLabel/{*}text")) for point in points]
        else:
            continue
        for reference, label in found:
            target = member_path(name, reference or "")
            if target is not None and label and label.strip():
                labels.setdefault(target, " ".join(label.split()))
    return labels


def _source(point: Any) -> str | None:
    content = point.find("{*}content")
    return None if content is None else content.get("src")


def _chapter(data: bytes, label: str | None) -> str:
    """Return the text of a chapter; one without a heading of its own gets its title from the table of contents."""
    text = parse_html(decode(data, declared_encoding(data)).text).text
    if text and label and not text.startswith("#") and not text.casefold().startswith(label.casefold()):
        return f"# {label}\n\n{text}"
    return text


def _metadata(package: Any) -> dict[str, str | int | float | bool | None]:
    found = {}
    for key, name in (("title", "title"), ("author", "creator"), ("language", "language")):
        element = next(package.iter(f"{{http://purl.org/dc/elements/1.1/}}{name}"), None)
        if element is not None and element.text and element.text.strip():
            found[key] = " ".join(element.text.split())
    return {**found}
