import zlib

from store_samples import configure, update

from ragkit.store import KVEntry


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
