"""Makes small documents of every kind that readers meet, sound and broken, without any library for them."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

IMAGE_PAGE = "<image>"
_PASSWORD_PAD = bytes.fromhex("28BF4E5E4E758A4164004E56FFFA01082E2E00B6D0683E802F0CA9FE6453697A")
_WORD = 'xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main"'


def pdf_bytes(pages: Sequence[str], *, password: str | None = None, title: str | None = None) -> bytes:
    """A PDF with one text line per line of each page; `IMAGE_PAGE` is a page that is a picture, "" an empty one."""
    kids = " ".join(f"{10 + 2 * index} 0 R" for index in range(len(pages)))
    image = "/Type /XObject /Subtype /Image /Width 1 /Height 1 /ColorSpace /DeviceGray /BitsPerComponent 8"
    entries: dict[int, str] = {
        1: "<< /Type /Catalog /Pages 2 0 R >>",
        2: f"<< /Type /Pages /Kids [{kids}] /Count {len(pages)} >>",
        3: "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica /Encoding /WinAnsiEncoding >>",
    }
    streams: dict[int, tuple[str, bytes]] = {4: (image, b"\x80")}
    for index, text in enumerate(pages):
        entries[10 + 2 * index] = (
            f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents {11 + 2 * index} 0 R "
            "/Resources << /Font << /F1 3 0 R >> /XObject << /I1 4 0 R >> >> >>"
        )
        streams[11 + 2 * index] = ("", _page_content(text))
    trailer = "/Root 1 0 R"
    key = None
    if title is not None:
        entries[5] = f"<< /Title ({title}) >>"
        trailer += " /Info 5 0 R"
    if password is not None:
        entries[6], identity, key = _encryption(password.encode())
        trailer += f" /Encrypt 6 0 R /ID [<{identity}> <{identity}>]"
    objects = {number: entry.encode("latin-1") for number, entry in entries.items()}
    objects.update({number: _stream(number, entry, data, key) for number, (entry, data) in streams.items()})
    return _assembled(objects, trailer)


def docx_bytes(
    body: str,
    *,
    styles: str = "",
    parts: Mapping[str, str | bytes] | None = None,
    compression: int = zipfile.ZIP_DEFLATED,
) -> dict[str, bytes]:
    """The members of a Word document whose body is `body`."""
    members: dict[str, str | bytes] = {
        "[Content_Types].xml": '<Types xmlns="http://schemas.openxmlformats.org/package/2006/content-types"/>',
        "word/document.xml": f"<w:document {_WORD}><w:body>{body}</w:body></w:document>",
    }
    if styles:
        members["word/styles.xml"] = f"<w:styles {_WORD}>{styles}</w:styles>"
    members.update(parts or {})
    return {name: data if isinstance(data, bytes) else data.encode() for name, data in members.items()}


def word_part(root: str, inner: str) -> str:
    return f"<w:{root} {_WORD}>{inner}</w:{root}>"


def paragraph(text: str, properties: str = "") -> str:
    given = f"<w:pPr>{properties}</w:pPr>" if properties else ""
    return f'<w:p>{given}<w:r><w:t xml:space="preserve">{text}</w:t></w:r></w:p>'


def epub_members(
    chapters: Mapping[str, str], *, spine: Sequence[str] | None = None, manifest: str = ""
) -> dict[str, bytes]:
    """The members of a book with the given XHTML bodies, in the order of `spine`."""
    items = "".join(f'<item id="{name}" href="{name}.xhtml" media-type="application/xhtml+xml"/>' for name in chapters)
    order = "".join(f'<itemref idref="{name}"/>' for name in (spine or list(chapters)))
    package = (
        '<package xmlns="http://www.idpf.org/2007/opf"><metadata xmlns:dc="http://purl.org/dc/elements/1.1/">'
        "<dc:title>A Book</dc:title><dc:creator>An Author</dc:creator><dc:language>en</dc:language></metadata>"
        f"<manifest>{items}{manifest}</manifest><spine>{order}</spine></package>"
    )
    container = (
        '<container xmlns="urn:oasis:names:tc:opendocument:xmlns:container"><rootfiles>'
        '<rootfile full-path="OPS/package.opf"/></rootfiles></container>'
    )
    members = {"mimetype": b"application/epub+zip", "META-INF/container.xml": container.encode()}
    members["OPS/package.opf"] = package.encode()
    for name, body in chapters.items():
        members[f"OPS/{name}.xhtml"] = (
            f'<html xmlns="http://www.w3.org/1999/xhtml"><head><title>x</title></head><body>{body}</body></html>'.encode()
        )
    return members


def write_zip(path: Path, members: Mapping[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            method = zipfile.ZIP_STORED if name == "mimetype" else zipfile.ZIP_DEFLATED
            archive.writestr(name, data, compress_type=method)
    return path


def _page_content(text: str) -> bytes:
    if text == IMAGE_PAGE:
        return b"q 612 0 0 792 0 0 cm /I1 Do Q"
    lines = []
    for line in text.split("\n") if text else []:
        escaped = line.replace("\\", r"\\").replace("(", r"\(").replace(")", r"\)")
        lines.append(b"(" + escaped.encode("cp1252") + b") Tj T*")
    return b"BT /F1 12 Tf 14 TL 72 720 Td " + b" ".join(lines) + b" ET" if lines else b""


def _stream(number: int, entries: str, data: bytes, key: bytes | None) -> bytes:
    if key is not None:  # algorithm 3.1
        data = _rc4(hashlib.md5(key + number.to_bytes(3, "little") + b"\0\0").digest()[:10], data)
    return f"<< {entries} /Length {len(data)} >>\nstream\n".encode() + data + b"\nendstream"


def _assembled(objects: Mapping[int, bytes], trailer: str) -> bytes:
    out = bytearray(b"%PDF-1.4\n")
    offsets = {}
    for number in sorted(objects):
        offsets[number] = len(out)
        out += f"{number} 0 obj\n".encode() + objects[number] + b"\nendobj\n"
    table = len(out)
    size = max(objects) + 1
    out += f"xref\n0 {size}\n0000000000 65535 f \n".encode()
    for number in range(1, size):
        used = number in offsets
        out += f"{offsets.get(number, 0):010d} {'00000' if used else '65535'} {'n' if used else 'f'} \n".encode()
    out += f"trailer\n<< /Size {size} {trailer} >>\nstartxref\n{table}\n%%EOF\n".encode()
    return bytes(out)


def _encryption(password: bytes) -> tuple[str, str, bytes]:
    """The dictionary of the standard handler, revision 2 (PDF 1.4, algorithms 3.2 to 3.4), the file id and the key."""
    identity = hashlib.md5(b"file").digest()
    padded = (password + _PASSWORD_PAD)[:32]
    permissions = -4
    owner = _rc4(hashlib.md5(padded).digest()[:5], padded)
    key = hashlib.md5(padded + owner + permissions.to_bytes(4, "little", signed=True) + identity).digest()[:5]
    user = _rc4(key, _PASSWORD_PAD)
    entry = f"<< /Filter /Standard /V 1 /R 2 /O <{owner.hex()}> /U <{user.hex()}> /P {permissions} >>"
    return entry, identity.hex(), key


def _rc4(key: bytes, data: bytes) -> bytes:
    state, swap = list(range(256)), 0
    for index in range(256):
        swap = (swap + state[index] + key[index % len(key)]) % 256
        state[index], state[swap] = state[swap], state[index]
    out, left, right = bytearray(), 0, 0
    for byte in data:
        left = (left + 1) % 256
        right = (right + state[left]) % 256
        state[left], state[right] = state[right], state[left]
        out.append(byte ^ state[(state[left] + state[right]) % 256])
    return bytes(out)
