"""Full-text search over the chunks: SQLite FTS5 with BM25 (k1 = 1.2, b = 0.75)."""

from __future__ import annotations

import json
import os
import sqlite3
import threading
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from ragkit.errors import UsageError
from ragkit.store.schema import FTS_TOKENIZERS

if TYPE_CHECKING:
    from ragkit.store.records import RowIds, Vectors


def fts_phrase(tokens: Iterable[str]) -> str:
    """Return a quoted FTS5 phrase of these words; whatever they hold, they are searched for, never obeyed."""
    return '"' + " ".join(tokens).replace('"', '""').replace("\0", " ") + '"'


def search_text(
    connection: sqlite3.Connection, fts_query: str, limit: int, allowed: RowIds | None
) -> tuple[RowIds, Vectors]:
    """Return row ids and scores of the best `limit` chunks, best first, ties by row id."""
    import numpy as np

    values: tuple[object, ...]
    if allowed is None:
        # bm25() rather than the hidden column rank: sorting by rank scores every row a second time
        sql = "SELECT rowid, bm25(chunk_fts) AS score FROM chunk_fts WHERE chunk_fts MATCH ? ORDER BY score LIMIT ?"
        values = (fts_query, limit)
    else:
        # the unary plus keeps SQLite from running the query once for every allowed row
        sql = (
            "SELECT rowid, bm25(chunk_fts) AS score FROM chunk_fts WHERE chunk_fts MATCH ? "
            "AND +rowid IN (SELECT value FROM json_each(?)) ORDER BY score LIMIT ?"
        )
        values = (fts_query, json.dumps(allowed.tolist()), limit)
    try:
        rows = connection.execute(sql, values).fetchall()
    except sqlite3.OperationalError as error:
        if error.sqlite_errorname == "SQLITE_ERROR":
            raise UsageError(
                f"the full-text query {fts_query!r} is not valid ({error}): quote words with fts_phrase"
            ) from error
        raise
    row_ids = np.array([row[0] for row in rows], dtype=np.int64)
    scores = -np.array([row[1] for row in rows], dtype=np.float64)
    order = np.lexsort((row_ids, -scores))
    return row_ids[order], scores[order].astype(np.float32)


class FtsTokenizer:
    """Cuts text as the full-text index does, stemming included: an empty index in memory does the work."""

    def __init__(self, name: str) -> None:
        self.pid = os.getpid()
        self._mutex = threading.Lock()
        self._memory = sqlite3.connect(":memory:", check_same_thread=False, isolation_level=None)
        self._memory.execute(f"CREATE VIRTUAL TABLE t USING fts5(text, tokenize='{FTS_TOKENIZERS[name]}')")
        self._memory.execute("CREATE VIRTUAL TABLE v USING fts5vocab('t', 'instance')")

    def tokens(self, texts: Sequence[str]) -> list[list[str]]:
        """Return the index terms of each text, in order."""
        found: list[list[str]] = [[] for _ in texts]
        with self._mutex:
            self._memory.execute("BEGIN")
            rows = [(position, text.encode("utf-8", "replace")) for position, text in enumerate(texts)]
            self._memory.executemany("INSERT INTO t (rowid, text) VALUES (?, ?)", rows)
            for term, row in self._memory.execute("SELECT term, doc FROM v ORDER BY doc, offset"):
                found[row].append(term)
            self._memory.execute("ROLLBACK")
        return found


class TermCounts:
    """How many chunks hold a term, remembered for one generation: common terms take milliseconds to count."""

    def __init__(self) -> None:
        self._known: tuple[int, dict[str, int]] = (-1, {})

    def read(self, connection: sqlite3.Connection, generation: int, terms: set[str]) -> dict[str, int]:
        """Return the counts of index terms; terms that no chunk holds count 0."""
        known = self._known  # read and replaced as one, since another thread may pin another generation
        if known[0] != generation:
            self._known = known = (generation, {})
        counts = known[1]
        for term in terms - counts.keys():
            row = connection.execute("SELECT doc FROM chunk_vocabulary WHERE term = ?", (term,)).fetchone()
            counts[term] = 0 if row is None else int(row[0])
        return {term: counts[term] for term in terms}
