"""Stores of the format before this one are upgraded in one transaction; newer ones are refused."""

import os
import sqlite3

import pytest
from store_children import in_child
from store_samples import configure, contents, failed, texts_of, update

from ragkit.errors import StoreCorruptError, StoreFormatError, StoreSpaceError
from ragkit.store import Store, faults
from ragkit.store.rows import row_crc
from ragkit.store.schema import FORMAT_VERSION, set_meta

# What version 1 wrote, frozen: no KV references, and sources without `indexed_sha256`.
SOURCES_1 = """
CREATE TABLE sources (
    source_id INTEGER PRIMARY KEY, uri TEXT NOT NULL UNIQUE, content_sha256 TEXT NOT NULL, size INTEGER NOT NULL,
    mtime_ns INTEGER NOT NULL, media_type TEXT NOT NULL, reader TEXT NOT NULL, recipe TEXT NOT NULL,
    status TEXT NOT NULL, error_code TEXT NOT NULL, error_stage TEXT NOT NULL, error_message TEXT NOT NULL,
    attempts INTEGER NOT NULL, generation INTEGER NOT NULL, crc INTEGER NOT NULL)
"""
# What version 2 wrote, frozen: chunks without metadata.
CHUNKS_2 = """\
CREATE TABLE chunks (
    row_id INTEGER PRIMARY KEY AUTOINCREMENT, chunk_id TEXT NOT NULL UNIQUE,
    doc_key INTEGER NOT NULL REFERENCES documents, idx INTEGER NOT NULL, char_start INTEGER NOT NULL,
    char_stop INTEGER NOT NULL, token_count INTEGER NOT NULL, page INTEGER, text TEXT NOT NULL, crc INTEGER NOT NULL,
    UNIQUE (doc_key, idx))"""
COLUMNS_1 = (
    "source_id, uri, content_sha256, size, mtime_ns, media_type, reader, recipe, status, error_code, error_stage, "
    "error_message, attempts, generation"
)


def make_version_1(folder):
    """Fill a store and turn its catalogue into what version 1 would have written."""
    with Store.create(folder) as store, store.writer() as writer:
        configure(writer)
        writer.commit([update(f"{n}.txt", f"text {n} about foxes", metadata={"n": n}) for n in range(3)])
        writer.commit([failed("bad.pdf"), update("t.csv", "row zero", "row one")])
        before = contents(store)
    connection = sqlite3.connect(folder / "ragkit.db", isolation_level=None)
    rows = connection.execute(f"SELECT {COLUMNS_1} FROM sources").fetchall()
    connection.execute("ALTER TABLE chunks DROP COLUMN metadata")
    connection.execute("DROP TABLE kv")
    connection.execute("DROP TABLE sources")
    connection.execute(SOURCES_1)
    for row in rows:
        connection.execute(f"INSERT INTO sources VALUES ({','.join('?' * 15)})", (*row, row_crc(*row)))
    set_meta(connection, "format_version", "1")
    connection.close()
    return before


def make_version_2(folder):
    """Fill a store and turn its catalogue into what version 2 would have written: chunks had no metadata."""
    with Store.create(folder) as store, store.writer() as writer:
        configure(writer)
        writer.commit([update(f"{n}.txt", f"text {n} about foxes", metadata={"n": n}) for n in range(3)])
        before = contents(store)
    connection = sqlite3.connect(folder / "ragkit.db", isolation_level=None)
    connection.execute("ALTER TABLE chunks DROP COLUMN metadata")
    assert connection.execute("SELECT sql FROM sqlite_schema WHERE name = 'chunks'").fetchone() == (CHUNKS_2,)
    set_meta(connection, "format_version", "2")
    connection.close()
    return before


def version_on_disk(folder):
    connection = sqlite3.connect(folder / "ragkit.db")
    (value,) = connection.execute("SELECT value FROM meta WHERE key = 'format_version'").fetchone()
    connection.close()
    return int(value)


def test_opening_a_version_1_store_upgrades_it_and_keeps_everything(tmp_path):
    before = make_version_1(tmp_path / "s")
    assert version_on_disk(tmp_path / "s") == 1
    with Store.open(tmp_path / "s") as store:
        assert store.meta.format_version == FORMAT_VERSION == 3
        assert contents(store) == before
        assert store.source("0.txt").indexed_sha256 == store.source("0.txt").content_sha256
        assert store.source("bad.pdf").indexed_sha256 == ""
        assert store.kv_entries(["k"]) == {}
        assert store.verify().problems == ()
        with store.writer() as writer:
            writer.commit([update("new.txt", "added after the upgrade")])
        assert texts_of(store)["new.txt"] == ["added after the upgrade"]
    assert version_on_disk(tmp_path / "s") == 3


def test_opening_a_version_2_store_upgrades_it_and_keeps_everything(tmp_path):
    before = make_version_2(tmp_path / "s")
    with Store.open(tmp_path / "s") as store:
        assert store.meta.format_version == 3
        assert contents(store) == before
        assert [chunk.chunk.metadata for chunk in store.chunks(store.row_ids())] == [{}] * 3
        assert store.verify().problems == ()
        with store.writer() as writer:
            writer.commit([update("0.txt", "another text")])
        assert texts_of(store)["0.txt"] == ["another text"]


@pytest.mark.crash
def test_a_crash_during_an_upgrade_leaves_the_old_version_and_the_next_opening_completes(tmp_path):
    before = make_version_1(tmp_path / "s")

    def crash(step):
        def work():
            os.environ["RAGKIT_CRASH_AT"] = str(step)
            faults.restart()
            Store.open(tmp_path / "s")

        return work

    assert [in_child(crash(step)) for step in (1, 2)] == [faults.CRASH_EXIT_CODE] * 2
    assert version_on_disk(tmp_path / "s") == 1
    with Store.open(tmp_path / "s") as store:
        assert contents(store) == before
        assert store.verify().problems == ()


def test_an_upgrade_that_cannot_be_written_is_rolled_back(tmp_path, monkeypatch):
    before = make_version_1(tmp_path / "s")
    monkeypatch.setenv("RAGKIT_ENOSPC_AT", "2")
    with pytest.raises(StoreSpaceError):
        Store.open(tmp_path / "s")
    monkeypatch.delenv("RAGKIT_ENOSPC_AT")
    assert version_on_disk(tmp_path / "s") == 1
    with Store.open(tmp_path / "s") as store:
        assert contents(store) == before


def test_an_upgrade_does_not_carry_damage_over(tmp_path):
    make_version_1(tmp_path / "s")
    connection = sqlite3.connect(tmp_path / "s" / "ragkit.db")
    connection.execute("UPDATE sources SET uri = 'wrong.txt' WHERE uri = '0.txt'")
    connection.commit()
    connection.close()
    with pytest.raises(StoreCorruptError):
        Store.open(tmp_path / "s")
    assert version_on_disk(tmp_path / "s") == 1


@pytest.mark.parametrize(
    ("version", "message"), [(4, "format 4, this ragkit writes format 3: upgrade"), (0, "impossible")]
)
def test_a_store_of_an_unknown_format_is_refused(tmp_path, version, message):
    Store.create(tmp_path / "s").close()
    connection = sqlite3.connect(tmp_path / "s" / "ragkit.db", isolation_level=None)
    set_meta(connection, "format_version", str(version))
    connection.close()
    with pytest.raises(StoreFormatError, match=message):
        Store.open(tmp_path / "s")
