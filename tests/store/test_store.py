import sqlite3
import threading
from dataclasses import replace

import numpy as np
import pytest
from store_samples import configure, contents, embed, failed, found_texts, indexed, known, texts_of, update, vector_of

from ragkit.errors import (
    EmbedderMismatchError,
    StoreCorruptError,
    StoreError,
    StoreFormatError,
    StoreMissingError,
    UsageError,
)
from ragkit.store import KVEntry, SourceStatus, SourceUpdate, Store, fts_phrase
from ragkit.store.vectors import ids_digest
from ragkit.types import PageSpan

FOX = "The quick brown fox jumps over the lazy dog. "


def commit(store, *updates):
    with store.writer() as writer:
        configure(writer)
        return writer.commit(list(updates))


# ---------------------------------------------------------------------------------------------- folder


def test_opening_a_folder_without_a_store_names_it(tmp_path):
    with pytest.raises(StoreMissingError, match=f"no store in {tmp_path}.*ragkit ingest"):
        Store.open(tmp_path)
    assert not Store.exists(tmp_path)


def test_creating_a_second_store_in_a_folder_is_refused(store):
    with pytest.raises(StoreError, match="already"):
        Store.create(store.folder)


def test_open_or_create_makes_a_store_once(tmp_path):
    with Store.open_or_create(tmp_path / "s") as first, Store.open_or_create(tmp_path / "s") as second:
        assert first.meta.store_id == second.meta.store_id


def test_a_creation_that_was_cut_short_counts_as_no_store(tmp_path):
    sqlite3.connect(tmp_path / "ragkit.db").execute("PRAGMA journal_mode = WAL")
    with pytest.raises(StoreMissingError):
        Store.open(tmp_path)
    Store.create(tmp_path).close()


def test_a_foreign_sqlite_file_is_no_store(tmp_path):
    sqlite3.connect(tmp_path / "ragkit.db").execute("CREATE TABLE t (a)")
    with pytest.raises(StoreFormatError, match="no ragkit catalogue"):
        Store.open(tmp_path)


def test_an_unknown_full_text_tokenizer_is_refused(tmp_path):
    with pytest.raises(UsageError, match="give one of porter unicode61, unicode61, trigram"):
        Store.create(tmp_path / "s", fts_tokenizer="klingon")
    Store.create(tmp_path / "s").close()


def test_a_new_store_is_empty_at_generation_zero(store):
    counts = store.counts()
    assert (counts.generation, counts.sources, counts.documents, counts.chunks, counts.segments) == (0, 0, 0, 0, 0)
    assert store.meta.embedder_id == ""
    assert store.vectors().row_ids.tolist() == []
    assert store.match('"fox"', 5)[0].tolist() == []
    assert store.rows_where({}).tolist() == []


def test_a_closed_store_says_so(store):
    store.close()
    with pytest.raises(StoreError, match="closed"):
        store.counts()


# ---------------------------------------------------------------------------------------------- reads


def test_a_document_comes_back_joined_from_overlapping_chunks(store):
    text = FOX * 5 + "naïve 東京 \U0001f9d1\u200d\U0001f680 e\u0301 \0 end"
    pages = (PageSpan(1, 0, 50), PageSpan(2, 50, len(text)))
    item = indexed(text, "a.pdf", {"title": "Fox"}, overlap=7, pages=pages)
    report = commit(store, SourceUpdate("a.pdf", "c", 1, 2, documents=(item,), recipe="r"))
    assert (report.added, report.rows) == (("a.pdf",), len(item.chunks))
    assert store.document(item.document.doc_id) == item.document
    assert [stored.chunk for stored in store.chunks(store.row_ids())] == item.chunks


def test_lone_surrogates_survive(store):
    text = "before \ud800 after " * 4
    commit(store, update("file-\udcff.txt", text, metadata={"k": "\udc80"}))
    assert texts_of(store) == {"file-\udcff.txt": [text]}
    assert store.rows_where({"k": "\udc80"}).size == len(store.row_ids())
    assert store.verify().problems == ()


