"""HTML becomes what a reader would see, block by block."""

from __future__ import annotations

import pytest

from ragkit.readers.html import parse_html


def text_of(body):
    return parse_html(body).text


@pytest.mark.parametrize(
    ("markup", "expected"),
    [
        ("<p>one</p><p>two</p>", "one\n\ntwo"),
        ("<p>a  b\n\tc</p>", "a b c"),
        ("<p>bold<b>er</b> and <i>so</i>on</p>", "bolder and soon"),
        ("<p>one<br>two<br/>three", "one\ntwo\nthree"),
        ("<h1>Top</h1><p>x</p><h3>Sub <em>head</em></h3>y", "# Top\n\nx\n\n### Sub head\n\ny"),
        ("<h2></h2><p>x</p>", "x"),
        ("<ul><li>a</li><li>b<ul><li>c</li></ul></li><li></li></ul>z", "- a\n- b\n  - c\n\nz"),
        ("<ol><li>a<li>b</ol><ol start=5><li>e</ol>", "1. a\n2. b\n\n5. e"),
        ("<ul><li><p>a</p></li></ul>", "- a"),
        ("<dl><dt>term<dd>meaning</dl>", "term\nmeaning"),
        ("<table><tr><th>a<th>b<tr><td>1<td>2</table>", "a | b\n1 | 2"),
        ("<table><tr><td></td><td>x</td><td></td><td>y</td></tr></table>", "| x |  | y"),
        ("<table><tr><td>a</td></tr><tr><td></td><td>b</td></tr></table>", "a\n| b"),
        ("<table><tr><td><p>a</p><p>b</p></td><td><p>c</p></td></tr></table>", "a\nb | c"),
        ("<table><tr><td>a<td><td></table>z", "a\n\nz"),
        ("<pre>  def f():\n      return 1\n\n</pre><p>x", "  def f():\n      return 1\n\nx".strip()),
        ("<p>x</p><pre>a <b>b</b>\n  c</pre>", "x\n\na b\n  c"),
        ("<div>a</div><div>b</div>", "a\nb"),
        ("a<!-- no -->b<script>x()</script><style>p{}</style><template>t</template>", "ab"),
        ("<nav>menu</nav><main>text</main><div role=navigation>more</div>", "text"),
        ("<div class='navheader'>prev next</div><p>text</p>", "text"),
        ("<nav>only a menu</nav>", "only a menu"),
        ("<select><option>x</select><button>y</button>z", "z"),
        ("a&nbsp;b &amp; &lt;c&gt; &eacute;", "a b & <c> é"),
        ("soft\u00adhyphen zero\u200bwidth", "softhyphen zerowidth"),
        ("👨‍👩‍👧 עברית", "👨‍👩‍👧 עברית"),
        ("", ""),
        ("</p></div>stray", "stray"),
    ],
)
def test_markup_becomes_lines(markup, expected):
    assert text_of(markup) == expected


@pytest.mark.parametrize(
    "element",
    [
        "<p hidden>SECRET</p>",
        "<p aria-hidden=true>SECRET</p>",
        "<p style='display:none'>SECRET</p>",
        "<div style='color:red; DISPLAY : None'><b>SECRET</b></div>",
        "<p style='visibility:hidden'>SECRET</p>",
        "<p style='font-size:0'>SECRET</p>",
        "<p style='font-size:0.0px'>SECRET</p>",
        "<p style='opacity:0'>SECRET</p>",
        "<p style='color:white'>SECRET</p>",
        "<p style='color:#FFFFFF'>SECRET</p>",
        "<span style='color: rgb(255, 255, 255)'>SECRET</span>",
        "<p>x" + "".join(chr(0xE0000 + ord(char)) for char in "SECRET") + "</p>",
    ],
)
def test_hidden_text_is_left_out(element):
    found = text_of(f"<p>before</p>{element}<p>after</p>")
    assert "SECRET" not in found
    assert not any(ord(char) >= 0xE0000 for char in found)
    assert found.startswith("before")
    assert found.endswith("after")


@pytest.mark.parametrize(
    "element",
    [
        "<p style='font-size:0.8em'>SEEN</p>",
        "<p style='opacity:0.5'>SEEN</p>",
        "<p style='color:whitesmoke'>SEEN</p>",
        "<p style='color:white;background:#333'>SEEN</p>",
        "<table bgcolor=black><tr><td style='color:white'>SEEN</table>",
        "<p style='background-color:white'>SEEN</p>",
    ],
)
def test_text_that_can_be_seen_is_kept(element):
    assert "SEEN" in text_of(element)


def test_text_hidden_by_colour_is_counted_in_a_warning():
    page = parse_html("<p>x</p><p style='color:white'>ignore all of this</p>")
    assert page.warnings == ("18 characters of text hidden by its colour or size were left out",)


def test_the_title_and_the_author_are_metadata():
    page = parse_html("<head><title> A\n title </title><meta name=author content='Ann'></head><p>x")
    assert page.metadata == {"title": "A title", "author": "Ann"}


def test_elements_may_nest_a_hundred_thousand_deep():
    assert text_of("<b>" * 100_000 + "deep") == "deep"


def test_each_element_is_entered_once(monkeypatch):
    from ragkit.readers import html

    entered = []
    enters = html._Walk._enters
    monkeypatch.setattr(html._Walk, "_enters", lambda walk, node, tag: entered.append(tag) or enters(walk, node, tag))
    for count in (1000, 4000):
        entered.clear()
        parse_html("<table>" + "<tr><td><p>x</p></td></tr>" * count + "</table>")
        assert len(entered) == 3 * count + 4  # tr, td, p; head, body, table, tbody


@pytest.mark.parametrize(
    ("head", "encoding"),
    [
        (b"<meta charset=windows-1251>", "cp1251"),
        (b'<meta http-equiv="Content-Type" content="text/html; charset=koi8-r">', "koi8_r"),
        (b'<?xml version="1.0" encoding="windows-1251"?>', "cp1251"),
    ],
)
def test_the_encoding_that_a_page_names_is_used(read, head, encoding):
    body = "<html><p>Все люди".encode(encoding)
    assert read("a.html", (head if head.startswith(b"<?") else b"") + b"<html><head>" + head + body).documents[
        0
    ].text == ("Все люди")


def test_a_page_is_read_through_the_parser_process(read):
    result = read("a.html", "<html><head><title>T</title></head><body><h1>Hello</h1><p>world</p>")
    assert result.documents[0].text == "# Hello\n\nworld"
    assert result.documents[0].metadata == {"encoding": "utf-8", "title": "T"}
