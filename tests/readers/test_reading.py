"""Reading one source from end to end."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from document_files import pdf_bytes
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ragkit.config import IngestConfig
from ragkit.errors import ConfigError, ReadError, UsageError
from ragkit.readers import ReadLimits, content_sha256, read_documents, read_source
from ragkit.readers.base import ParsedDocument
from ragkit.readers.media_type import MediaType
from ragkit.readers.process import ParserProcess
from ragkit.readers.registry import READERS, load_reader
from ragkit.readers.result import SpilledDocuments
from ragkit.types import PageSpan, document_id


def failure(source, **named):
    with pytest.raises(ReadError) as caught:
        read_source(source, **named)
    return caught.value


def test_a_result_says_what_was_read(make, parser):
    source = make("a.md", "# T\n\ntext")
    result = read_source(source, process=parser)
    assert result.media_type is MediaType.MARKDOWN
    assert result.reader == "markdown/1"
    assert result.content_sha256 == content_sha256(source)
    assert result.source == source
    document = result.documents[0]
    assert document.uri == source.uri
    assert document.doc_id == document_id(document.text)


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"", "empty"),
        (b" \r\n\t\x0c ", "empty"),
        (b"\xef\xbb\xbf", "empty"),
        ("\u200b\u2060\u00a0".encode(), "empty"),
        (b"<html><body><script>x</script></body></html>", "empty"),
        (b"\x89PNG\r\n\x1a\n", "unsupported"),
        (os.urandom(3000), "unsupported"),
        (b"\xff\xfe" + b"\x00\xdc" * 50, "encoding"),
    ],
)
def test_what_holds_no_text_fails_with_its_reason_and_its_name(make, parser, content, code):
    error = failure(make("a.txt", content), process=parser)
    assert error.code == code
    assert "/a.txt: " in str(error)
    assert "\n" not in str(error)


def test_a_text_over_the_limit_is_refused_before_it_is_read(make):
    error = failure(make("a.txt", "x" * 1000), limits=ReadLimits(max_text_bytes=999))
    assert (error.code, error.stage) == ("too_large", "read")


def test_a_file_that_is_gone_is_unreadable(make):
    source = make("a.txt", "x")
    source.path.unlink()
    error = failure(source)
    assert (error.code, error.stage) == ("unreadable", "read")
    assert "No such file" in str(error)


def test_a_file_that_became_a_link_is_not_followed(make, tmp_path):
    source = make("a.txt", "x")
    source.path.unlink()
    source.path.symlink_to("/etc/passwd")
    assert failure(source).code == "unreadable"


def test_a_file_that_became_a_pipe_does_not_block(make):
    source = make("a.txt", "x")
    source.path.unlink()
    os.mkfifo(source.path)
    assert failure(source).code == "unreadable"


def test_a_file_that_is_always_changing_fails_after_two_attempts(make, monkeypatch):
    source = make("a.txt", "first")
    attempts = []

    def parse(reader, data):
        attempts.append(bytes(data))
        source.path.write_bytes(data + b" more")
        return ParsedDocument(data.decode())

    monkeypatch.setattr("ragkit.readers.text.TextReader.parse", parse)
    error = failure(source)
    assert (error.code, error.stage) == ("changed", "read")
    assert attempts == [b"first", b"first more"]


def test_a_file_that_changed_once_is_read_again(make, monkeypatch):
    source = make("a.txt", "first")
    changes = iter([b"second and final"])

    def parse(reader, data):
        for change in changes:
            source.path.write_bytes(change)
        return ParsedDocument(data.decode())

    monkeypatch.setattr("ragkit.readers.text.TextReader.parse", parse)
    result = read_source(source)
    assert result.documents[0].text == "second and final"
    assert result.source.size == len("second and final")


def test_a_change_that_keeps_size_and_time_is_seen_in_a_fresh_file(make, monkeypatch):
    source = make("a.txt", "first")
    attempts = []

    def parse(reader, data):
        attempts.append(bytes(data))
        if len(attempts) == 1:
            status = source.path.stat()
            source.path.write_bytes(b"other")
            os.utime(source.path, ns=(status.st_atime_ns, status.st_mtime_ns))
        return ParsedDocument(data.decode())

    monkeypatch.setattr("ragkit.readers.text.TextReader.parse", parse)
    assert read_source(source).documents[0].text == "other"


def test_a_file_that_was_replaced_meanwhile_is_read_again(make, monkeypatch, tmp_path):
    source = make("a.txt", "first")
    new = tmp_path / "new"
    new.write_text("fresh")

    def parse(reader, data):
        if new.exists():
            os.replace(new, source.path)
        return ParsedDocument(data.decode())

    monkeypatch.setattr("ragkit.readers.text.TextReader.parse", parse)
    assert read_source(source).documents[0].text == "fresh"


def test_a_failure_of_a_file_that_changed_is_a_change(make, monkeypatch):
    source = make("a.txt", "first")
    attempts = []

    def parse(reader, data):
        attempts.append(1)
        if len(attempts) == 1:
            source.path.write_text("second")
            raise ReadError("half written", code="corrupt")
        return ParsedDocument(data.decode())

    monkeypatch.setattr("ragkit.readers.text.TextReader.parse", parse)
    assert read_source(source).documents[0].text == "second"


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1))
def test_any_utf8_text_is_kept_or_empty(make, text):
    source = make("a.txt", b"\xef\xbb\xbf" + text.encode())
    try:
        assert read_source(source).documents[0].text == text
    except ReadError as error:
        code = error.code
        assert code in ("empty", "unsupported")


def test_a_large_text_takes_two_copies_of_memory_at_most(tmp_path):
    path = tmp_path / "large.txt"
    size = 300 << 20
    with path.open("wb") as file:
        for _ in range(size >> 20):
            file.write(b"some words and a line end, again and again. 0123456789 and more\n" * (1 << 14))
    script = (
        "import resource, sys\n"
        "from ragkit.readers import discover, read_source\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "text = read_source(next(discover([sys.argv[1]]))).documents[0].text\n"
        "print(len(text), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    done = subprocess.run([sys.executable, "-P", "-c", script, str(path)], capture_output=True, text=True, timeout=120)
    length, kilobytes = map(int, done.stdout.split())
    assert length == size
    assert kilobytes < 2.3 * (size >> 10)


def test_one_file_is_read_under_the_limits_of_the_settings(make):
    source = make("a.html", "<p>hello</p>")
    assert [document.text for document in read_documents(source.path, IngestConfig(parse_memory_mb=512))] == ["hello"]


def test_a_folder_is_not_one_file(tmp_path):
    with pytest.raises(UsageError, match="give one file"):
        read_documents(tmp_path)


def test_a_thread_keeps_its_parser_process(make):
    from ragkit.readers import reading

    read_source(make("a.html", "<p>x"))
    first = reading._own_process()
    read_source(make("b.html", "<p>y"))
    assert reading._own_process() is first


@pytest.mark.parametrize("media_type", READERS)
def test_every_entry_of_the_registry_is_a_reader_of_its_type(media_type):
    reader = load_reader(media_type)
    assert media_type in reader.media_types
    assert reader.name
    assert reader.version >= 1


@pytest.mark.parametrize("wrong", [{"timeout_s": 0}, {"timeout_s": float("nan")}, {"memory_mb": 0}, {"max_ratio": 1.5}])
def test_impossible_limits_are_refused(wrong):
    with pytest.raises(ConfigError):
        ReadLimits(**wrong)


def test_a_small_memory_limit_fails_the_document_and_not_the_run(make):
    source = make("a.pdf", pdf_bytes(["text"]))
    with ParserProcess() as fresh:
        assert failure(source, limits=ReadLimits(memory_mb=20), process=fresh).code == "oom"
        assert read_source(source, process=fresh).documents[0].text == "text"


def test_many_rows_go_to_disk_and_come_back_the_same():
    parsed = [
        ParsedDocument(f"naïve text {n} " * 50, (PageSpan(1, 0, 5),), {"n": n, "t": "é", "x": None}, row=n + 1)
        for n in range(100)
    ]
    held, spilled = SpilledDocuments("/a"), SpilledDocuments("/a", spill_chars=1000)
    for item in parsed:
        held.add(item)
        spilled.add(item)
    assert len(spilled) == len(held) == 100
    assert not spilled._held
    assert list(spilled) == list(held)
    assert spilled[-1] == held[-1]
    assert spilled[3:5] == held[3:5]
    with pytest.raises(IndexError):
        spilled[100]


def test_one_large_document_stays_in_memory():
    documents = SpilledDocuments("/a", spill_chars=10)
    documents.add(ParsedDocument("x" * 1000))
    assert documents._file is None
    assert documents[0].text == "x" * 1000


def test_what_one_file_lost_is_logged(make, caplog):
    read_documents(make("a.txt", "Frogs live in ponds and eat flies.\0 Toads hide.").path)
    read_documents(make("rows.jsonl", '{"text": "one"}\nno JSON\n').path)
    nul, row = caplog.messages
    assert nul.endswith("a.txt: 1 NUL characters were replaced by U+FFFD")
    assert "rows.jsonl: 1 rows gave no document; the first, 2: " in row
