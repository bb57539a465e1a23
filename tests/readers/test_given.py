"""Documents that the caller hands over are sources like any other."""

from __future__ import annotations

import pickle

import pytest

from ragkit.errors import ReadError, UsageError
from ragkit.readers import ReadLimits, discover, read_source
from ragkit.types import Document, PageSpan


def given(text: str, uri: str, **metadata: object) -> Document:
    return Document.from_text(text, uri, metadata=metadata)


def test_a_document_is_a_source_that_gives_it_back():
    document = Document.from_text("one\n\ntwo", "wiki:1", (PageSpan(1, 0, 3), PageSpan(2, 5, 8)), {"year": 2020})
    source = next(discover([document]))
    assert (source.uri, source.size) == ("wiki:1", 8)
    assert list(read_source(source).documents) == [document]


def test_an_iterable_is_drawn_from_and_files_may_stand_beside_it(tmp_path):
    (tmp_path / "a.txt").write_text("from a file")
    documents = (given(f"text {n}", f"wiki:{n}") for n in range(3))
    sources = list(discover([tmp_path, documents]))
    assert [source.uri for source in sources] == [str(tmp_path / "a.txt"), "wiki:0", "wiki:1", "wiki:2"]
    assert [read_source(source).documents[0].text for source in sources][1:] == ["text 0", "text 1", "text 2"]


def test_the_number_that_says_whether_it_changed_follows_text_and_metadata():
    def stamp(document: Document) -> int:
        return next(discover([document])).mtime_ns

    assert stamp(given("x", "u", a=1)) == stamp(given("x", "u", a=1)) != 0
    assert len({stamp(given("x", "u", a=1)), stamp(given("x", "u", a=2)), stamp(given("y", "u", a=1))}) == 3


def test_many_documents_go_to_disk_and_come_back_from_it():
    documents = [given(f"{n} " * 200_000, f"wiki:{n}") for n in range(120)]
    sources = list(discover([iter(documents)]))
    assert [read_source(source).documents[0] for source in sources] == documents


def test_a_document_travels_with_its_source():
    sources = list(discover([[given("a", "wiki:a"), given("b", "wiki:b")]]))
    again = pickle.loads(pickle.dumps(sources[1]))
    assert read_source(again).documents[0].text == "b"
    assert b"wiki:a" not in pickle.dumps(sources[1])


def test_the_second_document_of_a_name_is_left_out_and_said():
    skipped = []
    found = list(discover([[given("a", "u"), given("b", "u")]], on_skip=skipped.append))
    assert [read_source(source).documents[0].text for source in found] == ["a"]
    assert [(one.uri, one.reason) for one in skipped] == [
        ("u", "stands twice among the given documents; the first is taken")
    ]


def test_what_came_before_a_failure_stays():
    class Feed:
        name = "Feed"

        def __iter__(self):
            yield given("a", "u:1")
            raise ReadError("the feed broke", code="crash", stage="read")

    failures = []
    found = list(discover([Feed()], on_fail=lambda name, error: failures.append((name, str(error)))))
    assert [source.uri for source in found] == ["u:1"]
    assert failures == [("Feed", "the feed broke")]
    with pytest.raises(ReadError, match="the feed broke"):
        list(discover([Feed()]))


def test_blank_and_overlong_documents_are_refused_by_name():
    blank, long = discover([[given(" \n", "u:1"), given("x" * 100, "u:2")]])
    with pytest.raises(ReadError, match="u:1: there is no text"):
        read_source(blank)
    with pytest.raises(ReadError, match="u:2: 100 bytes of text are over the limit of 50"):
        read_source(long, ReadLimits(max_text_bytes=50))


def test_other_things_are_refused():
    with pytest.raises(UsageError, match="got a int in one"):
        list(discover([[7]]))
