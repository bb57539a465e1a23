"""Fault 6: rot. Whatever bytes flip, the store says so or gives exactly what was stored."""

import random
import shutil
import sqlite3
import zlib

import pytest
from store_samples import configure, contents, embed, failed, found_texts, texts_of, update

from ragkit.errors import StoreError, StoreMissingError
from ragkit.store import KVEntry, SourceStatus, Store
from ragkit.store.verify import verify_store
from ragkit.types import PageSpan

WORDS = ["fox", "dog", "bird", "stone", "river", "cloud"]


def text_of(number):
    return " ".join(f"{WORDS[(number + place) % 6]} number {number} at {place}." for place in range(12))


def fill(folder):
    """A store with everything in it: pages, tables, metadata, failures, dead rows, an index, KV."""
    with Store.create(folder) as store, store.writer() as writer:
        configure(writer)
        pages = (PageSpan(1, 0, 40), PageSpan(2, 40, 80))
        writer.commit([update(f"{n}.txt", text_of(n), metadata={"n": n, "even": n % 2 == 0}) for n in range(8)])
        writer.commit([update("paged.pdf", text_of(20), pages=pages), failed("bad.pdf", "encrypted")])
        writer.commit([update("table.csv", *[text_of(30 + row) for row in range(4)], metadata={"kind": "row"})])
        writer.remove(["3.txt"])
        blobs = [b"K" * 900, b"V" * 1200]
        ids = [stored.chunk.chunk_id for stored in store.chunks(store.row_ids()[:2])]
        offsets = [0, 900]
        writer.add_kv(
            blobs,
            [KVEntry(f"key{i}", ids[i], offsets[i], len(blob), zlib.crc32(blob)) for i, blob in enumerate(blobs)],
        )
        writer.set_index(
            generation=store.generation,
            row_ids=store.row_ids(),
            kind="ivf",
            params={"lists": 2},
            write=lambda path: path.write_bytes(random.Random(1).randbytes(5000)),
        )


def answers(store):
    """What searches, filters and listings give: everything that verify vouches for beyond rows by key."""
    with store.snapshot():
        return {
            "contents": contents(store),
            "sources": store.sources(),
            "counts": store.counts(),
            "match": [[part.tolist() for part in store.match(f'"{word}"', 100)] for word in [*WORDS, "number"]],
            "frequency": store.document_frequency([*WORDS, "number", "7"]),
            "filters": [
                store.rows_where(where).tolist()
                for where in ({"n": 4}, {"even": True}, {"kind": "row"}, {"uri": "*.txt"}, {"uri": "paged.pdf"})
            ],
            "kv": store.kv_entries(["key0", "key1"]).keys(),
            "index": store.checked_index().path.read_bytes(),
            "meta": store.meta,
        }


def flip(path, random_source, length=16):
    """Change 16 neighbouring bytes (fewer at the end of a file), somewhere where the file is not empty."""
    content = bytearray(path.read_bytes())
    start = random_source.choice([place for place, byte in enumerate(content) if byte])
    for place in range(start, min(start + length, len(content))):
        content[place] ^= random_source.randrange(1, 256)
    path.write_bytes(content)


def damage_is_seen(folder, truth, documents, chunks):
    """Whether damage was reported, after asserting that nothing wrong is given out either way."""
    report = verify_store(folder)
    assert all(problem.message and problem.remedy for problem in report.problems)
    try:
        store = Store.open(folder)
    except StoreError:
        assert report.problems
        return True
    with store:
        for row_id, chunk in chunks.items():
            try:
                assert store.chunks([row_id])[0] == chunk
            except StoreError:
                assert report.problems
        for doc_id, document in documents.items():
            try:
                assert store.document(doc_id) == document
            except StoreError:
                assert report.problems
        if report.problems:
            return True
        seen = answers(store)
        assert {key: value for key, value in seen.items() if key != "counts"} == truth
    return False


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pristine") / "store"
    fill(folder)
    with Store.open(folder) as store:
        truth = answers(store)
        del truth["counts"]
        chunks = {stored.row_id: stored for stored in store.chunks(store.row_ids())}
        documents = {stored.chunk.doc_id: store.document(stored.chunk.doc_id) for stored in chunks.values()}
    return folder, truth, documents, chunks


