"""XML from untrusted archives: no entities, no external files, no network, bounded depth."""

from __future__ import annotations

from collections.abc import Iterator
from io import BytesIO
from typing import Any

from ragkit.errors import ReadError

_OPTIONS = {
    "resolve_entities": False,
    "load_dtd": False,
    "no_network": True,
    "dtd_validation": False,
    "huge_tree": False,  # libxml2 then refuses depth over 256 and amplified entities
    "remove_comments": True,
    "remove_pis": True,
}


def parse_xml(data: bytes, name: str) -> Any:
    """Return the root element of `data`; `name` says in errors where it is from.

    Raises:
        ReadError: `corrupt`, where it is not well-formed, nests too deeply, or declares entities.
    """
    from lxml import etree

    try:
        root = etree.fromstring(data, etree.XMLParser(**_OPTIONS))
    except etree.XMLSyntaxError as error:
        raise _not_xml(name, error) from error
    _refuse_entities(root, name)
    return root


def iterate_xml(data: bytes, name: str) -> Iterator[tuple[str, Any]]:
    """Yield `("start" | "end", element)` while parsing.

    Raises:
        ReadError: as `parse_xml`.
    """
    from lxml import etree

    events = etree.iterparse(BytesIO(data), events=("start", "end"), **_OPTIONS)
    first = True
    try:
        for event, element in events:
            if first:
                _refuse_entities(element, name)
                first = False
            yield event, element
    except etree.XMLSyntaxError as error:
        raise _not_xml(name, error) from error


def _refuse_entities(root: Any, name: str) -> None:
    dtd = root.getroottree().docinfo.internalDTD
    if dtd is not None and next(iter(dtd.iterentities()), None) is not None:
        raise ReadError(f"{name!r} declares XML entities, which are not expanded", code="corrupt")


def _not_xml(name: str, error: Exception) -> ReadError:
    return ReadError(f"{name!r} is not readable as XML: {error}", code="corrupt")
