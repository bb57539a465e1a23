"""Rows of a database: one a document, named by their ids, drawn as a stream."""

from __future__ import annotations

import sqlite3
import traceback
import tracemalloc
from pathlib import Path

import pytest

from ragkit.errors import MissingExtraError, ReadError, UsageError
from ragkit.readers import ReadLimits, ReadResult, discover, read_source, sql_source

sqlalchemy = pytest.importorskip("sqlalchemy", reason="the extra sql is not installed")

ROWS = [("a", "Frogs live in ponds.", "Ann", 2020, None), ("b/2", "Stars shine.", "Bob", 2021, b"\x00\x01")]


@pytest.fixture
def database(tmp_path: Path) -> Path:
    path = tmp_path / "notes.db"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE notes (id TEXT, text TEXT, author TEXT, year INTEGER, blob BLOB)")
        connection.executemany("INSERT INTO notes VALUES (?,?,?,?,?)", ROWS)
    connection.close()
    return path


def read(path: Path, query: str, **limits: int) -> ReadResult:
    source = next(discover([sql_source(f"sqlite:///{path}", query)]))
    return read_source(source, ReadLimits(**limits))


def change(path: Path, statement: str) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute(statement)
    connection.close()


def test_a_row_is_a_document_named_by_its_id(database: Path):
    result = read(database, "SELECT * FROM notes")
    name = f"sqlite:///{database}?query=SELECT+%2A+FROM+notes"
    assert result.source.uri == name
    assert [(one.uri, one.text, one.metadata) for one in result.documents] == [
        (f"{name}#id=a", "Frogs live in ponds.", {"id": "a", "author": "Ann", "year": 2020, "blob": None}),
        (f"{name}#id=b/2", "Stars shine.", {"id": "b/2", "author": "Bob", "year": 2021}),
    ]


def test_without_an_id_rows_are_numbered(database: Path):
    result = read(database, "SELECT text, year FROM notes")
    assert [one.uri.rpartition("#")[2] for one in result.documents] == ["row=1", "row=2"]


def test_without_a_text_column_a_row_becomes_lines(database: Path):
    result = read(database, "SELECT id, author, year FROM notes")
    assert [one.text for one in result.documents] == [
        "id: a\nauthor: Ann\nyear: 2020",
        "id: b/2\nauthor: Bob\nyear: 2021",
    ]
    assert result.documents[1].uri.endswith("#id=b/2")


def test_an_id_that_stands_twice_is_a_failed_row(database: Path):
    change(database, "INSERT INTO notes VALUES ('a', 'Again.', '', 0, NULL)")
    result = read(database, "SELECT * FROM notes")
    assert [(row.row, row.code) for row in result.failed_rows] == [(3, "duplicate")]
    assert "'a' stands in row 1 already" in result.failed_rows[0].message
    assert len(result.documents) == 2


def test_the_order_of_rows_does_not_count_as_a_change(database: Path):
    orders = [read(database, f"SELECT * FROM notes ORDER BY id {order}").content_sha256 for order in ("ASC", "DESC")]
    assert orders[0] == orders[1]
    change(database, "UPDATE notes SET year = 1999 WHERE id = 'a'")
    assert read(database, "SELECT * FROM notes ORDER BY id").content_sha256 != orders[0]


def test_colons_and_per_cents_in_a_query_are_the_databases_business(database: Path):
    query = "SELECT id, text || ' :author 12:30' AS text FROM notes WHERE text LIKE 'Fr%'"
    assert [one.text for one in read(database, query).documents] == ["Frogs live in ponds. :author 12:30"]


def test_a_query_may_stand_in_the_url_as_one_types_it(database: Path):
    source = next(discover([f"sqlite:///{database}?query=SELECT id, text FROM notes WHERE id = 'a'"]))
    assert [one.text for one in read_source(source).documents] == ["Frogs live in ponds."]


def test_a_database_is_only_read(database: Path):
    with pytest.raises(ReadError, match="readonly database") as caught:
        read(database, "DELETE FROM notes")
    assert caught.value.code == "unreadable"
    assert len(read(database, "SELECT * FROM notes").documents) == 2


