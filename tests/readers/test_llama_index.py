"""Any LlamaIndex reader gives documents with our offsets and pages."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from ragkit.errors import ReadError, UsageError
from ragkit.readers import read_llama_index


@dataclass
class Item:
    text: str
    metadata: dict = field(default_factory=dict)
    id_: str = "id-1"


class Double:
    def __init__(self, *items):
        self.items = items
        self.asked = None

    def load_data(self, **arguments):
        self.asked = arguments
        return list(self.items)


def test_text_metadata_and_place_are_taken_over():
    item = Item("hello", {"file_path": "/data/a.md", "n": 3, "nested": {"x": 1}, "big": 1 << 80, "bad": "v\ud800"})
    document = next(read_llama_index(Double(item)))
    assert (document.text, document.uri) == ("hello", "/data/a.md")
    assert document.metadata == {"file_path": "/data/a.md", "n": 3, "big": str(1 << 80), "bad": "v\ufffd"}


def test_pages_of_one_file_become_one_document_with_spans():
    items = [Item(f"page {n}", {"file_path": "/a.pdf", "page_label": str(n)}) for n in (1, 2, 3)]
    documents = list(read_llama_index(Double(*items)))
    assert len(documents) == 1
    text = documents[0].text
    assert [(page.number, text[page.char_start : page.char_stop]) for page in documents[0].pages] == [
        (1, "page 1"),
        (2, "page 2"),
        (3, "page 3"),
    ]
    assert "page_label" not in documents[0].metadata


def test_a_second_file_of_the_same_name_is_a_document_of_its_own():
    items = [Item(f"{name}{n}", {"file_name": "a.pdf", "page_label": str(n)}) for name in "xy" for n in (1, 2)]
    assert [document.uri for document in read_llama_index(Double(*items))] == ["a.pdf", "a.pdf#part=2"]


def test_parts_of_one_place_have_uris_of_their_own():
    items = [Item("a", {"url": "http://x"}), Item("b", {"url": "http://x"}), Item("c", {}, "id-9")]
    uris = [document.uri for document in read_llama_index(Double(*items))]
    assert uris == ["http://x", "http://x#part=2", "llama-index:id-9"]


def test_blank_documents_are_left_out():
    assert [document.text for document in read_llama_index(Double(Item(" \n"), Item("x", {}, "2")))] == ["x"]


def test_arguments_reach_the_reader():
    reader = Double(Item("x"))
    list(read_llama_index(reader, {"query": "q"}))
    assert reader.asked == {"query": "q"}


def test_a_reader_that_fails_is_a_read_error():
    class Broken:
        def load_data(self):
            raise RuntimeError("no network")

    with pytest.raises(ReadError, match="Broken failed: RuntimeError: no network") as caught:
        read_llama_index(Broken())
    assert caught.value.code == "crash"


def test_something_without_load_data_is_refused():
    with pytest.raises(UsageError, match="load_data, got int"):
        read_llama_index(7)


def test_something_that_is_no_document_is_refused():
    with pytest.raises(UsageError, match="has a text"):
        list(read_llama_index(Double(object())))


def test_the_real_directory_reader_works(tmp_path):
    core = pytest.importorskip("llama_index.core", reason="llama-index-core is not installed")
    (tmp_path / "a.txt").write_text("hello from a file")
    documents = list(read_llama_index(core.SimpleDirectoryReader(str(tmp_path))))
    assert [document.text for document in documents] == ["hello from a file"]
    assert documents[0].uri == str(tmp_path / "a.txt")
