"""Turns bytes into text: byte order marks, UTF-8, UTF-16 without a mark, and older encodings by their statistics.

Nothing is dropped. What cannot be decoded becomes U+FFFD and is counted in a warning.
"""

from __future__ import annotations

import codecs
import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path

from ragkit.errors import ReadError

_MARKS: tuple[tuple[bytes, str], ...] = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
# C0 controls that real text does not hold; tab, newline, form feed, backspace and escape do occur.
_CONTROL = bytes(byte for byte in range(32) if byte not in b"\t\n\r\f\b\x1b") + b"\x7f"
_UNPRINTABLE = frozenset(("Cc", "Cn", "Co", "Cs"))
# Random bytes hold 10% control characters; text with the odd form feed or NUL stays far below this.
_MAX_CONTROL_SHARE = 0.05
_SAMPLE = 32 * 1024
_BLOCK = 1 << 20
_REPLACEMENT = "\ufffd"
_SURROGATE = re.compile("[\ud800-\udfff]")
_ENCODED_SURROGATE = re.compile(rb"\xed[\xa0-\xbf][\x80-\xbf]")
_HIGH_BYTE = re.compile(rb"[\x80-\xff]")
_HALF_LINE = 4096
# What is tried for bytes that are not UTF-8, Western first; latin-1 accepts everything and comes last.
_LEGACY = (
    "cp1252",
    "cp1250",
    "cp1251",
    "koi8_r",
    "cp1253",
    "cp1254",
    "cp1255",
    "cp1256",
    "cp932",
    "euc_jp",
    "gb18030",
    "big5",
    "cp949",
    "mac_roman",
    "cp437",
)
# What a document may name for itself. UTF-8 and UTF-16 are decided by the bytes; escapes and the like are no encodings.
_DECLARABLE = ("ascii", "iso8859", "koi8", "cp", "mac", "gb", "hz", "big5", "euc", "iso2022", "shift_jis", "tis")
_BAD_SHARE = 0.2
_FEW_BYTES = 6
_SLACK = 0.05
_SIGN_IN_WORD = re.compile(r"(?<=[^\W\d_])[¹³¿¯¥£]")


@dataclass(frozen=True, slots=True)
class Encoding:
    """A Python codec name, and the length in bytes of the mark that stands before the text."""

    name: str
    mark: int = 0


@dataclass(frozen=True, slots=True)
class Decoded:
    """Text that is valid Unicode without NUL, the encoding it was in, and what had to be replaced."""

    text: str
    encoding: Encoding
    warnings: tuple[str, ...] = ()

    @property
    def metadata(self) -> dict[str, str | int | float | bool | None]:
        """The encoding as document metadata."""
        facts: dict[str, str | int | float | bool | None] = {"encoding": self.encoding.name}
        if self.encoding.mark:
            facts["byte_order_mark"] = True
        return facts


def decode(data: bytes | bytearray, declared: str | None = None) -> Decoded:
    """Return the text of `data`, newlines untouched and without its byte order mark.

    Args:
        data: the whole content.
        declared: the encoding that the document names for itself; used where the bytes are not plain UTF-8.

    Raises:
        ReadError: `encoding`, where more than a fifth of the text could not be decoded.
    """
    marked = _marked(data)
    if marked is not None:
        return _decoded(data, marked)
    utf16 = guess_utf16(data[: 2 * _SAMPLE])
    if utf16:
        return _decoded(data, Encoding(utf16))
    declared = _known(declared)
    if declared is not None and declared.startswith("iso2022"):  # seven-bit: would pass for ASCII
        return _decoded(data, Encoding(declared))
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        return _decoded(data, Encoding(declared or _detect(data)))
    return _cleaned(text, Encoding("utf-8"), replaced=0)