def test_chunks_come_in_the_order_asked_for_with_place_and_metadata(store):
    commit(store, update("a.txt", FOX * 4, metadata={"year": 2020, "note": None, "draft": True, "x": 1.5}))
    first, last = store.chunks([5, 2])
    assert (first.row_id, last.row_id) == (5, 2)
    assert (first.chunk.index, last.chunk.index) == (4, 1)
    assert first.uri == "a.txt"
    assert first.metadata == {"year": 2020, "note": None, "draft": True, "x": 1.5}
    assert store.chunks(np.array([2])) == [last]
    assert store.chunks_by_id([last.chunk.chunk_id, first.chunk.chunk_id]) == [last, first]
    assert store.known_chunks([last.chunk.chunk_id, "unknown"]) == {last.chunk.chunk_id}
    assert store.chunk_at(first.chunk.doc_id, 1) == last
    assert store.chunk_at(first.chunk.doc_id, 99) is None


def test_a_row_of_another_generation_is_an_error_not_a_gap(store):
    commit(store, update("a.txt", FOX))
    with pytest.raises(StoreError, match="chunk 99 is not in generation 2"):
        store.chunks([1, 99])


def test_vectors_belong_to_their_rows(store):
    commit(store, update("a.txt", FOX * 3))
    commit(store, update("b.txt", "Something else entirely. " * 3))
    table = store.vectors()
    assert table.row_ids.tolist() == store.row_ids().tolist()
    assert len(table.parts) == 2
    for part in table.parts:
        for row_id, vector in zip(part.row_ids.tolist(), part.vectors, strict=True):
            assert vector.tolist() == vector_of(store.chunks([row_id])[0].chunk.text).tolist()


def test_vectors_are_mapped_and_read_only(store):
    commit(store, update("a.txt", FOX * 3))
    vectors = store.vectors().parts[0].vectors
    assert isinstance(vectors.base, np.memmap) or isinstance(vectors, np.memmap)
    assert not vectors.flags.writeable


def test_an_unknown_document_is_an_error_that_says_how_to_list_them(store):
    with pytest.raises(StoreError, match="ragkit ls"):
        store.document("0" * 32)
    assert store.links("0" * 32) == []
    assert store.source("nowhere") is None


# ---------------------------------------------------------------------------------------------- search and filters


def test_full_text_search_stems_and_ranks(store):
    commit(store, update("a.txt", "jumping foxes".ljust(24) + "a fox, a fox and a fox  " + "nothing to see here     "))
    row_ids, scores = store.match(fts_phrase(["fox"]), 10)
    assert row_ids.tolist() == [2, 1]
    assert scores.dtype == np.float32
    assert scores[0] > scores[1] > 0
    assert store.match(fts_phrase(["fox"]), 1)[0].tolist() == [2]


def test_full_text_search_within_allowed_rows_keeps_the_scores(store):
    commit(store, update("a.txt", *[f"fox number {n} and {'fox ' * n}" for n in range(6)]))
    row_ids, scores = store.match('"fox"', 100)
    allowed = np.array([2, 4, 5, 77], dtype=np.int64)
    inside, inside_scores = store.match('"fox"', 100, allowed)
    expected = [(row, score) for row, score in zip(row_ids, scores, strict=True) if row in allowed]
    assert list(zip(inside, inside_scores, strict=True)) == expected


def test_quoted_phrases_are_searched_for_and_never_obeyed(store):
    commit(store, update("a.txt", 'say "hello" OR NOT NEAR(x) * ^ : now'))
    for words in (['"hello"'], ["OR", "NOT"], ["NEAR(x)"], ["*"], ["text:hello"], ["a\0b"], [""]):
        store.match(fts_phrase(words), 5)
    assert store.match(fts_phrase(["hello", "or"]), 5)[0].tolist() == [1]


def test_a_broken_full_text_query_is_a_usage_error(store):
    with pytest.raises(UsageError, match="fts_phrase"):
        store.match('"unclosed', 5)


def test_document_frequency_counts_chunks_by_the_index_own_terms(store):
    commit(store, update("a.txt", "fox one", "foxes two", "FÓX fox", "none"))
    assert store.document_frequency(["Foxes", "none", "unicorn", "fox-none", "!", ""]) == {
        "Foxes": 3,
        "none": 1,
        "unicorn": 0,
        "fox-none": 1,
        "!": 0,
        "": 0,
    }


