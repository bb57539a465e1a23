import zlib

import numpy as np
import pytest
from store_samples import add_kv, configure, digest, indexed, kv_key, kv_texts, update, vector_of

from ragkit.store import IndexedDocument, KVEntry, SourceUpdate
from ragkit.store.records import KVTotals, document_owner, owning_chunk
from ragkit.types import Chunk, Document, chunk_id_of


def fill(store):
    """Two KV segments: a and b in one, c in another."""
    with store.writer() as writer:
        configure(writer)
        writer.commit([update("a.txt", "one")])
        chunk_id = store.chunks([1])[0].chunk.chunk_id
        for names in ("ab", "c"):
            blobs = [name.encode() * 10 for name in names]
            entries = [KVEntry(n, chunk_id, 10 * i, 10, zlib.crc32(blobs[i])) for i, n in enumerate(names)]
            writer.add_kv(blobs, entries)


def test_every_stored_kv_is_listed(store):
    assert store.kv_listing() == []
    fill(store)
    assert [entry.key for _, entry in store.kv_listing()] == ["a", "b", "c"]
    assert dict((entry.key, (path, entry)) for path, entry in store.kv_listing()) == store.kv_entries(["a", "b", "c"])


def test_removed_kv_is_a_miss_and_its_file_goes_with_the_last_entry(store):
    fill(store)
    files = [path for path, _ in store.kv_listing()]
    with store.writer() as writer:
        writer.remove_kv(["a", "c", "unknown"])
        assert list(store.kv_entries(["a", "b", "c"])) == ["b"]
        assert [path.exists() for path in files] == [True, True, False]
        writer.remove_kv(["b"])
        assert not files[0].exists()
    assert store.verify().problems == ()


def test_damaged_kv_needs_a_repair_and_no_source(store):
    fill(store)
    path = store.kv_listing()[0][0]
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    [problem] = store.verify().problems
    assert (problem.part, problem.uris) == ("segment", ())
    assert problem.remedy == "run `ragkit verify --repair`: the KV is computed again when it is needed"
    assert store.verify(repair=True).marked == ()
    assert store.verify().problems == ()


def test_kv_of_a_whole_document_goes_with_its_chunk_and_never_to_another_of_the_same_text(store):
    with store.writer() as writer:
        configure(writer)
        writer.commit([update("a.txt", "one")])
        chunk_id = store.chunks([1])[0].chunk.chunk_id
        owners = {"a": chunk_id, "b": document_owner(chunk_id)}
        for name, owner in owners.items():
            writer.add_kv([name.encode() * 10], [KVEntry(name, owner, 0, 10, zlib.crc32(name.encode() * 10))])
        writer.commit([cut("b.txt", ["one", " and more"])])
        writer.remove(["a.txt"])
    assert [entry.key for _, entry in store.kv_listing()] == ["a"]
    assert owning_chunk(document_owner(chunk_id)) == owning_chunk(chunk_id) == chunk_id


PARTS = ["the first part of a text", "a second part: otherwise", "third and last it stands"]  # 24 characters each


def cut(uri, texts):
    """One source of one document with these chunks."""
    document = Document.from_text("".join(texts), uri)
    chunks, start = [], 0
    for index, text in enumerate(texts):
        stop = start + len(text)
        chunk_id = chunk_id_of(document.doc_id, start, stop)
        chunks.append(Chunk(chunk_id, document.doc_id, index, text, start, stop, 7))
        start = stop
    vectors = np.stack([vector_of(text) for text in texts])
    item = IndexedDocument(document, chunks, vectors)
    return SourceUpdate(uri, digest(*texts), start, 1_000, documents=(item,))


def commit(store, *updates):
    with store.writer() as writer:
        if store.generation == 0:
            configure(writer)
        report = writer.commit(updates)
    return report


@pytest.fixture
def with_kv(store):
    commit(store, update("a.txt", "".join(PARTS)))
    with store.writer() as writer:
        add_kv(store, writer)
    return store


def test_an_edited_document_keeps_the_kv_of_its_unchanged_chunks(with_kv):
    edited = cut("a.txt", [PARTS[0], "now it says another thing", PARTS[2]])  # the last chunk moves by one character
    before, after = indexed("".join(PARTS), "a.txt").chunks, edited.documents[0].chunks
    report = commit(with_kv, edited)
    assert kv_texts(with_kv) == sorted([PARTS[0], PARTS[2]])
    assert report.heirs == {before[index].chunk_id: after[index].chunk_id for index in (0, 2)}


def test_a_text_that_stands_elsewhere_keeps_its_kv(with_kv):
    commit(with_kv, update("b.txt", PARTS[1] + "something else behind it"))
    with with_kv.writer() as writer:
        writer.remove(["a.txt"])
    assert kv_texts(with_kv) == [PARTS[1]]
    with with_kv.writer() as writer:
        writer.remove(["b.txt"])
    assert with_kv.kv_listing() == []


def test_kv_whose_text_is_nowhere_any_more_goes_with_its_file(with_kv):
    [path] = {path for path, _ in with_kv.kv_listing()}
    commit(with_kv, update("a.txt", "altogether different text"))
    assert with_kv.kv_listing() == []
    with_kv.gc()
    assert not path.exists()


def test_gc_writes_a_mostly_dead_kv_segment_anew(with_kv):
    [before] = {path for path, _ in with_kv.kv_listing()}
    assert with_kv.gc().rewritten_segments == 0
    commit(with_kv, cut("a.txt", ["other", "things", PARTS[2]]))
    assert before.exists()
    report = with_kv.gc()
    assert (report.rewritten_segments, before.exists()) == (1, False)
    assert kv_texts(with_kv) == [PARTS[2]]
    [(path, entry)] = with_kv.kv_listing()
    assert path.read_bytes() == kv_key(PARTS[2]).encode() == path.read_bytes()[entry.offset :][: entry.bytes]
    assert with_kv.kv_totals() == KVTotals(1, 64)
    assert with_kv.verify().problems == ()


def test_gc_forgets_kv_that_is_damaged(with_kv):
    [path] = {path for path, _ in with_kv.kv_listing()}
    commit(with_kv, cut("a.txt", ["other", "things", PARTS[2]]))
    path.write_bytes(bytes(path.stat().st_size))
    with_kv.gc()
    assert with_kv.kv_listing() == []
    assert with_kv.verify().problems == ()


def test_a_document_that_is_cut_again_keeps_the_kv_of_equal_chunks(with_kv):
    commit(with_kv, update("a.txt", "".join(PARTS), step=48, recipe="other"))
    assert kv_texts(with_kv) == [PARTS[2]]


def test_an_heir_that_has_the_kv_itself_keeps_its_own(with_kv):
    commit(with_kv, update("b.txt", PARTS[0]))
    [heir] = [one.chunk.chunk_id for one in with_kv.chunks(with_kv.row_ids()) if one.uri == "b.txt"]
    with with_kv.writer() as writer:
        key = kv_key(PARTS[0])
        writer.add_kv([b"own"], [KVEntry(key, heir, 0, 3, zlib.crc32(b"own"))])
        writer.remove(["a.txt"])
    [(_, entry)] = with_kv.kv_listing()
    assert (entry.chunk_id, entry.bytes) == (heir, 3)


def test_erasing_one_of_two_places_leaves_no_entry_without_its_file(with_kv):
    commit(with_kv, update("b.txt", PARTS[1]))
    with with_kv.writer() as writer:
        writer.remove(["a.txt"], erase=True)
    assert kv_texts(with_kv) == []  # erasure takes whole files; what else they held is computed again