def detect_file(path: Path) -> Encoding:
    """Return the encoding of a file of any size, reading it in blocks."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    with path.open("rb") as file:
        head = file.read(2 * _SAMPLE)
        marked = _marked(head)
        if marked is not None:
            return marked
        utf16 = guess_utf16(head)
        if utf16:
            return Encoding(utf16)
        file.seek(0)
        while block := file.read(_BLOCK):
            try:
                decoder.decode(block)
            except UnicodeDecodeError:
                return Encoding(_detect(block))
    return Encoding("utf-8")


def head_text(head: bytes) -> str:
    """Return a rough decoding of the first bytes of a file, good enough to recognise markup."""
    marked = _marked(head)
    if marked is not None:
        return head[marked.mark :].decode(marked.name, "replace")
    return head.decode(guess_utf16(head) or "latin-1", "replace")


def clean(text: str) -> tuple[str, tuple[str, ...]]:
    """Return `text` with NUL and lone surrogates replaced by U+FFFD one for one, and a warning for each kind."""
    text, warnings = _without_nul(text)
    try:
        if not text.isascii():
            text.encode("utf-8")
    except UnicodeEncodeError:
        text, lone = _SURROGATE.subn(_REPLACEMENT, text)
        warnings = (*warnings, f"{lone} lone surrogates were replaced by U+FFFD")
    return text, warnings


def _without_nul(text: str) -> tuple[str, tuple[str, ...]]:
    nul = text.count("\0")
    if not nul:
        return text, ()
    return text.replace("\0", _REPLACEMENT), (f"{nul} NUL characters were replaced by U+FFFD",)


def looks_binary(head: bytes) -> bool:
    """Return whether the first bytes of a file are no text in any encoding."""
    marked = _marked(head)
    if marked is not None:
        text = head_text(head)
        return _unprintable(text) > _MAX_CONTROL_SHARE * len(text)
    return control_share(head) > _MAX_CONTROL_SHARE and guess_utf16(head) is None


def control_share(head: bytes) -> float:
    """Return the share of bytes that are control characters which text does not hold."""
    if not head:
        return 0.0
    return 1 - len(head.translate(None, _CONTROL)) / len(head)


def guess_utf16(head: bytes | bytearray) -> str | None:
    """Return `utf-16-le` or `utf-16-be` where bytes without a mark look like it, else None.

    The right byte order is the one that shows spaces, line ends and full stops; a wrong one turns them into rare
    characters of other scripts. Text in UTF-16 always holds NUL or other control bytes, which is what is asked first;
    only ideographs hold few, and those are not valid UTF-8, so that an odd NUL in plain text is no sign of UTF-16.
    """
    sample = bytes(head[: min(len(head), 8192) & ~1])
    controls = control_share(sample)
    if len(sample) < 4 or controls < 0.02 or (controls < 0.1 and _is_utf8(sample)):
        return None
    best, most = None, 0.0
    for name in ("utf-16-le", "utf-16-be"):
        text = sample.decode(name, "replace")
        odd = _unprintable(text)
        common = (
            sum(text.count(char) for char in " \n.,\u3002\u3001\u3000") + sum("0" <= char <= "z" for char in text) / 4
        )
        if odd * 50 <= len(text) and common > most:
            best, most = name, common
    return best if most * 100 >= len(sample) // 2 else None


def _is_utf8(sample: bytes) -> bool:
    """Return whether `sample`, which may end within a character, is valid UTF-8."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(sample)
    except UnicodeDecodeError:
        return False
    return True


def _unprintable(text: str) -> int:
    return sum(unicodedata.category(char) in _UNPRINTABLE and char not in "\t\n\r\f" for char in text)


def _marked(data: bytes | bytearray) -> Encoding | None:
    for mark, name in _MARKS:
        if data.startswith(mark):
            return Encoding(name, len(mark))
    return None