def test_another_full_text_tokenizer_is_kept_with_the_store(tmp_path):
    Store.create(tmp_path / "s", fts_tokenizer="trigram").close()
    with Store.open(tmp_path / "s") as store:
        commit(store, update("a.txt", "東京都庁舎"))
        assert store.match('"京都庁"', 5)[0].tolist() == [1]
        assert store.verify().problems == ()


def test_filters_compare_metadata_as_text_and_combine(store):
    commit(
        store,
        update("a.txt", "one", metadata={"year": 2020, "lang": "en"}),
        update("b.txt", "two", metadata={"year": "2020", "lang": "de"}),
        update("c.txt", "three", metadata={"year": 2020.0, "draft": False}),
    )
    assert store.rows_where({"year": 2020}).tolist() == [1, 2, 3]
    assert store.rows_where({"year": "2020", "lang": "de"}).tolist() == [2]
    assert store.rows_where({"draft": "false"}).tolist() == [3]
    assert store.rows_where({"draft": True}).tolist() == []
    assert store.rows_where({"nothing": 1}).tolist() == []
    assert store.rows_where({}).tolist() == [1, 2, 3]


def test_filters_by_uri_take_names_globs_and_rows_of_a_source(store):
    commit(store, update("docs/a.txt", "one"), update("docs/[b].txt", "two"), update("t.jsonl", "r0", "r1"))
    assert store.rows_where({"uri": "docs/a.txt"}).tolist() == [1]
    assert store.rows_where({"uri": "docs/*"}).tolist() == [1, 2]
    assert store.rows_where({"uri": "docs/[b].txt"}).tolist() == [2]
    assert store.rows_where({"uri": "t.jsonl"}).tolist() == [3, 4]
    assert store.rows_where({"uri": "t.jsonl#row=1"}).tolist() == [4]
    assert store.rows_where({"doc_id": store.chunks([4])[0].chunk.doc_id}).tolist() == [4]


def test_long_metadata_values_are_found_by_equality(store):
    commit(store, update("a.txt", "one", metadata={"abstract": "x" * 5000}), update("b.txt", "two"))
    assert store.rows_where({"abstract": "x" * 5000}).tolist() == [1]
    assert store.rows_where({"abstract": "x" * 4999}).tolist() == []


# ---------------------------------------------------------------------------------------------- writes


def test_an_edited_source_is_replaced_in_one_commit(store):
    commit(store, update("a.txt", "alpha beta"), update("b.txt", "gamma"))
    report = commit(store, update("a.txt", "delta epsilon"))
    assert (report.added, report.updated) == ((), ("a.txt",))
    assert texts_of(store) == {"a.txt": ["delta epsilon"], "b.txt": ["gamma"]}
    assert found_texts(store, "alpha") == []
    assert found_texts(store, "delta") == ["delta epsilon"]
    assert store.verify().problems == ()


def test_a_reader_sees_the_last_committed_generation_while_a_writer_works(store):
    commit(store, update("a.txt", "old text"))
    with store.snapshot() as pinned:
        thread = threading.Thread(target=commit, args=(store, update("a.txt", "new text")))
        thread.start()
        thread.join()
        assert store.generation == pinned == 2
        assert texts_of(store) == {"a.txt": ["old text"]}
    assert store.generation == 3
    assert texts_of(store) == {"a.txt": ["new text"]}


def test_two_files_with_equal_text_share_one_document(store):
    commit(store, update("a.txt", FOX, metadata={"who": "a"}), update("b.txt", FOX, metadata={"who": "b"}))
    counts = store.counts()
    assert (counts.sources, counts.documents, counts.segments) == (2, 1, 1)
    doc_id = store.chunks([1])[0].chunk.doc_id
    assert [(link.source_uri, link.metadata["who"]) for link in store.links(doc_id)] == [("a.txt", "a"), ("b.txt", "b")]
    assert store.rows_where({"who": "b"}).tolist() == store.row_ids().tolist()
    with store.writer() as writer:
        writer.remove(["a.txt"])
    assert texts_of(store) == {"b.txt": [FOX]}
    with store.writer() as writer:
        writer.remove(["b.txt"])
    assert store.counts().chunks == 0
    assert store.verify().problems == ()


