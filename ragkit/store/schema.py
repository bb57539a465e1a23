"""The catalogue's tables, and how a new one is made.

Every row carries `crc`, the CRC-32 of its other columns (ragkit.store.rows), because SQLite detects no rot. Every table
also has a unique index, so that `integrity_check` notices a row that vanished from its B-tree.
"""

from __future__ import annotations

import secrets
import sqlite3

from ragkit.errors import UsageError
from ragkit.store.rows import row_crc

FORMAT_VERSION = 3
APPLICATION_ID = 0x7261676B  # "ragk"; tells a store from any other SQLite file
PAGE_SIZE = 8192

FTS_TOKENIZERS = {
    "porter unicode61": "porter unicode61 remove_diacritics 2",
    "unicode61": "unicode61 remove_diacritics 2",
    "trigram": "trigram",
}
DEFAULT_FTS_TOKENIZER = "porter unicode61"

# The definition of `chunks` is, to the letter, what SQLite makes of that of format 2 when the column is added.
_TABLES = """
CREATE TABLE meta (key TEXT NOT NULL UNIQUE, value TEXT NOT NULL, crc INTEGER NOT NULL);

CREATE TABLE sources (
    source_id INTEGER PRIMARY KEY, uri TEXT NOT NULL UNIQUE, content_sha256 TEXT NOT NULL, size INTEGER NOT NULL,
    mtime_ns INTEGER NOT NULL, media_type TEXT NOT NULL, reader TEXT NOT NULL, recipe TEXT NOT NULL,
    status TEXT NOT NULL, error_code TEXT NOT NULL, error_stage TEXT NOT NULL, error_message TEXT NOT NULL,
    attempts INTEGER NOT NULL, indexed_sha256 TEXT NOT NULL, generation INTEGER NOT NULL, crc INTEGER NOT NULL);
CREATE INDEX sources_by_content ON sources (indexed_sha256);

CREATE TABLE documents (
    doc_key INTEGER PRIMARY KEY, doc_id TEXT NOT NULL UNIQUE, recipe TEXT NOT NULL, characters INTEGER NOT NULL,
    chunks INTEGER NOT NULL, tokens INTEGER NOT NULL, pages TEXT NOT NULL, damaged INTEGER NOT NULL,
    generation INTEGER NOT NULL, crc INTEGER NOT NULL);

CREATE TABLE links (
    link_id INTEGER PRIMARY KEY, source_id INTEGER NOT NULL REFERENCES sources ON DELETE CASCADE,
    position INTEGER NOT NULL, doc_key INTEGER NOT NULL REFERENCES documents, uri TEXT NOT NULL,
    metadata TEXT NOT NULL, crc INTEGER NOT NULL, UNIQUE (source_id, position));
CREATE INDEX links_by_document ON links (doc_key);
CREATE INDEX links_by_uri ON links (uri);

CREATE TABLE link_values (
    link_id INTEGER NOT NULL REFERENCES links ON DELETE CASCADE, key TEXT NOT NULL, value TEXT NOT NULL,
    UNIQUE (link_id, key));
CREATE INDEX link_values_by_value ON link_values (key, value);

CREATE TABLE chunks (
    row_id INTEGER PRIMARY KEY AUTOINCREMENT, chunk_id TEXT NOT NULL UNIQUE,
    doc_key INTEGER NOT NULL REFERENCES documents, idx INTEGER NOT NULL, char_start INTEGER NOT NULL,
    char_stop INTEGER NOT NULL, token_count INTEGER NOT NULL, page INTEGER, text TEXT NOT NULL, crc INTEGER NOT NULL\
, metadata TEXT NOT NULL DEFAULT '',
    UNIQUE (doc_key, idx));

CREATE TABLE segments (
    segment_id INTEGER PRIMARY KEY, sha256 TEXT NOT NULL UNIQUE, kind TEXT NOT NULL, bytes INTEGER NOT NULL,
    rows INTEGER NOT NULL, live_rows INTEGER NOT NULL, first_row INTEGER NOT NULL, last_row INTEGER NOT NULL,
    dim INTEGER NOT NULL, vectors_offset INTEGER NOT NULL, row_ids BLOB NOT NULL, live BLOB NOT NULL,
    group_crcs BLOB NOT NULL, crc INTEGER NOT NULL);

CREATE TABLE vector_index (
    slot INTEGER PRIMARY KEY CHECK (slot = 1), generation INTEGER NOT NULL UNIQUE, name TEXT NOT NULL,
    kind TEXT NOT NULL, sha256 TEXT NOT NULL, ids_sha256 TEXT NOT NULL, rows INTEGER NOT NULL, params TEXT NOT NULL,
    crc INTEGER NOT NULL);
"""