def _known(name: str | None) -> str | None:
    """Return Python's name for an encoding that a document names; Latin-1 is read as its superset, as browsers do."""
    try:
        found = codecs.lookup((name or "").strip()).name
    except (LookupError, ValueError):
        return None
    if not found.startswith(_DECLARABLE):
        return None
    return "cp1252" if found in ("iso8859-1", "ascii") else found


def _decoded(data: bytes | bytearray, encoding: Encoding) -> Decoded:
    """Return the text of `data` in a known encoding, replacements counted."""
    body = memoryview(data)[encoding.mark :] if encoding.mark else data
    try:
        return _cleaned(str(body, encoding.name), encoding, replaced=0)
    except UnicodeDecodeError:
        pass
    text = str(body, encoding.name, "replace")
    genuine = bytes(data).count(b"\xef\xbf\xbd") if encoding.name == "utf-8" else 0
    return _cleaned(text, encoding, replaced=text.count(_REPLACEMENT) - genuine)


def _cleaned(text: str, encoding: Encoding, replaced: int) -> Decoded:
    if replaced > _BAD_SHARE * len(text):
        raise ReadError(
            f"{replaced} of {len(text)} characters are not valid {encoding.name}; convert the file to UTF-8",
            code="encoding",
        )
    text, warnings = _without_nul(text)  # a codec never gives lone surrogates
    if replaced:
        warnings = (f"{replaced} byte sequences are not valid {encoding.name} and became U+FFFD", *warnings)
    return Decoded(text, encoding, warnings)


def _detect(data: bytes | bytearray) -> str:
    """Return the most plausible encoding of bytes that are not valid UTF-8."""
    sample = _ENCODED_SURROGATE.sub(b"", _non_ascii_sample(data))  # some writers put these into UTF-8
    text = sample.decode("utf-8", "replace")
    bad = text.count(_REPLACEMENT)
    good = sum(char > "\x7f" for char in text) - bad
    if good > 4 * bad or not bad:  # UTF-8 with a few broken places
        return "utf-8"
    return _legacy(sample)


def _non_ascii_sample(data: bytes | bytearray) -> bytes:
    """Return up to 32 KB of whole lines that hold bytes above 127: the only ones that tell encodings apart."""
    if len(data) <= _SAMPLE:
        return bytes(data)
    lines, length, place = [], 0, 0
    while length < _SAMPLE and (found := _HIGH_BYTE.search(data, place)) is not None:
        here = found.start()
        first = max(place, here - _HALF_LINE)
        start = max(first, data.rfind(b"\n", first, here) + 1)
        stop = data.find(b"\n", here, here + _HALF_LINE)
        place = min(len(data), here + _HALF_LINE) if stop < 0 else stop
        lines.append(bytes(data[start:place]))
        length += place - start + 1
    return b"\n".join(lines)


def _legacy(sample: bytes) -> str:
    """Return the best of the older encodings for `sample` by charset-normalizer's measure of disorder.

    It is cp1252, the commonest, where the bytes above 127 are too few to tell, where the best gives the same text, and
    where the best is hardly better and cp1252 does not put signs into words, as it does with central European text.
    """
    from charset_normalizer import from_bytes

    western = _western(sample)
    if western is not None and sum(byte > 127 for byte in sample) < _FEW_BYTES:
        return "cp1252"
    matches = from_bytes(sample, cp_isolation=list(_LEGACY), enable_fallback=False)
    best = matches.best()
    if best is None:
        return "latin-1" if western is None else "cp1252"
    slack = 0.0 if western is None or _SIGN_IN_WORD.search(western) else _SLACK
    for match in matches:
        if match.encoding == "cp1252" and match.chaos <= best.chaos and match.coherence >= best.coherence - slack:
            return "cp1252"
    return "cp1252" if western == sample.decode(best.encoding, "replace") else str(best.encoding)


def _western(sample: bytes) -> str | None:
    """Return `sample` read as cp1252, None where it cannot be."""
    try:
        return sample.decode("cp1252")
    except UnicodeDecodeError:
        return None
