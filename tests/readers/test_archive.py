"""Archives that are built to hurt are refused before they do."""

from __future__ import annotations

import struct
import zipfile
from pathlib import Path

import pytest
from document_files import docx_bytes, epub_members, paragraph, word_part, write_zip

from ragkit.errors import ReadError
from ragkit.readers import ReadLimits
from ragkit.readers.archive import SafeArchive, member_path

BOMB = b"\0" * (8 << 20)


def code_of(path, limits=None, name="a"):
    with pytest.raises(ReadError) as caught, SafeArchive(path, limits or ReadLimits()) as archive:
        archive.read(name)
    return caught.value.code


def test_a_member_is_read(tmp_path):
    with SafeArchive(write_zip(tmp_path / "a.zip", {"a": b"content"}), ReadLimits()) as archive:
        assert archive.read("a") == b"content"
        assert archive.names == {"a"}


def test_a_member_that_unpacks_to_a_thousand_times_its_size_is_refused(tmp_path):
    assert code_of(write_zip(tmp_path / "a.zip", {"a": BOMB})) == "too_large"


def test_a_bomb_is_stopped_at_the_ceiling_and_not_after_it(tmp_path, monkeypatch):
    path = write_zip(tmp_path / "a.zip", {"a": BOMB * 8})
    sizes = []
    check = SafeArchive._check
    monkeypatch.setattr(
        SafeArchive, "_check", lambda self, name, size, packed: (sizes.append(size), check(self, name, size, packed))
    )
    assert code_of(path) == "too_large"
    assert sizes[-1] < 200 * path.stat().st_size + (1 << 20) < 16 << 20


def test_a_size_that_the_directory_lies_about_does_not_help(tmp_path):
    path = write_zip(tmp_path / "a.zip", {"a": b"x" * 5000})
    data = bytearray(path.read_bytes())
    place = data.rfind(b"PK\x01\x02")
    data[place + 24 : place + 28] = struct.pack("<I", 10)
    path.write_bytes(data)
    assert code_of(path, ReadLimits(max_member_bytes=100)) in ("too_large", "corrupt")


def test_the_members_count_together(tmp_path):
    path = write_zip(tmp_path / "a.zip", {str(n): bytes(range(256)) * 4 for n in range(10)})
    with SafeArchive(path, ReadLimits(max_archive_bytes=5000)) as archive:
        for name in "0123":
            archive.read(name)
        with pytest.raises(ReadError) as caught:
            archive.read("4")
    assert caught.value.code == "too_large"


def test_too_many_members_are_refused_by_count(tmp_path):
    path = write_zip(tmp_path / "a.zip", {str(n): b"" for n in range(101)})
    assert code_of(path, ReadLimits(max_members=100)) == "too_large"


def test_a_directory_of_a_million_members_is_not_even_parsed(tmp_path, monkeypatch):
    entry = struct.pack("<4s6H3L5H2L", b"PK\x01\x02", 20, 20, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0) + b"a"
    count = 1_000_000
    directory = entry * count
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, len(directory), 0, 0)
    path = tmp_path / "a.zip"
    path.write_bytes(directory + end)
    monkeypatch.setattr(zipfile, "ZipFile", None)
    assert code_of(path) == "too_large"


def test_an_encrypted_member_is_encrypted(tmp_path):
    path = write_zip(tmp_path / "a.zip", {"a": b"x"})
    data = bytearray(path.read_bytes())
    for magic, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.find(magic) + offset] |= 1
    path.write_bytes(data)
    assert code_of(path) == "encrypted"


def test_other_compressions_are_not_unpacked(tmp_path):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("a", b"x")
    assert code_of(path) == "unsupported"


@pytest.mark.parametrize("damage", [slice(40, 60), slice(-30, -20), slice(-22, None)])
def test_a_damaged_archive_is_corrupt(tmp_path, damage):
    path = write_zip(tmp_path / "a.zip", {"a": bytes(range(256)) * 20})
    data = bytearray(path.read_bytes())
    data[damage] = b"\xff" * len(data[damage])
    path.write_bytes(data)
    assert code_of(path) == "corrupt"


