"""DOCX: the main text in reading order."""

from __future__ import annotations

import pytest
from document_files import docx_bytes, paragraph, word_part

from ragkit.errors import ReadError

STYLES = (
    '<w:style w:styleId="berschrift2"><w:name w:val="heading 2"/></w:style>'
    '<w:style w:styleId="Mine"><w:name w:val="Mine"/><w:basedOn w:val="berschrift2"/></w:style>'
    '<w:style w:styleId="T"><w:name w:val="Title"/></w:style>'
    '<w:style w:styleId="Loop"><w:name w:val="Loop"/><w:basedOn w:val="Loop"/></w:style>'
)


def table(*rows):
    cells = ("".join(f"<w:tc>{cell}</w:tc>" for cell in row) for row in rows)
    return "<w:tbl>" + "".join(f"<w:tr>{row}</w:tr>" for row in cells) + "</w:tbl>"


def run(text, properties=""):
    return f'<w:r><w:rPr>{properties}</w:rPr><w:t xml:space="preserve">{text}</w:t></w:r>'


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (paragraph("one") + paragraph("two"), "one\n\ntwo"),
        ("<w:p>" + run("split ") + run("run") + run("s") + "</w:p>", "split runs"),
        (paragraph("A", '<w:pStyle w:val="T"/>') + paragraph("x"), "# A\n\nx"),
        (paragraph("A", '<w:pStyle w:val="berschrift2"/>'), "## A"),
        (paragraph("A", '<w:pStyle w:val="Mine"/>'), "## A"),
        (paragraph("A", '<w:pStyle w:val="Loop"/>'), "A"),
        (paragraph("A", '<w:outlineLvl w:val="2"/>'), "### A"),
        (
            paragraph("a", '<w:numPr><w:ilvl w:val="0"/><w:numId w:val="1"/></w:numPr>')
            + paragraph("b", '<w:numPr><w:ilvl w:val="1"/><w:numId w:val="1"/></w:numPr>'),
            "- a\n\n  - b",
        ),
        (paragraph("a", '<w:numPr><w:numId w:val="0"/></w:numPr>'), "a"),
        (
            paragraph("before")
            + table([paragraph("a"), paragraph("b")], [paragraph("1"), paragraph("2") + paragraph("3")])
            + paragraph("after"),
            "before\n\na | b\n1 | 2\n3\n\nafter",
        ),
        (table([paragraph("")] * 2, [paragraph("x")] * 2), "x | x"),
        ("<w:p><w:r><w:t>a</w:t><w:tab/><w:t>b</w:t><w:br/><w:t>c</w:t></w:r></w:p>", "a b\nc"),
        ("<w:p><w:pPr><w:tabs><w:tab/></w:tabs></w:pPr>" + run("x") + "</w:p>", "x"),
        ("<w:p>" + run("seen") + run("SECRET", "<w:vanish/>") + run(" too") + "</w:p>", "seen too"),
        ("<w:p>" + run("shown", '<w:vanish w:val="0"/>') + "</w:p>", "shown"),
        ("<w:p><w:del><w:r><w:delText>old</w:delText></w:r></w:del><w:ins>" + run("new") + "</w:ins></w:p>", "new"),
        ("<w:p><w:hyperlink>" + run("link") + "</w:hyperlink><w:r><w:instrText>PAGE</w:instrText></w:r></w:p>", "link"),
        (
            '<mc:AlternateContent xmlns:mc="http://schemas.openxmlformats.org/markup-compatibility/2006"><mc:Choice>'
            + paragraph("box")
            + "</mc:Choice><mc:Fallback>"
            + paragraph("box")
            + "</mc:Fallback></mc:AlternateContent>",
            "box",
        ),
        ("<w:sdt><w:sdtContent>" + paragraph("in a control") + "</w:sdtContent></w:sdt>", "in a control"),
        (paragraph("naïve 👨‍👩‍👧 &lt;tag&gt;"), "naïve 👨‍👩‍👧 <tag>"),
    ],
)
def test_the_body_becomes_lines(read, body, expected):
    assert read("a.docx", docx_bytes(body, styles=STYLES)).documents[0].text == expected


def test_notes_follow_the_text_without_their_separators(read):
    notes = (
        '<w:footnote w:type="separator"><w:p><w:r><w:t>---</w:t></w:r></w:p></w:footnote>'
        f"<w:footnote>{paragraph('A note.')}</w:footnote>"
    )
    members = docx_bytes(paragraph("Text."), parts={"word/footnotes.xml": word_part("footnotes", notes)})
    assert read("a.docx", members).documents[0].text == "Text.\n\nA note."


def test_title_and_author_are_metadata(read):
    core = (
        '<p:coreProperties xmlns:p="x" xmlns:dc="http://purl.org/dc/elements/1.1/">'
        "<dc:title> The\n title </dc:title><dc:creator>Ann</dc:creator></p:coreProperties>"
    )
    document = read("a.docx", docx_bytes(paragraph("x"), parts={"docProps/core.xml": core})).documents[0]
    assert document.metadata == {"title": "The title", "author": "Ann"}


def test_a_document_of_the_strict_kind_is_read(read):
    strict = '<w:document xmlns:w="http://purl.oclc.org/ooxml/wordprocessingml/main"><w:body><w:p><w:r><w:t>x y</w:t>'
    members = docx_bytes("", parts={"word/document.xml": strict + "</w:r></w:p></w:body></w:document>"})
    assert read("a.docx", members).documents[0].text == "x y"


def test_a_document_without_text_is_empty(read):
    with pytest.raises(ReadError) as caught:
        read("a.docx", docx_bytes(paragraph(" ")))
    assert caught.value.code == "empty"


def test_a_word_document_with_a_password_is_encrypted(read):
    content = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + b"\0" * 3000 + "EncryptedPackage".encode("utf-16-le") + b"\0" * 500
    with pytest.raises(ReadError) as caught:
        read("a.docx", content)
    assert caught.value.code == "encrypted"


def test_a_word_document_of_before_2007_is_unsupported_and_says_what_to_do(read):
    with pytest.raises(ReadError, match="save it as DOCX") as caught:
        read("a.doc", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + b"\0" * 3000)
    assert caught.value.code == "unsupported"