def test_rows_are_not_all_in_memory(tmp_path: Path):
    path = tmp_path / "big.db"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE big (id INTEGER PRIMARY KEY, text TEXT)")
        connection.executemany("INSERT INTO big VALUES (?,?)", ((n, f"{n} " * 2000) for n in range(8000)))
    connection.close()
    tracemalloc.start()
    try:
        result = read(path, "SELECT id, text FROM big")
        assert sum(1 for _ in result.documents) == 8000
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    characters = sum(len(str(n)) + 1 for n in range(8000)) * 2000
    assert characters > 75e6
    assert peak < 0.7 * characters  # 32 million are held before the rest goes to disk


def test_limits_hold_for_rows(database: Path):
    with pytest.raises(ReadError, match="documents or too much text") as caught:
        read(database, "SELECT * FROM notes", max_documents=1)
    assert caught.value.code == "too_large"


@pytest.mark.parametrize(
    ("query", "code", "said"),
    [
        ("SELECT * FROM nowhere", "unreadable", "no such table: nowhere"),
        ("SELECT * FROM notes WHERE id = 'z'", "empty", "gave no row with text"),
        ("PRAGMA user_version = 3", "unreadable", "readonly"),
    ],
)
def test_what_is_wrong_with_a_query_is_one_line(database: Path, query: str, code: str, said: str):
    with pytest.raises(ReadError, match=said) as caught:
        read(database, query)
    assert caught.value.code == code
    assert str(caught.value).startswith(f"sqlite:///{database}?query=")
    assert "sqlalche.me" not in str(caught.value)


def test_a_database_that_is_not_there_is_not_made(tmp_path: Path):
    with pytest.raises(UsageError, match="there is no database"):
        discover([sql_source(f"sqlite:///{tmp_path}/none.db", "SELECT 1")])
    assert not (tmp_path / "none.db").exists()


def test_a_url_without_a_query_says_what_to_do(database: Path):
    with pytest.raises(UsageError, match=r"names nothing to read: add \?query="):
        discover([f"sqlite:///{database}"])
    with pytest.raises(UsageError, match="has a query of its own"):
        sql_source(f"sqlite:///{database}?query=SELECT 1", "SELECT 2")
    with pytest.raises(UsageError, match="names no database"):
        sql_source("s3://bucket", "SELECT 2")


def test_credentials_of_a_database_show_nowhere(monkeypatch: pytest.MonkeyPatch):
    class Engine:
        def connect(self):
            raise sqlalchemy.exc.OperationalError(
                "", {}, RuntimeError("password hunter2 of bob refused\nDETAIL: hunter2")
            )

    monkeypatch.setattr("ragkit.readers.sql._engine", lambda url: Engine())
    source = next(discover([sql_source("postgresql://bob:hunter2@db.example/d", "SELECT 1 AS text")]))
    assert source.uri == "postgresql://db.example/d?query=SELECT+1+AS+text"
    assert "hunter2" not in repr(source)
    with pytest.raises(ReadError, match=r"password \*\*\* of bob refused") as caught:
        read_source(source)
    assert "hunter2" not in "".join(traceback.format_exception(caught.value))


def test_a_missing_driver_is_named_before_anything_is_read():
    with pytest.raises(MissingExtraError, match="needs a driver: No module named 'pymysql'") as caught:
        discover([sql_source("mysql+pymysql://u:hunter2@h/d", "SELECT 1 AS text")])
    assert "hunter2" not in str(caught.value)


def test_a_missing_dialect_says_what_to_install():
    with pytest.raises(MissingExtraError, match=r"^duckdb:///notes needs the SQLAlchemy dialect 'duckdb': install "):
        next(discover([sql_source("duckdb:///notes", "SELECT 1 AS text")]))


def test_what_is_no_select_is_said_beside_the_databases_own_words(database: Path):
    with pytest.raises(ReadError, match=r"; the query must be a SELECT$"):
        read(database, "shoe all")
    with pytest.raises(ReadError, match=r"no such table: absent$"):
        read(database, "WITH a AS (SELECT 1) SELECT * FROM absent")
