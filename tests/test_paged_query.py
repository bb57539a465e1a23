import gc
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from blended_pipeline import CONFIG, open_blended, text_of
from tiny_generator import write_generator

from ragkit.config import CodecName, GenerationConfig, PagesConfig, PageSelectorName, Strategy
from ragkit.documents import WholeDocument
from ragkit.errors import CacheCapacityError, GenerationError, UsageError
from ragkit.generation.engine import Engine
from ragkit.progress import Silent

SMALL = PagesConfig(
    page_tokens=16, codec=CodecName.INT8, selector=PageSelectorName.MEAN_KEY, sink_tokens=32, budget_tokens=64,
    local_tokens=64, window_tokens=128,
)  # fmt: skip
PAGED = replace(
    CONFIG, pages=SMALL, generation=GenerationConfig(dtype="float32", max_new_tokens=6, strategy=Strategy.PAGES)
)
QUESTION = "Where do the otters live?"


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    return Engine.load(write_generator(tmp_path_factory.mktemp("generator")), device="cpu", dtype="float32")


class Noting(Silent):
    """Progress that keeps what it is told."""

    def __init__(self):
        self.messages = []

    def message(self, text):
        self.messages.append(text)


@pytest.fixture
def collection(tmp_path, engine):
    """A store of one long document and a short one."""
    folder = tmp_path / "documents"
    folder.mkdir()
    (folder / "long.txt").write_text(text_of(1, sentences=130), encoding="utf-8")
    (folder / "short.txt").write_text(text_of(2), encoding="utf-8")
    with open_blended(tmp_path / "store", engine, PAGED) as pipeline:
        pipeline.ingest([folder])
    return tmp_path / "store", str(folder / "long.txt")


def test_a_document_beyond_the_window_is_answered_from_its_pages(collection, engine):
    store, uri = collection
    with open_blended(store, engine, PAGED) as pipeline:
        answer = pipeline.query(QUESTION, document=uri)
    assert answer.strategy == "pages"
    assert answer.tokens.reused > engine.max_context == 4096
    assert answer.tokens.generated == 6
    assert answer.found
    assert answer.timings_ms["read_document"] > 0


def test_a_second_question_does_not_read_the_text_again_until_the_store_changes(collection, engine, monkeypatch):
    store, uri = collection
    with open_blended(store, engine, PAGED) as pipeline:
        read, real = [], type(pipeline.store).document
        monkeypatch.setattr(type(pipeline.store), "document", lambda self, doc: read.append(doc) or real(self, doc))
        pipeline.query(QUESTION, document=uri)
        first = len(read)  # reading the pages writes to the store
        pipeline.query(QUESTION, document=uri)
        after_reading = len(read)
        pipeline.query("Who lives by the river?", document=uri)
        assert len(read) == after_reading
        assert after_reading <= first + 1
        path = Path(uri)
        path.write_text(text_of(3, sentences=140), encoding="utf-8")
        pipeline.ingest([path.parent])
        pipeline.query(QUESTION, document=uri)
        assert len(read) == after_reading + 1
        assert len(set(read)) == 2


def whole_documents(uri):
    """Those that somebody holds."""
    gc.collect()
    return [id(one) for one in gc.get_objects() if type(one) is WholeDocument and one.uri == uri]


def test_nothing_of_a_removed_document_stays_in_memory(collection, engine):
    store, uri = collection
    with open_blended(store, engine, PAGED) as pipeline:
        pipeline.query(QUESTION, document=uri)
        assert len(whole_documents(uri)) == 1
        pipeline.remove([uri])
        assert whole_documents(uri) == []
        with pytest.raises(UsageError, match="holds 0"):
            pipeline.parts.documents.find(uri)


def test_the_answer_lists_the_places_that_were_found(collection, engine):
    store, uri = collection
    with open_blended(store, engine, PAGED) as pipeline:
        answer = pipeline.query(QUESTION, document=uri)
    text = text_of(1, sentences=130)
    assert 4 <= len(answer.attended) <= 32
    for span in answer.attended:
        assert 0 < span.share <= 1
        assert span.token_stop - span.token_start <= 16
        # One token a byte here, so both count alike.
        assert (span.char_start, span.char_stop) == (span.token_start, span.token_stop)
    shares = [span.share for span in answer.attended]
    assert shares == sorted(shares, reverse=True)
    assert all(text[one.char_start : one.char_stop] == one.quote for one in answer.citations)
    assert {one.uri for one in answer.citations} == {uri}


