"""EPUB: chapters in the order of the spine."""

from __future__ import annotations

import pytest
from document_files import epub_members

from ragkit.errors import ReadError


def test_chapters_come_in_the_order_of_the_spine_with_their_headings(read):
    members = epub_members({"a": "<h1>Last</h1><p>end</p>", "b": "<h1>First</h1><p>start</p>"}, spine=["b", "a", "b"])
    document = read("a.epub", members).documents[0]
    assert document.text == "# First\n\nstart\n\n# Last\n\nend"
    assert document.metadata == {"title": "A Book", "author": "An Author", "language": "en"}


def test_a_chapter_without_a_heading_gets_its_title_from_the_navigation_page(read):
    manifest = '<item id="nav" href="nav.xhtml" media-type="application/xhtml+xml" properties="nav"/>'
    members = epub_members({"a": "<p>text</p>"}, spine=["nav", "a"], manifest=manifest)
    members["OPS/nav.xhtml"] = (
        b'<html xmlns="http://www.w3.org/1999/xhtml"><body><nav>'
        b'<a href="a.xhtml#x">The <i>first</i></a></nav></body></html>'
    )
    assert read("a.epub", members).documents[0].text == "# The first\n\ntext"


def test_a_chapter_without_a_heading_gets_its_title_from_the_ncx(read):
    manifest = '<item id="ncx" href="toc.ncx" media-type="application/x-dtbncx+xml"/>'
    members = epub_members({"a": "<p>text</p>"}, manifest=manifest)
    members["OPS/toc.ncx"] = (
        b'<ncx xmlns="http://www.daisy.org/z3986/2005/ncx/"><navMap><navPoint><navLabel><text>One</text></navLabel>'
        b'<content src="a.xhtml"/></navPoint></navMap></ncx>'
    )
    assert read("a.epub", members).documents[0].text == "# One\n\ntext"


def test_a_missing_chapter_is_a_warning(read):
    members = epub_members({"a": "<p>text</p>", "b": "<p>gone</p>"})
    del members["OPS/b.xhtml"]
    result = read("a.epub", members)
    assert result.documents[0].text == "text"
    assert result.warnings == ("1 chapters are missing from the archive: 'OPS/b.xhtml'",)


def test_chapters_outside_of_the_archive_are_not_read(read):
    manifest = '<item id="evil" href="../../../../etc/passwd" media-type="application/xhtml+xml"/>'
    members = epub_members({"a": "<p>text</p>"}, spine=["evil", "a"], manifest=manifest)
    assert read("a.epub", members).documents[0].text == "text"


def test_a_book_with_copy_protection_is_encrypted(read):
    members = epub_members({"a": "<p>text</p>"})
    members["META-INF/encryption.xml"] = (
        b'<encryption><EncryptionMethod Algorithm="http://www.w3.org/2001/04/xmlenc#aes128-cbc"/></encryption>'
    )
    with pytest.raises(ReadError) as caught:
        read("a.epub", members)
    assert caught.value.code == "encrypted"


def test_obfuscated_fonts_do_not_lock_a_book(read):
    members = epub_members({"a": "<p>text</p>"})
    members["META-INF/encryption.xml"] = (
        b'<encryption><EncryptionMethod Algorithm="http://www.idpf.org/2008/embedding"/></encryption>'
    )
    assert read("a.epub", members).documents[0].text == "text"


@pytest.mark.parametrize("part", ["META-INF/container.xml", "OPS/package.opf"])
def test_a_book_without_its_directory_is_corrupt(read, part):
    members = epub_members({"a": "<p>text</p>"})
    del members[part]
    with pytest.raises(ReadError) as caught:
        read("a.epub", members)
    assert caught.value.code == "corrupt"
