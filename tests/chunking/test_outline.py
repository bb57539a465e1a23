"""Headings of every kind are found, code is not, and the path follows the levels."""

from __future__ import annotations

import time

import pytest

from ragkit.chunking.outline import heading_metadata, heading_path, heading_paths, outline

MARKDOWN = """# Guide

Intro.

## Install ##

Steps.

```sh
# not a heading
```

Details
-------

### On Linux

Text.

## Use

End.
"""


def titles(text):
    return [(heading.level, heading.title) for heading in outline(text)]


def test_markdown_headings_outside_code_are_found():
    assert titles(MARKDOWN) == [(1, "Guide"), (2, "Install"), (2, "Details"), (3, "On Linux"), (2, "Use")]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('<body><h1 class="x">The <b>Law</b> &amp; us</h1><p>a</p><H2>Two</H2>', [(1, "The Law & us"), (2, "Two")]),
        ("== Early life ==\ntext\n=== School ===\n", [(2, "Early life"), (3, "School")]),
        (" = Homarus = \n text \n = = Habitat = = \n", [(1, "Homarus"), (2, "Habitat")]),
        ("ARTICLE 5 TERM\ntext\nSection 5.1 Renewal\n", [(3, "ARTICLE 5 TERM"), (4, "Section 5.1 Renewal")]),
        ("§ 12 Kündigung\nDer Vertrag endet.\n", [(3, "§ 12 Kündigung")]),
        ("Part IV\nChapter 2 Duties\n", [(1, "Part IV"), (2, "Chapter 2 Duties")]),
        ("1 Definitions\n1.1 Terms used\n", [(3, "1 Definitions"), (4, "1.1 Terms used")]),
    ],
    ids=["html", "wiki", "wikitext", "contract", "paragraph sign", "law", "decimal"],
)
def test_headings_of_other_kinds_are_found(text, expected):
    assert titles(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "1. This is an item of a list that ends with a full stop.\n",
        "Section 5 of the Act says that nothing may be done without the consent of the other party, which is hard "
        "to get.\n",
        "The article 5 rule.\n",
        "#hashtag\n",
        "a = b = c\n",
        "~~~\n# code\n",
    ],
)
def test_what_only_looks_like_a_heading_is_none(text):
    assert titles(text) == []


def test_the_path_holds_the_open_headings_highest_first():
    headings = outline(MARKDOWN)
    assert heading_path(headings, MARKDOWN.index("Text.")) == ("Guide", "Details", "On Linux")
    assert heading_path(headings, MARKDOWN.index("End.")) == ("Guide", "Use")
    assert heading_path(headings, 0) == ("Guide",)


def test_paths_of_many_places_are_those_of_each():
    headings = outline(MARKDOWN)
    places = list(range(0, len(MARKDOWN), 3))
    assert heading_paths(headings, places) == [heading_path(headings, place) for place in places]


def test_the_path_is_one_flat_value():
    assert heading_metadata(("Guide", "Use")) == {"heading_path": "Guide > Use"}
    assert heading_metadata(()) == {}


@pytest.mark.parametrize("unit", ["<h1>", "1.1 A", "= ", "a\n", "§ ", "\n---", "Section 1 ", "<h1 "])
def test_the_search_is_linear_on_text_made_to_hurt_it(unit):
    started = time.process_time()
    outline(unit * (200_000 // len(unit)))
    assert time.process_time() - started < 5


def test_hashes_behind_a_title_are_the_titles_own_unless_a_space_parts_them():
    assert [heading.title for heading in outline("# About C#\n\n## Use ##\n")] == ["About C#", "Use"]


def test_a_heading_line_of_many_spaces_is_read_in_linear_time():
    title = "a" + " " * 200_000 + "b"
    assert [heading.title for heading in outline(f"# {title}\n")] == ["a b"]


WINDOWS = "Guide\n=====\n\n```sh\n# a comment\n```\n\n2.1 Definitions\n\n== Wiki ==\n\n## Stars ##\n\nText.\n"


def test_headings_are_the_same_with_crlf():
    expected = ["Guide", "2.1 Definitions", "Wiki", "Stars"]
    assert [heading.title for heading in outline(WINDOWS)] == expected
    assert [heading.title for heading in outline(WINDOWS.replace("\n", "\r\n"))] == expected


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_front_matter_holds_no_heading(newline):
    text = "---\ntitle: Frogs\n# a comment\ndate: today\n---\n# One\n".replace("\n", newline)
    assert [heading.title for heading in outline(text)] == ["One"]


def test_text_between_two_rules_is_no_front_matter():
    assert [heading.title for heading in outline("---\n\n# One\n\nText.\n\n---\n# Two\n")] == ["One", "Two"]