def test_a_second_question_reads_nothing_and_a_new_process_finds_the_pages(collection, engine):
    store, uri = collection
    with open_blended(store, engine, PAGED) as pipeline:
        first = pipeline.query(QUESTION, document=uri)
        second = pipeline.query("What does the miller grind?", document=uri)
        assert "read_document" not in second.timings_ms
    with open_blended(store, engine, PAGED) as pipeline:
        again = pipeline.query(QUESTION, document=uri)
    assert "read_document" not in again.timings_ms
    assert again.text == first.text
    assert again.attended == first.attended
    assert again.kv.bytes_by_tier["disk"] > 0


def test_a_new_process_takes_the_documents_tokens_from_the_store(collection, engine, monkeypatch):
    store, uri = collection
    with open_blended(store, engine, PAGED) as pipeline:
        first = pipeline.query(QUESTION, document=uri)
    tokenizer = type(engine.tokenizer)
    cut = []
    encode = tokenizer.encode_with_offsets
    monkeypatch.setattr(tokenizer, "encode_with_offsets", lambda self, text: (cut.append(text), encode(self, text))[1])
    with open_blended(store, engine, PAGED) as pipeline:
        again = pipeline.query(QUESTION, document=uri)
    assert (again.text, again.attended) == (first.text, first.attended)
    assert not cut


def test_ingest_reads_documents_beyond_the_window_into_pages_and_names_their_price(tmp_path, engine):
    progress = Noting()
    (tmp_path / "long.txt").write_text(text_of(1, sentences=130), encoding="utf-8")
    (tmp_path / "short.txt").write_text(text_of(2), encoding="utf-8")
    with open_blended(tmp_path / "store", engine, PAGED) as pipeline:
        report = pipeline.ingest([tmp_path / "long.txt", tmp_path / "short.txt"], pages=True, progress=progress)
        assert (report.pages.read, report.pages.present) == (1, 0)
        assert report.pages.tokens > 4096
        assert "read_document" not in pipeline.query(QUESTION, document=str(tmp_path / "long.txt")).timings_ms
        again = pipeline.ingest([], pages=True)
    assert (again.pages.read, again.pages.present, again.pages.tokens) == (0, 1, 0)
    assert [line for line in progress.messages if "tokens, " in line and "MB, about 1 min" in line]


def test_ingest_says_which_documents_are_too_large_for_pages_and_goes_on(tmp_path, engine):
    (tmp_path / "long.txt").write_text(text_of(1, sentences=130), encoding="utf-8")
    tight = replace(PAGED, kv=replace(PAGED.kv, disk_mb=1))
    with open_blended(tmp_path / "store", engine, tight) as pipeline:
        report = pipeline.ingest([tmp_path / "long.txt"], pages=True)
    assert report.pages.read == 0
    assert "long.txt was not read into pages: the pages of this document" in report.warnings[0]


def test_pages_answer_without_full_text_rows_and_vectors(collection, engine):
    store, uri = collection
    with open_blended(store, engine, PAGED) as pipeline:
        expected = pipeline.query(QUESTION, document=uri)
    with sqlite3.connect(store / "ragkit.db") as connection:
        connection.execute("DELETE FROM chunk_fts_data")
    for segment in (store / "segments").rglob("*.arrow"):
        segment.unlink()
    with open_blended(store, engine, PAGED) as pipeline:
        answer = pipeline.query(QUESTION, document=uri)
    assert (answer.text, answer.attended) == (expected.text, expected.attended)


def test_auto_takes_pages_for_a_document_that_does_not_fit_the_window_and_only_for_that(collection, engine):
    store, uri = collection
    auto = replace(PAGED, generation=replace(PAGED.generation, strategy=Strategy.AUTO))
    with open_blended(store, engine, auto) as pipeline:
        chosen = [
            pipeline.query(QUESTION, document=document).strategy
            for document in (uri, uri.replace("long", "short"), None)
        ]
        filtered = pipeline.query(QUESTION, document=uri, filter={"doc_id": "*"})
    assert chosen == ["pages", "blend", "blend"]
    assert filtered.strategy != "pages"


def test_pages_of_several_documents_are_refused_by_their_number(collection, engine):
    store, _ = collection
    with open_blended(store, engine, PAGED) as pipeline:
        with pytest.raises(UsageError, match="reads one document, and the store holds 2: name one by --document"):
            pipeline.query(QUESTION)
        with pytest.raises(UsageError, match="cannot be filtered by title"):
            pipeline.query(QUESTION, filter={"title": "x"})