def test_a_known_document_is_linked_without_vectors(store):
    commit(store, update("a.txt", FOX))
    doc_id = store.chunks([1])[0].chunk.doc_id
    assert store.document_recipe(doc_id) == "recipe"
    assert commit(store, known("copy.txt", doc_id)).rows == 0
    assert texts_of(store)["copy.txt"] == [FOX]
    with pytest.raises(UsageError, match="is not stored"):
        commit(store, known("other.txt", "f" * 32))


def test_equal_text_cut_anew_replaces_the_chunks_for_all_its_sources(store):
    commit(store, update("a.txt", FOX * 2), update("b.txt", FOX * 2))
    before = store.row_ids().tolist()
    commit(store, update("a.txt", FOX * 2, step=10, recipe="finer"))
    assert set(before).isdisjoint(store.row_ids().tolist())
    assert len(store.row_ids()) == 9
    assert texts_of(store) == {"a.txt": [FOX * 2], "b.txt": [FOX * 2]}
    assert store.document_recipe(store.source_documents("b.txt")[0].doc_id) == "finer"
    assert store.verify().problems == ()


def test_committing_the_same_content_again_adds_nothing(store):
    commit(store, update("a.txt", FOX))
    assert commit(store, update("a.txt", FOX)).rows == 0
    assert store.counts().segments == 1


def test_row_ids_are_never_used_again(store):
    seen = set()
    for text in ("one " * 20, "two " * 20, "three " * 20):
        commit(store, update("a.txt", text))
        rows = set(store.row_ids().tolist())
        assert seen.isdisjoint(rows)
        seen |= rows
        with store.writer() as writer:
            writer.remove(["a.txt"])
            writer.collect(1.0)
    commit(store, update("a.txt", "four"))
    assert store.row_ids().tolist() == [max(seen) + 1]


def test_a_failure_is_recorded_and_its_attempts_are_counted(store):
    assert commit(store, failed("a.pdf", "encrypted")).failed == ("a.pdf",)
    commit(store, failed("a.pdf", "encrypted"))
    (record,) = store.sources(SourceStatus.FAILED)
    assert (record.failure.code, record.failure.stage, record.attempts) == ("encrypted", "parse", 2)
    assert record.failure.message == "a.pdf is encrypted"
    commit(store, failed("a.pdf", "encrypted", content="other"))
    assert store.source("a.pdf").attempts == 1
    commit(store, update("a.pdf", FOX))
    record = store.source("a.pdf")
    assert (record.status, record.failure, record.attempts) == (SourceStatus.OK, None, 0)
    assert store.sources(SourceStatus.FAILED) == []


def test_a_failed_change_keeps_the_good_version_visible(store):
    commit(store, update("a.txt", FOX))
    good = store.source("a.txt").content_sha256
    commit(store, failed("a.txt", content="broken"))
    record = store.source("a.txt")
    assert (record.status, record.indexed_sha256) == (SourceStatus.FAILED, good)
    assert record.content_sha256 != good
    assert texts_of(store) == {"a.txt": [FOX]}
    assert [found.uri for found in store.sources_with_content(good)] == ["a.txt"]


def test_a_renamed_source_keeps_its_rows_and_vectors(store):
    commit(store, update("old.jsonl", "r0 text", "r1 text"), update("other.txt", "x"))
    rows = store.row_ids().tolist()
    with store.writer() as writer:
        writer.relink("old.jsonl", "new.jsonl", size=5, mtime_ns=6)
    assert store.row_ids().tolist() == rows
    assert [link.uri for link in store.source_documents("new.jsonl")] == ["new.jsonl#row=0", "new.jsonl#row=1"]
    assert store.source("old.jsonl") is None
    assert (store.source("new.jsonl").size, store.source("new.jsonl").mtime_ns) == (5, 6)
    with store.writer() as writer, pytest.raises(UsageError, match=r"other\.txt is known already"):
        writer.relink("new.jsonl", "other.txt", size=5, mtime_ns=6)
    assert store.verify().problems == ()


def test_touching_a_source_changes_neither_content_nor_generation(store):
    commit(store, update("a.txt", FOX))
    with store.writer() as writer:
        writer.touch("a.txt", size=7, mtime_ns=8)
    assert (store.source("a.txt").mtime_ns, store.generation) == (8, 2)
    assert store.verify().problems == ()


