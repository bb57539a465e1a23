"""Any LlamaIndex reader gives documents with our offsets and pages."""

from __future__ import annotations

from dataclasses import dataclass, field
from uuid import uuid4

import pytest

from ragkit.errors import ReadError, UsageError
from ragkit.readers import read_llama_index, read_llama_index_store


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
        list(read_llama_index(Broken()))
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


def test_a_lazy_reader_is_drawn_from_one_document_at_a_time():
    class Lazy(Double):
        def lazy_load_data(self, **arguments):
            for number in range(1000):
                drawn.append(number)
                yield Item(f"text {number}", {}, f"id-{number}")

    drawn = []
    documents = read_llama_index(Lazy())
    assert next(documents).text == "text 0"
    assert len(drawn) < 5


def test_a_reader_that_refuses_to_be_lazy_loads_everything():
    class Refusing(Double):
        def lazy_load_data(self, **arguments):
            raise NotImplementedError

    class Other(Double):
        def lazy_load_data(self, path):
            raise AssertionError("is not called")

    for kind in (Refusing, Other):
        assert [document.text for document in read_llama_index(kind(Item("x")), {"query": "q"})] == ["x"]


def test_documents_without_a_place_have_the_same_uri_each_time():
    def load():
        return list(read_llama_index(Double(Item("one", {}, str(uuid4())), Item("two", {}, "given"))))

    first, second = load(), load()
    assert [document.uri for document in first] == [document.uri for document in second]
    assert [document.uri for document in first] == [f"llama-index:{first[0].doc_id}", "llama-index:given"]


def test_nodes_of_a_document_store_keep_the_ids_of_the_store():
    class Store:
        docs = {"a": Item("first", {"file_path": "/x.md", "n": 1}), "b": Item(" "), "c": Item("last")}  # noqa: RUF012

    documents = list(read_llama_index_store(Store()))
    assert [(document.uri, document.text) for document in documents] == [
        ("llama-index:a", "first"),
        ("llama-index:c", "last"),
    ]
    assert documents[0].metadata == {"file_path": "/x.md", "n": 1}


def test_something_without_docs_is_refused():
    with pytest.raises(UsageError, match="has docs, got int"):
        read_llama_index_store(7)


def test_a_real_document_store_works():
    pytest.importorskip("llama_index.core", reason="llama-index-core is not installed")
    from llama_index.core.schema import Document
    from llama_index.core.storage.docstore import SimpleDocumentStore

    store = SimpleDocumentStore()
    store.add_documents([Document(text="hello", id_="one"), Document(text="there", id_="two")])
    assert {document.uri: document.text for document in read_llama_index_store(store)} == {
        "llama-index:one": "hello",
        "llama-index:two": "there",
    }
