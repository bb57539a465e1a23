"""PDF: text with page spans, and a clear reason where there is none."""

from __future__ import annotations

import pytest
from document_files import IMAGE_PAGE, pdf_bytes

from ragkit.errors import ReadError
from ragkit.readers import ReadLimits
from ragkit.readers.pdf import _joined_words


def code_of(read, content, name="a.pdf", **named):
    with pytest.raises(ReadError) as caught:
        read(name, content, **named)
    return caught.value.code


def test_every_page_has_the_span_of_its_text(read):
    document = read("a.pdf", pdf_bytes(["First page.\nLine two", "Second (page)", "Third"])).documents[0]
    assert [(page.number, document.text[page.char_start : page.char_stop]) for page in document.pages] == [
        (1, "First page.\nLine two"),
        (2, "Second (page)"),
        (3, "Third"),
    ]
    assert document.page_at(document.text.index("Second")) == 2


def test_pages_without_text_have_no_span_and_do_not_shift_the_numbers(read):
    result = read("a.pdf", pdf_bytes(["one", "", "three"]))
    assert [page.number for page in result.documents[0].pages] == [1, 3]
    assert result.documents[0].metadata["page_count"] == 3


def test_the_title_is_metadata(read):
    assert read("a.pdf", pdf_bytes(["x y z"], title="The title")).documents[0].metadata["title"] == "The title"


@pytest.mark.parametrize(
    ("pages", "code"),
    [([IMAGE_PAGE], "needs_ocr"), ([IMAGE_PAGE, ""], "needs_ocr"), (["", ""], "empty"), ([], "corrupt")],
)
def test_a_pdf_without_text_says_why(read, pages, code):
    assert code_of(read, pdf_bytes(pages)) == code


def test_pictures_among_text_are_named_in_a_warning(read):
    assert read("a.pdf", pdf_bytes(["text", IMAGE_PAGE, "text", IMAGE_PAGE])).warnings == (
        "pages without text that may be scans: 2, 4",
    )


def test_a_pdf_that_needs_a_password_is_encrypted(read):
    assert code_of(read, pdf_bytes(["secret"], password="open sesame")) == "encrypted"


def test_an_empty_password_is_no_obstacle(read):
    assert read("a.pdf", pdf_bytes(["open to all"], password="")).documents[0].text == "open to all"


@pytest.mark.parametrize("cut", [20, 200, 400])
def test_a_pdf_that_is_cut_short_is_corrupt(read, cut):
    assert code_of(read, pdf_bytes(["some text"])[:cut]) == "corrupt"


def test_a_pdf_under_a_wrong_name_is_read(read):
    assert read("a.txt", pdf_bytes(["found anyway"])).documents[0].text == "found anyway"


def test_a_text_over_the_limit_is_too_large(read):
    content = pdf_bytes(["a line of text"] * 10)
    assert code_of(read, content, limits=ReadLimits(max_text_bytes=50)) == "too_large"


@pytest.mark.parametrize(
    ("page", "expected"),
    [
        ("the informa\x02tion is here; information", "the information is here; information"),
        ("stock\x02based pay, stock-based pay", "stock-based pay, stock-based pay"),
        ("credit\x02financing of credit and financing", "credit-financing of credit and financing"),
        ("Video\x02On demand", "Video-On demand"),
        ("a zyx\x02wvu b", "a zyxwvu b"),
        ("tax\ufffegain and tax and gain", "tax-gain and tax and gain"),
        ("bell\x07 and \x1fcontrol\x9f", "bell and control"),
    ],
)
def test_line_end_hyphens_are_resolved_by_the_rest_of_the_text(page, expected):
    assert _joined_words([page]) == [expected]


def test_a_million_letters_without_a_break_are_searched_once():
    assert _joined_words(["x" * 1_000_000, "a\x02b"]) == ["x" * 1_000_000, "ab"]


def test_wrapped_sentences_are_joined_and_tables_are_not():
    page = "This sentence is broken at the end of a\nline in the middle.\nRevenue 1,234\nCost 567\nshort\nwords"
    assert _joined_words([page]) == [
        "This sentence is broken at the end of a line in the middle.\nRevenue 1,234\nCost 567\nshort\nwords"
    ]