def test_removing_an_unknown_source_removes_nothing(store):
    commit(store, update("a.txt", FOX))
    with store.writer() as writer, pytest.raises(UsageError, match=r"'b\.txt' is not in the store"):
        writer.remove(["a.txt", "b.txt"])
    assert list(texts_of(store)) == ["a.txt"]


def test_another_embedder_is_refused_by_name_and_dimension(store):
    commit(store, update("a.txt", FOX))
    with (
        store.writer() as writer,
        pytest.raises(EmbedderMismatchError, match=r"embedder@1 \(dimension 8\).*other@2.*16"),
    ):
        configure(writer, "other@2", 16)


def test_the_embedder_may_change_while_nothing_is_stored(store):
    with store.writer() as writer:
        configure(writer, "first@1", 4)
        configure(writer)
    assert (store.meta.embedder_id, store.meta.dim) == ("embedder@1", 8)


def test_embedding_anew_replaces_every_vector_and_the_embedder(store):
    commit(store, update("a.txt", FOX * 3))
    commit(store, update("b.txt", "else " * 30))
    rows = store.row_ids().tolist()
    with store.writer() as writer:
        assert writer.reset_embeddings(embedder_id="other@2", dim=5, embed=embed("new", 5), batch_rows=3) == len(rows)
    assert (store.meta.embedder_id, store.meta.dim) == ("other@2", 5)
    assert store.row_ids().tolist() == rows
    for _, _, documents in contents(store).values():
        for _, _, _, chunks in documents:
            for text, vector in chunks:
                assert vector == vector_of(text, "new", 5).tolist()
    assert store.verify().problems == ()


def test_embedding_anew_with_the_same_embedder_changes_nothing_visible(store):
    commit(store, update("a.txt", FOX * 3))
    before = contents(store)
    with store.writer() as writer:
        writer.reset_embeddings(embedder_id="embedder@1", dim=8, embed=embed())
    assert contents(store) == before
    assert store.verify().problems == ()


def test_an_index_is_recorded_with_what_it_was_made_from(store):
    commit(store, update("a.txt", FOX))
    rows = store.row_ids()
    with store.writer() as writer:
        for content in (b"first", b"second"):
            record = writer.set_index(
                generation=store.generation,
                row_ids=rows,
                kind="ivf",
                params={"lists": 4},
                write=lambda p, content=content: p.write_bytes(content),
            )
    assert store.index_record() == store.checked_index() == record
    assert record.path.read_bytes() == b"second"
    assert (record.generation, record.rows, record.params) == (2, len(rows), {"lists": 4})
    assert record.ids_sha256 == ids_digest(rows)
    assert [path.name for path in (store.folder / "index").iterdir()] == [record.path.name]


def test_a_damaged_index_is_not_handed_out(store):
    commit(store, update("a.txt", FOX))
    with store.writer() as writer:
        record = writer.set_index(
            generation=2, row_ids=store.row_ids(), kind="ivf", params={}, write=lambda p: p.write_bytes(b"index")
        )
    record.path.write_bytes(b"undex")
    assert store.index_record() == record
    assert store.checked_index() is None
    assert [problem.part for problem in store.verify().problems] == ["index"]
    store.verify(repair=True)
    assert store.index_record() is None


def test_kv_entries_lead_to_their_bytes_and_go_with_their_chunk(store):
    commit(store, update("a.txt", "one"), update("b.txt", "two"))
    ids = [stored.chunk.chunk_id for stored in store.chunks([1, 2])]
    blobs = [b"kv of one", b"kv of two!"]
    entries = [
        KVEntry("key1", ids[0], 0, len(blobs[0]), __import__("zlib").crc32(blobs[0])),
        KVEntry("key2", ids[1], len(blobs[0]), len(blobs[1]), __import__("zlib").crc32(blobs[1])),
    ]
    with store.writer() as writer:
        writer.add_kv(blobs, entries)
    path, entry = store.kv_entries(["key2", "absent"])["key2"]
    assert path.read_bytes()[entry.offset : entry.offset + entry.bytes] == b"kv of two!"
    assert path.suffix == ".kv"
    assert store.verify().problems == ()
    with store.writer() as writer:
        writer.remove(["b.txt"])
        assert list(store.kv_entries(["key1", "key2"])) == ["key1"]
        writer.remove(["a.txt"])
    assert store.counts().segments == 0
    with store.writer() as writer, pytest.raises(UsageError, match="key1 does not lie in its segment"):
        writer.add_kv([b"short"], entries[:1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda item: (item.document, item.chunks[:-1], item.vectors[:-1]), "the chunks end at"),
        (lambda item: (item.document, item.chunks[::-1], item.vectors), "does not go on at"),
        (
            lambda item: (item.document, item.chunks, item.vectors[:, :4]),
            r"float32 of shape \(2, 8\), got float32 \(2, 4\)",
        ),
        (lambda item: (item.document, item.chunks, item.vectors.astype(np.float64)), "must be float32"),
        (lambda item: (item.document, item.chunks, item.vectors * np.nan), "not finite"),
    ],
)
def test_a_document_that_contradicts_itself_is_refused_before_anything_is_written(store, change, message):
    item = indexed(FOX, "a.txt")
    bad = type(item)(*change(item))
    with pytest.raises(UsageError, match=message):
        commit(store, SourceUpdate("a.txt", "c", 1, 2, documents=(bad,)))
    assert store.counts().sources == 0
    assert not (store.folder / "segments").exists()


