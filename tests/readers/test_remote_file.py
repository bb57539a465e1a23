"""Objects behind URLs: found, recognised without fetching, and read like files."""

from __future__ import annotations

import http.server
import pickle
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import fsspec
import pytest
from document_files import pdf_bytes

from ragkit.errors import MissingExtraError, OfflineError, ReadError, UsageError
from ragkit.readers import Source, discover, read_source
from ragkit.readers.file_systems import open_file_system, refuse_network
from ragkit.readers.remote_file import RemoteFile, stamp_of


@pytest.fixture
def memory() -> Iterator[fsspec.AbstractFileSystem]:
    files = fsspec.filesystem("memory")
    yield files
    for path in list(files.store):
        del files.store[path]


def put(files: fsspec.AbstractFileSystem, **objects: str | bytes) -> None:
    for name, content in objects.items():
        files.pipe_file("/lib/" + name.replace("__", "/").replace("_", "."), _bytes(content))


def _bytes(content: str | bytes) -> bytes:
    return content.encode() if isinstance(content, str) else content


class Server(http.server.ThreadingHTTPServer):
    """Serves `objects` by path, with entity tags where `tags` is set, and counts whole fetches."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.objects: dict[str, bytes] = {}
        self.tags = True
        self.fetched: list[str] = []
        self.asked: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_HEAD(self) -> None:
        self._head()

    def do_GET(self) -> None:
        content = self._head()
        if content is not None:
            self.server.fetched.append(self.path)
            self.wfile.write(content)

    def _head(self) -> bytes | None:
        self.server.asked.append(self.path)
        content = self.server.objects.get(self.path.partition("?")[0])
        self.send_response(200 if content is not None else 404)
        if content is not None:
            self.send_header("Content-Length", str(len(content)))
            if self.server.tags:
                self.send_header("ETag", f'"{hash(content)}"')
        self.end_headers()
        return content

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    pytest.importorskip("aiohttp", reason="the extra remote is not installed")
    server = Server()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def test_a_folder_elsewhere_is_walked_like_one_here(memory):
    put(memory, b_md="b", a_txt="a", sub__c_md="c", sub__deep__d_txt="d")
    memory.pipe_file("/lib/.hidden.md", b"h")
    memory.pipe_file("/lib/node_modules/x.md", b"x")
    assert [source.uri for source in discover(["memory://lib"])] == [
        f"memory://lib/{name}" for name in ("a.txt", "b.md", "sub/c.md", "sub/deep/d.txt")
    ]
    assert [source.uri for source in discover(["memory://lib/"], include=["*.md"], exclude=["sub/"])] == [
        "memory://lib/b.md"
    ]


def test_an_object_is_read_as_the_file_that_it_is(memory, parser):
    put(memory, tower_pdf=pdf_bytes(["The tower is tall.", "It is old."]), table_jsonl='{"text": "one"}\n"two"\n')
    sources = discover(["memory://lib/tower.pdf", "memory://lib/table.jsonl"])
    pdf, table = (read_source(source, process=parser) for source in sources)
    assert [document.uri for document in pdf.documents] == ["memory://lib/tower.pdf"]
    assert [page.number for page in pdf.documents[0].pages] == [1, 2]
    assert [(one.uri, one.text) for one in table.documents] == [
        ("memory://lib/table.jsonl#row=1", "one"),
        ("memory://lib/table.jsonl#row=2", "two"),
    ]


def test_what_is_read_says_its_size_and_version_at_that_time(memory):
    put(memory, a_txt="first")
    source = next(discover(["memory://lib/a.txt"]))
    put(memory, a_txt="second, longer")
    result = read_source(source)
    assert result.documents[0].text == "second, longer"
    now = next(discover(["memory://lib/a.txt"]))
    assert (result.source.size, result.source.mtime_ns) == (now.size, now.mtime_ns) != (source.size, source.mtime_ns)


def test_an_object_that_changes_while_it_is_read_is_read_again_and_then_refused(memory, monkeypatch):
    put(memory, a_txt="0")
    source = next(discover(["memory://lib/a.txt"]))
    fetch, fetched = RemoteFile._fetch, []

    def changing(self, uri, spool):
        size = fetch(self, uri, spool)
        fetched.append(size)
        put(memory, a_txt="x" * (len(fetched) + 1))
        return size

    monkeypatch.setattr(RemoteFile, "_fetch", changing)
    with pytest.raises(ReadError, match="was changed 2 times") as caught:
        read_source(source)
    assert caught.value.code == "changed"
    assert fetched == [1, 2]


def test_an_object_that_is_gone_is_unreadable(memory):
    put(memory, a_txt="0")
    source = next(discover(["memory://lib/a.txt"]))
    memory.rm_file("/lib/a.txt")
    with pytest.raises(ReadError, match=r"memory://lib/a\.txt: there is nothing") as caught:
        read_source(source)
    assert (caught.value.code, caught.value.stage) == ("unreadable", "read")


@pytest.mark.parametrize(
    ("about", "same"),
    [
        ({"ETag": "a", "LastModified": 1}, {"ETag": "a", "LastModified": 2, "size": 9}),
        ({"md5Hash": "a"}, {"md5hash": "a"}),
        ({"mtime": 1.5}, {"mtime": 1.5, "ino": 3}),
    ],
)
def test_what_a_store_says_of_the_content_decides_and_the_time_only_where_it_says_nothing(about, same):
    assert stamp_of(about) == stamp_of(same) != 0
    assert stamp_of(about) != stamp_of({name: f"{value}0" for name, value in about.items()})
    assert 0 < stamp_of(about) < 1 << 63


def test_a_store_that_says_nothing_gives_no_stamp():
    assert stamp_of({"size": 5, "name": "x", "ETag": None}) == 0


def test_sources_elsewhere_can_be_sent_to_other_processes_and_show_no_credentials(memory):
    put(memory, a_txt="x")
    source = next(discover(["memory://lib/a.txt"]))
    again = pickle.loads(pickle.dumps(source))
    assert again == source
    assert read_source(again).documents[0].text == "x"
    secret = Source("s3://b/x", Path(), 0, 0, origin=RemoteFile("s3://me:hunter2@b/x", "b/x"))
    assert "hunter2" not in repr(secret)


def test_nothing_at_a_url_is_found_out_before_anything_is_read(memory):
    with pytest.raises(UsageError, match=r"cannot read 'memory://lib/none': there is nothing"):
        discover(["memory://lib/none"])


def test_a_page_is_fetched_over_http(server):
    server.objects["/a.html"] = b"<html><body><p>Hello from afar.</p></body></html>"
    source = next(discover([f"{server.url}/a.html?session=abc"]))
    assert source.uri == f"{server.url}/a.html"
    assert (source.name, source.size) == ("a.html", len(server.objects["/a.html"]))
    assert read_source(source).documents[0].text == "Hello from afar."
    assert "/a.html?session=abc" in server.fetched


def test_looking_at_a_page_fetches_nothing(server):
    server.objects["/a.txt"] = b"x" * 5000
    first = next(discover([f"{server.url}/a.txt"]))
    second = next(discover([f"{server.url}/a.txt"]))
    assert first.mtime_ns == second.mtime_ns != 0
    assert server.fetched == []
    server.objects["/a.txt"] = b"y" * 5000
    assert next(discover([f"{server.url}/a.txt"])).mtime_ns != first.mtime_ns


def test_errors_of_http_name_the_place_and_no_credentials(server):
    url = server.url.replace("http://", "http://bob:hunter2@") + "/gone?token=sesame"
    with pytest.raises(UsageError) as caught:
        discover([url])
    assert str(caught.value) == f"cannot read '{server.url}/gone': there is nothing"


def test_a_server_that_does_not_answer_is_told_from_a_missing_page():
    pytest.importorskip("aiohttp", reason="the extra remote is not installed")
    with pytest.raises(UsageError, match=r"cannot read 'http://127\.0\.0\.1:1/a': Cannot connect to host 127"):
        discover(["http://bob:hunter2@127.0.0.1:1/a"])


@pytest.mark.parametrize("url", ["s3://bucket/x", "https://example.org/a", "gs://bucket"])
def test_offline_nothing_leaves_this_machine(url: str):
    with pytest.raises(OfflineError, match="would have to be fetched"):
        refuse_network(url)


@pytest.mark.parametrize("url", ["memory://x", "file:///x", "http://localhost:1/x", "http://127.0.0.1/x"])
def test_offline_this_machine_may_be_read(url: str):
    refuse_network(url)


def test_a_missing_package_is_named(monkeypatch):
    def missing(url):
        raise ImportError("Install adlfs to access Azure", name="adlfs")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(MissingExtraError, match=r"az://x cannot be used: Install adlfs"):
        open_file_system("az://x")


def test_pyarrow_reads_a_store_whose_package_is_missing(monkeypatch, tmp_path):
    import pyarrow.fs

    def missing(url):
        raise ImportError("Install s3fs to access S3", name="s3fs")

    (tmp_path / "a.txt").write_text("from arrow")
    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    local = (pyarrow.fs.LocalFileSystem(), str(tmp_path))
    monkeypatch.setattr(pyarrow.fs, "FileSystem", SimpleNamespace(from_uri=lambda url: local))
    source = next(discover(["s3://bucket/docs"]))
    assert source.uri == "s3://bucket/docs/a.txt"
    assert source.mtime_ns != 0
    assert read_source(source).documents[0].text == "from arrow"
