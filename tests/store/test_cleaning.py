"""Garbage collection and erasure."""

import os
import threading
import zlib

import pytest
from store_samples import configure, contents, texts_of, update

import ragkit.store.writer
from ragkit.errors import StoreCorruptError, StoreLockedError
from ragkit.store import KVEntry, Store, cleaning
from ragkit.store.connections import connect
from ragkit.store.files import TEMPORARY_PREFIX

SECRET = "xyzzyplugh"
VECTOR_MARK = 1234.5678


def commit(store, *updates):
    with store.writer() as writer:
        configure(writer)
        return writer.commit(list(updates))


def files_below(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def files_with(folder, content):
    return [path for path in files_below(folder) if content in path.read_bytes()]


def test_gc_removes_what_nothing_references_and_says_how_much_that_freed(store):
    commit(store, update("a.txt", "alpha " * 2000))
    commit(store, update("b.txt", "beta " * 200))
    with store.writer() as writer:
        writer.remove(["a.txt"])
    (store.folder / "segments" / f"{TEMPORARY_PREFIX}123").write_bytes(b"unfinished")
    (store.folder / "index").mkdir()
    (store.folder / "index" / "3.faiss").write_bytes(b"old")
    before = sum(path.stat().st_size for path in files_below(store.folder))
    report = store.gc()
    after = sum(path.stat().st_size for path in files_below(store.folder))
    assert (report.removed_files, report.pending_files) == (3, 0)
    assert report.bytes_freed == before - after > 20_000
    assert len(files_below(store.folder / "segments")) == 1
    assert store.gc().removed_files == 0
    assert store.verify().problems == ()


def test_gc_rewrites_segments_under_half_live_and_keeps_ids_and_vectors(store, monkeypatch):
    monkeypatch.setattr(cleaning, "SMALL_BYTES", 0)  # no merging here
    commit(store, *[update(f"{n}.txt", f"text {n} " * 20) for n in range(5)])
    commit(store, update("other.txt", "else " * 20))
    with store.writer() as writer:
        writer.remove(["0.txt", "2.txt"])
    assert store.gc().rewritten_segments == 0
    with store.writer() as writer:
        writer.remove(["3.txt"])
    before = contents(store)
    rows = store.row_ids().tolist()
    assert store.gc().rewritten_segments == 1
    assert contents(store) == before
    assert store.row_ids().tolist() == rows
    assert store.verify().problems == ()


def test_gc_merges_small_neighbours_into_one_segment(store):
    for number in range(6):
        commit(store, update(f"{number}.txt", f"text {number}"))
    with store.writer() as writer:
        writer.remove(["2.txt"])
    before = contents(store)
    assert store.gc().rewritten_segments == 5
    assert store.counts().segments == 1
    assert store.gc().rewritten_segments == 0
    assert contents(store) == before
    with store.writer() as writer:  # deleting from a segment whose ids have gaps
        writer.remove(["3.txt"])
    assert "3.txt" not in contents(store)
    commit(store, update("9.txt", "text 9"))
    store.gc()
    assert sorted(texts_of(store)) == ["0.txt", "1.txt", "4.txt", "5.txt", "9.txt"]
    assert store.verify().problems == ()


def test_gc_leaves_files_that_a_pinned_reader_may_still_open(store):
    commit(store, update("a.txt", "alpha " * 50))
    before = contents(store)
    pinned, released = threading.Event(), threading.Event()
    seen = []

    def read():
        with Store.open(store.folder) as other, other.snapshot():
            pinned.set()
            released.wait()
            seen.append(contents(other))

    reader = threading.Thread(target=read)
    reader.start()
    pinned.wait()
    with store.writer() as writer:
        writer.remove(["a.txt"])
    assert store.gc(reader_timeout_s=0.1).pending_files == 1
    released.set()
    reader.join()
    assert seen == [before]
    assert store.gc().removed_files == 1


def test_mapped_vectors_outlive_their_file(store):
    commit(store, update("a.txt", "alpha " * 50))
    table = store.vectors()
    copy = table.parts[0].vectors.copy()
    with store.writer() as writer:
        writer.remove(["a.txt"])
    assert store.gc().removed_files == 1
    assert (table.parts[0].vectors == copy).all()


def secret_store(store):
    """Hide a secret in every place: old versions, dead rows, shared segments, KV, index, free pages; return vectors."""
    first = update("secret.txt", f"{SECRET} first version " * 600)
    second = update("secret.txt", f"{SECRET} in the open " * 30, metadata={"note": SECRET})
    commit(store, update("public.txt", "nothing to hide " * 30), first)
    commit(store, second)
    chunk_ids = [stored.chunk.chunk_id for stored in store.chunks(store.rows_where({"uri": "secret.txt"}))]
    blob = f"kv of {SECRET}".encode()
    with store.writer() as writer:
        writer.add_kv([blob], [KVEntry("k", chunk_ids[0], 0, len(blob), zlib.crc32(blob))])
        writer.set_index(
            generation=3, row_ids=store.row_ids(), kind="ivf", params={}, write=lambda p: p.write_bytes(blob)
        )
    return {vector.tobytes() for version in (first, second) for vector in version.documents[0].vectors}


def test_erasing_overwrites_text_terms_metadata_vectors_kv_and_index(store, monkeypatch):
    def careless(folder, *, writable=False):
        connection = connect(folder, writable=writable)
        connection.execute("PRAGMA secure_delete = OFF")  # many builds of SQLite overwrite nothing of their own accord
        return connection

    monkeypatch.setattr(ragkit.store.writer, "connect", careless)
    vectors = secret_store(store)
    assert len(vectors) > 20
    assert files_with(store.folder, SECRET.encode())
    assert all(files_with(store.folder, vector) for vector in vectors)
    public = contents(store)["public.txt"]
    with store.writer() as writer:
        assert writer.remove(["secret.txt"], erase=True) == ("secret.txt",)
        # before the last connection closes: nothing may wait in the write-ahead log either
        assert files_with(store.folder, SECRET.encode()) == []
    assert files_with(store.folder, SECRET[2:8].encode()) == []  # no stem or prefix of it in the full-text index
    assert [vector for vector in vectors if files_with(store.folder, vector)] == []
    assert contents(store) == {"public.txt": public}
    assert store.index_record() is None
    assert store.verify().problems == ()


def test_plain_removal_hides_but_does_not_promise_to_overwrite(store):
    secret_store(store)
    with store.writer() as writer:
        writer.remove(["secret.txt"])
    assert "secret.txt" not in contents(store)
    assert store.match(f'"{SECRET}"', 5)[0].tolist() == []
    assert store.verify().problems == ()


def test_text_that_another_source_holds_too_is_not_erased(store):
    commit(store, update("a.txt", "shared words " * 9), update("b.txt", "shared words " * 9))
    with store.writer() as writer:
        writer.remove(["a.txt"], erase=True)
    assert texts_of(store) == {"b.txt": ["shared words " * 9]}
    assert store.verify().problems == ()


def test_erasing_waits_for_readers_and_is_finished_by_the_next_collection(store):
    secret_store(store)
    with Store.open(store.folder) as other:
        pinned, released = threading.Event(), threading.Event()

        def read():
            with other.snapshot():
                pinned.set()
                released.wait()

        reader = threading.Thread(target=read)
        reader.start()
        pinned.wait()
        with store.writer() as writer, pytest.raises(StoreLockedError, match="still pins an older generation"):
            writer.remove(["secret.txt"], erase=True, reader_timeout_s=0.1)
        assert "secret.txt" not in contents(store)
        assert files_with(store.folder, SECRET.encode())
        released.set()
        reader.join()
    store.gc()
    assert files_with(store.folder, SECRET.encode()) == []
    assert store.verify().problems == ()


def test_an_unfinished_erasure_does_not_keep_a_damaged_store_from_being_repaired(store):
    secret_store(store)
    for path in (store.folder / "segments").rglob("*.arrow"):
        path.write_bytes(b"rot")
    with store.writer() as writer, pytest.raises(StoreCorruptError):
        writer.remove(["secret.txt"], erase=True)
    store.verify(repair=True)
    with store.writer():
        pass
    assert files_with(store.folder, SECRET.encode()) == []
    assert store.verify().problems == ()


def test_a_catalogue_that_is_mostly_free_pages_is_shrunk(store):
    commit(store, *[update(f"{n}.txt", f"text number {n} " * 300) for n in range(40)])
    store.gc()
    before = os.stat(store.folder / "ragkit.db").st_size
    with store.writer() as writer:
        writer.remove([f"{n}.txt" for n in range(1, 40)])
    store.gc()
    assert os.stat(store.folder / "ragkit.db").st_size < before / 2
    connection = connect(store.folder)
    assert connection.execute("PRAGMA freelist_count").fetchone() == (0,)
    connection.close()
    assert store.verify().problems == ()