def test_a_group_names_each_source_once(store):
    with pytest.raises(UsageError, match="stands twice"):
        commit(store, update("a.txt", "x"), update("a.txt", "y"))


def test_nested_metadata_is_refused(store):
    with pytest.raises(UsageError, match=r"metadata 'tags' has a value of type list"):
        commit(store, update("a.txt", "x", metadata={"tags": ["a"]}))


def test_damaged_text_is_never_handed_out(store):
    commit(store, update("a.txt", FOX * 2))
    connection = sqlite3.connect(store.folder / "ragkit.db")
    connection.execute("UPDATE chunks SET text = replace(text, 'quick', 'quack') WHERE row_id = 1")
    connection.commit()
    with pytest.raises(StoreCorruptError, match="chunk row 1 does not match its checksum"):
        store.chunks([1])
    assert store.chunks([2])[0].chunk.text in FOX * 2
    with pytest.raises(StoreCorruptError):
        store.document(store.chunks([2])[0].chunk.doc_id)


def test_a_damaged_segment_is_never_handed_out(store):
    commit(store, update("a.txt", FOX * 2))
    (path,) = (store.folder / "segments").rglob("*.arrow")
    content = bytearray(path.read_bytes())
    content[-400] ^= 1
    path.write_bytes(content)
    with pytest.raises(StoreCorruptError, match="do not match their checksum"):
        store.vectors()
    path.write_bytes(content[:-10])
    with pytest.raises(StoreCorruptError, match="were written"):
        store.vectors()
    path.unlink()
    with pytest.raises(StoreCorruptError, match="cannot be read"):
        store.vectors()


def test_segments_are_plain_arrow_files(store):
    import pyarrow as pa

    commit(store, update("a.txt", FOX * 2))
    (path,) = (store.folder / "segments").rglob("*.arrow")
    table = pa.ipc.open_file(str(path)).read_all()
    assert table.schema.to_string() == "row_id: int64\nvector: fixed_size_list<item: float>[8]\n  child 0, item: float"
    assert table["row_id"].to_pylist() == store.row_ids().tolist()
    assert table["vector"].to_pylist() == store.vectors().parts[0].vectors.tolist()


def test_metadata_of_chunks_come_back_and_are_covered_by_the_checksum(store):
    item = update("guide.md", "# Guide of foxes and dogs\nThey live apart, mostly.")
    (document,) = item.documents
    chunks = [replace(chunk, metadata={"heading_path": f"Guide \ud800 {chunk.index}"}) for chunk in document.chunks]
    commit(store, replace(item, documents=(replace(document, chunks=chunks),)))
    found = store.chunks_by_id([chunk.chunk_id for chunk in chunks])
    assert [stored.chunk for stored in found] == chunks
    assert [stored.chunk.metadata["heading_path"] for stored in found] == [f"Guide \ud800 {n}" for n in range(3)]
    connection = sqlite3.connect(store.folder / "ragkit.db")
    connection.execute("UPDATE chunks SET metadata = '' WHERE idx = 1")
    connection.commit()
    connection.close()
    with pytest.raises(StoreCorruptError, match="chunk row"):
        store.chunks_by_id([chunks[1].chunk_id])