@pytest.mark.parametrize(
    ("base", "reference", "member"),
    [
        ("OPS/package.opf", "ch/1.xhtml#top", "OPS/ch/1.xhtml"),
        ("OPS/package.opf", "../cover.xhtml", "cover.xhtml"),
        ("OPS/package.opf", "a%20b.xhtml", "OPS/a b.xhtml"),
        ("OPS/package.opf", "../../etc/passwd", None),
        ("OPS/package.opf", "%2e%2e/%2e%2e/etc/passwd", None),
        ("OPS/package.opf", "/etc/passwd", None),
        ("OPS/package.opf", "http://example.org/x", None),
        ("OPS/package.opf", "#top", None),
    ],
)
def test_a_reference_never_leaves_the_archive(base, reference, member):
    assert member_path(base, reference) == member


def test_members_that_point_upwards_write_nothing(read, tmp_path):
    before = {path.name for path in tmp_path.parent.iterdir()}
    members = {**docx_bytes(paragraph("text")), "../escaped.txt": b"x", "/tmp/ragkit-escaped.txt": b"x"}
    assert read("a.docx", members).documents[0].text == "text"
    assert {path.name for path in tmp_path.parent.iterdir()} == before
    assert not Path("/tmp/ragkit-escaped.txt").exists()


def test_archives_within_an_archive_are_not_opened(read, tmp_path):
    inner = write_zip(tmp_path / "inner.zip", {"bomb": BOMB}).read_bytes()
    for level in range(4):
        inner = write_zip(tmp_path / f"{level}.zip", {f"{n}.zip": inner for n in range(16)}).read_bytes()
    assert read("a.docx", {**docx_bytes(paragraph("text")), "word/embeddings/x.zip": inner}).documents[0].text == "text"
    with pytest.raises(ReadError) as caught:
        read("42.zip", {f"{n}.zip": inner for n in range(4)})
    assert caught.value.code == "unsupported"


def bomb_cases():
    laughs = '<!DOCTYPE x [<!ENTITY a "ha">' + "".join(
        f'<!ENTITY {chr(98 + n)} "{f"&{chr(97 + n)};" * 10}">' for n in range(9)
    )
    external = '<!DOCTYPE x [<!ENTITY x SYSTEM "file:///etc/passwd">]>'
    deep = word_part("document", "<w:body>" + "<w:sdt>" * 1000 + "</w:sdt>" * 1000 + "</w:body>")
    return {
        "billion laughs": laughs + "]>" + word_part("document", "<w:p><w:r><w:t>&j;</w:t></w:r></w:p>"),
        "external entity": external + word_part("document", "<w:p><w:r><w:t>&x;</w:t></w:r></w:p>"),
        "a thousand levels": deep,
        "not well-formed": "<w:document",
    }


@pytest.mark.parametrize("case", bomb_cases())
def test_hostile_xml_is_corrupt(read, case):
    with pytest.raises(ReadError) as caught:
        read("a.docx", docx_bytes("", parts={"word/document.xml": bomb_cases()[case]}))
    assert caught.value.code == "corrupt"


def test_an_external_dtd_is_not_fetched(read):
    part = '<!DOCTYPE x SYSTEM "http://127.0.0.1:9/x.dtd">' + word_part("document", paragraph("text"))
    assert read("a.docx", docx_bytes("", parts={"word/document.xml": part})).documents[0].text == "text"


def test_a_bomb_inside_a_document_is_too_large(read):
    with pytest.raises(ReadError) as caught:
        read("a.docx", docx_bytes("", parts={"word/document.xml": b"<x>" + b" " * (64 << 20) + b"</x>"}))
    assert caught.value.code == "too_large"


def test_entities_in_the_container_of_a_book_are_corrupt(read):
    members = epub_members({"a": "<p>x</p>"})
    members["META-INF/container.xml"] = b'<!DOCTYPE c [<!ENTITY x "y">]>' + members["META-INF/container.xml"]
    with pytest.raises(ReadError) as caught:
        read("a.epub", members)
    assert caught.value.code == "corrupt"