def test_an_undamaged_store_has_no_problems(pristine):
    report = verify_store(pristine[0])
    assert report.problems == ()
    assert (report.documents, report.chunks) == (12, len(pristine[3]))
    assert report.bytes_read > 10_000


@pytest.mark.parametrize("kind", ["ragkit.db", "*.arrow", "*.kv", "*.faiss"])
def test_no_flipped_bytes_ever_give_a_silently_wrong_answer(pristine, memory_path, kind):
    folder, *truth = pristine
    random_source = random.Random(zlib.crc32(kind.encode()))
    seen = 0
    trials = 80 if kind == "ragkit.db" else 40
    for trial in range(trials):
        copy = memory_path / str(trial)
        shutil.copytree(folder, copy)
        flip(random_source.choice(sorted(copy.rglob(kind))), random_source)
        seen += damage_is_seen(copy, *truth)
        shutil.rmtree(copy)
    # free space within the catalogue's pages may rot without consequence; a file of data has none
    assert seen == trials if kind != "ragkit.db" else seen > trials / 4


@pytest.mark.parametrize("kind", ["ragkit.db", "*.arrow", "*.kv", "*.faiss"])
def test_a_missing_or_short_file_is_found(pristine, memory_path, kind):
    copy = memory_path / "copy"
    shutil.copytree(pristine[0], copy)
    path = min(copy.rglob(kind))
    path.write_bytes(path.read_bytes()[:-100])
    assert verify_store(copy).problems
    path.unlink()
    if kind == "ragkit.db":
        with pytest.raises(StoreMissingError):
            verify_store(copy)
    else:
        assert verify_store(copy).problems


def rot(folder, statement, *values):
    connection = sqlite3.connect(folder / "ragkit.db")
    with connection:
        connection.execute(statement, values)
    connection.close()


@pytest.mark.parametrize(
    ("statement", "part"),
    [
        ("UPDATE chunks SET text = 'other words' WHERE row_id = 2", "document"),
        ("UPDATE chunks SET char_start = 1 WHERE row_id = 1", "document"),
        ("DELETE FROM chunks WHERE row_id = 3", "document"),
        ("UPDATE documents SET pages = '[[1, 0, 5]]' WHERE doc_key = 9", "document"),
        ("UPDATE documents SET tokens = x'ff' WHERE doc_key = 1", "document"),
        ("UPDATE links SET metadata = '{}' WHERE link_id = 1", "link"),
        ("UPDATE links SET doc_key = 2 WHERE link_id = 1", "link"),
        ("UPDATE link_values SET value = '5' WHERE rowid = 1", "filter"),
        ("DELETE FROM link_values WHERE rowid = 1", "filter"),
        ("UPDATE sources SET content_sha256 = 'x' WHERE source_id = 1", "source"),
        ("UPDATE sources SET mtime_ns = 'late' WHERE source_id = 1", "source"),
        ("UPDATE segments SET vectors_offset = vectors_offset + 4", "segment"),
        ("UPDATE segments SET live = x'' WHERE live != x''", "segment"),
        ("DELETE FROM segments WHERE first_row = 1", "vectors"),
        ("UPDATE kv SET offset = 5", "kv"),
        ("UPDATE vector_index SET ids_sha256 = 'x'", "index"),
        ("INSERT INTO chunk_fts (chunk_fts, rowid, text) VALUES ('delete', 1, 'fox number 0')", "full_text"),
        ("UPDATE meta SET value = '9' WHERE key = 'dim'", "meta"),
        ("DELETE FROM meta WHERE key = 'generation'", "catalogue"),
        ("DROP INDEX links_by_uri", "catalogue"),
    ],
)
def test_every_kind_of_changed_row_is_found(pristine, memory_path, statement, part):
    copy = memory_path / "copy"
    shutil.copytree(pristine[0], copy)
    rot(copy, statement)
    assert part in {problem.part for problem in verify_store(copy).problems}


def test_a_lost_write_ahead_log_is_found(store):
    with store.writer() as writer:
        configure(writer)
    copy = store.folder.parent / "copy"
    with store.writer() as writer:
        writer.commit([update("a.txt", text_of(1))])
        shutil.copytree(store.folder, copy)
    (copy / "ragkit.db-wal").unlink()
    problems = verify_store(copy).problems
    assert any("generation" in problem.message or problem.part == "catalogue" for problem in problems)


