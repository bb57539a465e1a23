"""Tables are found with their rows and header."""

from __future__ import annotations

import pytest

from ragkit.chunking.tables import find_tables, table_header

MARKDOWN = "Text.\n\n| name | size |\n|---|--:|\n| a | 1 |\n| b | 2 |\n\nMore | text.\n"
HTML = "<p>x</p><table><tr><th>name</th><th>the&nbsp;size</th></tr><tr><td>a</td></tr><tr><td>b</td></tr></table>y"


def test_a_markdown_table_has_its_header_and_rows():
    (table,) = find_tables(MARKDOWN)
    assert table.header == "name | size"
    assert [MARKDOWN[row : row + 5] for row in table.rows] == ["| a |", "| b |"]
    assert MARKDOWN[table.char_start : table.char_stop].count("\n") == 4


def test_an_html_table_has_its_header_and_rows():
    (table,) = find_tables(HTML)
    assert table.header == "name | the size"
    assert [HTML[row : row + 9] for row in table.rows] == ["<tr><td>a", "<tr><td>b"]


def test_a_table_inside_a_table_belongs_to_the_outer_one():
    text = "<table><tr><td>a</td></tr><tr><td><table><tr><td>b</td></tr></table></td></tr></table>"
    assert [(table.char_start, table.char_stop) for table in find_tables(text)] == [(0, len(text))]


def test_the_header_applies_to_rows_alone():
    tables = find_tables(MARKDOWN)
    assert table_header(tables, MARKDOWN.index("| b")) == "name | size"
    assert table_header(tables, MARKDOWN.index("| name")) is None
    assert table_header(tables, MARKDOWN.index("More")) is None
    assert table_header(tables, 0) is None


@pytest.mark.parametrize("text", ["", "a | b\n", "<table>", "</table>", "|---|\n", "<table></table>"])
def test_text_without_a_whole_table_has_none(text):
    assert find_tables(text) == []


def test_lines_of_many_spaces_around_pipes_are_read_in_linear_time():
    blank = " " * 100_000
    assert find_tables(f"{blank}\n|\n---{blank}x\n{blank}y\n") == []


def test_a_markdown_table_with_crlf_has_its_header_and_rows():
    text = MARKDOWN.replace("\n", "\r\n")
    (table,) = find_tables(text)
    assert table.header == "name | size"
    assert [text[row : row + 5] for row in table.rows] == ["| a |", "| b |"]
