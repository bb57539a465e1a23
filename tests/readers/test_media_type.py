"""What a file is, whatever it is called."""

from __future__ import annotations

import random

import pytest
from document_files import docx_bytes, epub_members, paragraph, pdf_bytes, write_zip

from ragkit.readers.media_type import MediaType, sniff

HTML = b"<!DOCTYPE html><html><head><title>x</title></head><body><p>x</body></html>"


@pytest.mark.parametrize(
    ("head", "name", "expected"),
    [
        (b"plain words", "a.txt", MediaType.TEXT),
        (b"plain words", "", MediaType.TEXT),
        (b"plain words", "README", MediaType.TEXT),
        (b"# Title", "a.md", MediaType.MARKDOWN),
        (b"a,b\n1,2\n", "a.csv", MediaType.CSV),
        (b"a\tb\n1\t2\n", "a.TSV", MediaType.CSV),
        (b'{"text": "x"}\n', "a.jsonl", MediaType.JSONL),
        (b'{"text": "x"}\n{"text": "y"}\n', "", MediaType.JSONL),
        (b'{\n "text": "x"\n}\n', "", MediaType.TEXT),
        (b'{"text": "x"}', "a.json", MediaType.TEXT),
        (HTML, "a.html", MediaType.HTML),
        (HTML, "a.pdf", MediaType.HTML),
        (HTML, "a.txt", MediaType.HTML),
        (HTML, "", MediaType.HTML),
        (b"\xef\xbb\xbf  \n<!-- c -->\n<HTML lang=en>", "a", MediaType.HTML),
        (b'<?xml version="1.0"?>\n<!DOCTYPE html PUBLIC "x">', "a.xml", MediaType.HTML),
        ("<html><body>x".encode("utf-16"), "a.txt", MediaType.HTML),
        (b"<p>a fragment", "a.html", MediaType.HTML),
        (b"<p align=center>logo</p>\n\n# Title", "README.md", MediaType.MARKDOWN),
        (b'<?xml version="1.0"?><note/>', "a.xml", MediaType.TEXT),
        (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "a.svg", MediaType.IMAGE),
        (pdf_bytes(["x"]), "a.txt", MediaType.PDF),
        (pdf_bytes(["x"]), "", MediaType.PDF),
        (b"\r\n" + pdf_bytes(["x"]), "a.html", MediaType.PDF),
        (b"printer preamble\n" + pdf_bytes(["x"]), "a.pdf", MediaType.PDF),
        (b"A PDF file begins with %PDF-1.4 and then", "notes.txt", MediaType.TEXT),
        (b"PAR1\x15\x04", "a.csv", MediaType.PARQUET),
        (b"\x89PNG\r\n\x1a\n\0\0", "a.md", MediaType.IMAGE),
        (b"\x1f\x8b\x08\0", "a.txt", MediaType.BINARY),
        (b"\x7fELF\x02\x01", "a.txt", MediaType.BINARY),
        (b"{\\rtf1 text}", "a.txt", MediaType.BINARY),
        (b"RIFF\x24\0\0\0WAVE", "a.txt", MediaType.BINARY),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + b"\0" * 100, "a.docx", MediaType.OLE),
        ("Grüße".encode("cp1252"), "a.txt", MediaType.TEXT),
        ("Hello there, text.".encode("utf-16-le"), "a.txt", MediaType.TEXT),
        ("Привет, это текст.".encode("utf-16-be"), "a.txt", MediaType.TEXT),
        (b"a line with one NUL \0 in it, which is odd but text", "a.txt", MediaType.TEXT),
        (b"", "a.txt", MediaType.TEXT),
    ],
)
def test_content_decides_and_names_break_ties_among_text(head, name, expected):
    assert sniff(head, name) is expected


def test_a_thousand_comments_are_not_paired_in_every_way():
    assert sniff(b"<!---->" * 1000 + b"\n<note>", "a.xml") is MediaType.TEXT
    assert sniff(b"<!---->" * 1000 + b"\n<html>", "a.xml") is MediaType.HTML


@pytest.mark.parametrize("seed", range(20))
def test_random_bytes_are_never_text(seed):
    assert sniff(random.Random(seed).randbytes(4096), "a.txt") is MediaType.BINARY


@pytest.mark.parametrize("name", ["a.docx", "a.zip", "a.txt", ""])
def test_a_word_document_is_known_by_what_is_inside(make, name, tmp_path):
    head = write_zip(tmp_path / "x", docx_bytes(paragraph("x"))).read_bytes()
    assert sniff(head, name) is MediaType.DOCX


def test_a_book_is_known_by_its_first_member(tmp_path):
    assert sniff(write_zip(tmp_path / "x", epub_members({"a": "x"})).read_bytes(), "a.zip") is MediaType.EPUB


def test_a_zip_archive_whose_head_does_not_tell_is_looked_up_at_its_end(read):
    members = {"zzz.bin": random.Random(1).randbytes(200_000), **docx_bytes(paragraph("found at the end"))}
    assert read("a.dat", members).documents[0].text == "found at the end"


def test_a_spreadsheet_is_no_document(tmp_path):
    head = write_zip(tmp_path / "x", {"[Content_Types].xml": b"", "xl/workbook.xml": b""}).read_bytes()
    assert sniff(head, "a.docx") is MediaType.BINARY


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_chinese_without_a_single_space_is_text(encoding):
    text = "人人生而自由在尊严和权利上一律平等。他们赋有理性和良心并应以兄弟关系的精神相对待。\n"
    assert sniff(text.encode(encoding), "a.txt") is MediaType.TEXT