def test_verify_names_the_sources_and_what_to_do(store):
    with store.writer() as writer:
        configure(writer)
        writer.commit([update("a.txt", text_of(1)), update("b.txt", text_of(2))])
    rot(store.folder, "UPDATE chunks SET text = 'other words' WHERE row_id = 2")
    document, full_text = store.verify().problems
    assert (document.part, document.uris) == ("document", ("a.txt",))
    assert "verify --repair" in document.remedy
    assert full_text.part == "full_text"


def test_repair_drops_rotten_text_and_reading_the_source_again_restores_it(store):
    updates = [update("a.txt", text_of(1)), update("b.txt", text_of(2))]
    with store.writer() as writer:
        configure(writer)
        writer.commit(updates)
    before = contents(store)
    rot(store.folder, "UPDATE chunks SET text = 'other words' WHERE row_id = 2")
    assert store.verify(repair=True).marked == ("a.txt",)
    assert [record.uri for record in store.sources(SourceStatus.DAMAGED)] == ["a.txt"]
    assert store.verify().problems == ()
    assert texts_of(store) == {"a.txt": [], "b.txt": [text_of(2)]}
    assert found_texts(store, "other") == []
    with store.writer() as writer:
        writer.commit(updates)
    assert contents(store) == before
    assert store.verify().problems == ()


def test_repair_of_a_rotten_segment_keeps_the_text_and_reading_again_restores_the_vectors(store):
    updates = [update("a.txt", text_of(1)), update("b.txt", text_of(2))]
    with store.writer() as writer:
        configure(writer)
        writer.commit(updates)
        writer.commit([update("c.txt", text_of(3))])
    before = contents(store)
    sql = "SELECT sha256 FROM segments WHERE first_row = 1"
    (sha256,) = sqlite3.connect(store.folder / "ragkit.db").execute(sql).fetchone()
    flip(store.folder / "segments" / sha256[:2] / f"{sha256}.arrow", random.Random(3))
    with pytest.raises(StoreError, match="damaged"):
        store.vectors() if store.verify().problems else None
    assert store.verify(repair=True).marked == ("a.txt", "b.txt")
    assert store.verify().problems == ()
    assert len(store.vectors().row_ids) < store.counts().chunks
    assert found_texts(store, "fox") != []
    doc_id = store.source_documents("a.txt")[0].doc_id
    assert store.document_recipe(doc_id) is None
    assert store.document(doc_id).text == text_of(1)
    with store.writer() as writer:
        writer.commit(updates)
    assert contents(store) == before
    assert store.verify().problems == ()


def test_repair_by_embedding_anew_clears_the_damage_marks(store):
    with store.writer() as writer:
        configure(writer)
        writer.commit([update("a.txt", text_of(1))])
    (path,) = (store.folder / "segments").rglob("*.arrow")
    path.unlink()
    store.verify(repair=True)
    with store.writer() as writer:
        writer.reset_embeddings(embedder_id="embedder@1", dim=8, embed=embed())
    assert len(store.vectors().row_ids) == store.counts().chunks
    assert store.document_recipe(store.source_documents("a.txt")[0].doc_id) == "recipe"


def test_every_row_damage_can_be_repaired_by_marking_and_reading_again(pristine, memory_path):
    statements = [
        "UPDATE links SET metadata = '{}' WHERE link_id = 1",
        "UPDATE sources SET mtime_ns = 'late' WHERE source_id = 1",
        "UPDATE link_values SET value = '5' WHERE rowid = 1",
        "UPDATE kv SET offset = 5",
        "UPDATE vector_index SET ids_sha256 = 'x'",
        "UPDATE documents SET tokens = x'ff' WHERE doc_key = 1",
        "DELETE FROM segments WHERE first_row = 1",
        "INSERT INTO chunk_fts (chunk_fts, rowid, text) VALUES ('delete', 1, 'fox number 0')",
    ]
    again = [update(f"{n}.txt", text_of(n), metadata={"n": n, "even": n % 2 == 0}) for n in range(8) if n != 3]
    for number, statement in enumerate(statements):
        copy = memory_path / str(number)
        shutil.copytree(pristine[0], copy)
        rot(copy, statement)
        with Store.open(copy) as store:
            assert store.verify(repair=True).problems, statement
            assert store.verify().problems == (), statement
            with store.writer() as writer:
                writer.commit(again)
            assert contents(store) == pristine[1]["contents"], statement
            assert store.verify().problems == (), statement