def test_a_document_larger_than_the_budget_is_refused_with_the_numbers(collection, engine):
    store, uri = collection
    with (
        open_blended(store, engine, PAGED, disk_mb=1) as pipeline,
        pytest.raises(CacheCapacityError, match=r"of [\d,]+ tokens take [\d,]+ MB as int8, and kv.disk_mb leaves 0 MB"),
    ):
        pipeline.query(QUESTION, document=uri)


def test_settings_that_leave_the_trained_window_are_refused(collection, engine):
    store, uri = collection
    wide = replace(PAGED, pages=replace(SMALL, budget_tokens=4096))
    with (
        open_blended(store, engine, wide) as pipeline,
        pytest.raises(GenerationError, match="positions would be in use at once"),
    ):
        pipeline.query(QUESTION, document=uri)


def test_an_interrupted_reading_goes_on_where_it_stopped(collection, engine):
    store, uri = collection

    class Progress:
        def __init__(self, stop_at=None):
            self.stop_at, self.windows, self.lines, self.closed = stop_at, 0, [], 0

        def start(self, total_documents, total_bytes, unit="documents"):
            self.total = total_documents

        def advance(self, documents=0, bytes=0, tokens=0):
            self.windows += documents
            if self.windows == self.stop_at:
                raise KeyboardInterrupt

        def message(self, text):
            self.lines.append(text)

        def close(self):
            self.closed += 1

    first, second = Progress(stop_at=7), Progress()
    with open_blended(store, engine, PAGED) as pipeline, pytest.raises(KeyboardInterrupt):
        pipeline.query(QUESTION, document=uri, progress=first)
    with open_blended(store, engine, PAGED) as pipeline:
        pipeline.query(QUESTION, document=uri, progress=second)
    assert second.total == second.windows == first.total - 7
    assert first.closed == 1
    assert first.lines[0].startswith(f"reading {uri} into pages: ")
    assert "MB, about 1 min" in first.lines[0]


def test_removing_a_document_takes_its_pages_from_the_disk(collection, engine):
    store, uri = collection
    with open_blended(store, engine, PAGED) as pipeline:
        pipeline.query(QUESTION, document=uri)
        assert pipeline.store.kv_totals().entries > 30
        status = pipeline.kv_status()
        assert status.chunks == 0
        assert 0.9 < status.page_bytes / status.bytes_by_tier["disk"] <= 1
        pipeline.remove([uri])
        assert pipeline.store.kv_totals().entries == 0
        assert pipeline.parts.paging._open is None


def test_a_stream_goes_on_although_its_document_is_removed_meanwhile(collection, engine):
    store, uri = collection
    with open_blended(store, engine, PAGED) as pipeline:
        expected = pipeline.query(QUESTION, document=uri).text
    with open_blended(store, engine, PAGED) as pipeline:  # its pages lie on the disk alone
        stream = pipeline.stream(QUESTION, document=uri)
        begun = next(stream)
        pipeline.remove([uri])
        assert (begun + "".join(stream)).strip() == expected


def test_answers_about_one_document_take_turns_token_by_token(collection, engine):
    store, uri = collection
    other = "What does the miller grind?"
    with open_blended(store, engine, PAGED) as pipeline:
        alone = [pipeline.query(question, document=uri).text for question in (QUESTION, other)]
        streams = [pipeline.stream(question, document=uri) for question in (QUESTION, other)]
        for _ in range(3):
            for stream in streams:
                next(stream, None)
        assert all(alone)
        assert [stream.answer.text for stream in streams] == alone


def test_a_stream_goes_on_in_another_thread(collection, engine):
    store, uri = collection
    with open_blended(store, engine, PAGED) as pipeline:
        stream = pipeline.stream(QUESTION, document=uri)
        begun = next(stream)
        with ThreadPoolExecutor(1) as pool:
            rest = pool.submit(lambda: "".join(stream)).result(timeout=60)
        assert (begun + rest).strip() == pipeline.query(QUESTION, document=uri).text


def test_another_document_waits_and_the_same_thread_is_told(collection, engine):
    store, uri = collection
    short = uri.replace("long", "short")
    with open_blended(store, engine, PAGED) as pipeline:
        stream = pipeline.stream(QUESTION, document=uri)
        next(stream)
        with pytest.raises(GenerationError, match="an answer from another document's pages is not finished"):
            pipeline.query(QUESTION, document=short)
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(pipeline.query, QUESTION, document=short)
            stream.close()
            assert waiting.result(timeout=60).strategy == "pages"