KV_TABLE = """
CREATE TABLE kv (
    kv_id INTEGER PRIMARY KEY, key TEXT NOT NULL, chunk_id TEXT NOT NULL,
    segment_id INTEGER NOT NULL REFERENCES segments ON DELETE CASCADE, offset INTEGER NOT NULL, bytes INTEGER NOT NULL,
    crc32 INTEGER NOT NULL, crc INTEGER NOT NULL, UNIQUE (key, chunk_id));
CREATE INDEX kv_by_chunk ON kv (chunk_id);
CREATE INDEX kv_by_segment ON kv (segment_id);
"""


def full_text_tables(tokenizer: str) -> str:
    """Return the SQL of the full-text index over the chunks' text (external content) and of its vocabulary."""
    if tokenizer not in FTS_TOKENIZERS:
        raise UsageError(f"unknown full-text tokenizer {tokenizer!r}: give one of {', '.join(FTS_TOKENIZERS)}")
    return (
        "CREATE VIRTUAL TABLE chunk_fts USING fts5(text, content='chunks', content_rowid='row_id', "
        f"tokenize='{FTS_TOKENIZERS[tokenizer]}');\n"
        "CREATE VIRTUAL TABLE chunk_vocabulary USING fts5vocab('chunk_fts', 'row');\n"
    )


def create_tables(connection: sqlite3.Connection, tokenizer: str) -> None:
    """Make an empty catalogue within the caller's transaction."""
    for statement in _statements(_TABLES + KV_TABLE + full_text_tables(tokenizer)):
        connection.execute(statement)
    # One tree of up to 16 MB in memory before it is written: bulk ingest merges far less than with the default of 1 MB.
    connection.execute("INSERT INTO chunk_fts (chunk_fts, rank) VALUES ('hashsize', 16777216)")
    values = {
        "format_version": FORMAT_VERSION,
        "store_id": secrets.token_hex(16),
        "fts_tokenizer": tokenizer,
        "generation": 0,
        "last_row_id": 0,
    }
    for key, value in values.items():
        set_meta(connection, key, str(value))
    connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")


def create_statement(what: str) -> str:
    """Return the statement that makes one table or index ("TABLE sources")."""
    (statement,) = [found for found in _statements(_TABLES + KV_TABLE) if found.startswith(f"CREATE {what} ")]
    return statement


def run_script(connection: sqlite3.Connection, script: str) -> None:
    """Run SQL statements within the caller's transaction (`executescript` would commit it)."""
    for statement in _statements(script):
        connection.execute(statement)


def set_meta(connection: sqlite3.Connection, key: str, value: str) -> None:
    """Record one store-wide value."""
    connection.execute(
        "INSERT INTO meta (key, value, crc) VALUES (?, ?, ?) "
        "ON CONFLICT (key) DO UPDATE SET value = excluded.value, crc = excluded.crc",
        (key, value, row_crc(key, value)),
    )


def schema_sql(connection: sqlite3.Connection) -> set[str]:
    """Return the SQL of every table and index that this package makes, for comparison with a fresh catalogue."""
    return {sql for (sql,) in connection.execute("SELECT sql FROM sqlite_schema WHERE sql IS NOT NULL")}


def _statements(script: str) -> list[str]:
    return [statement.strip() for statement in script.split(";\n") if statement.strip()]
