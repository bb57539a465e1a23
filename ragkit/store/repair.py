"""What can be mended after `verify`: derived data is made anew, and damaged originals are marked for reading again."""

from __future__ import annotations

import json

from ragkit.store.changes import Changes
from ragkit.store.records import Problem, VerifyReport
from ragkit.store.rows import filter_rows, to_sql
from ragkit.store.segments import VECTOR_SEGMENT


def repair_store(changes: Changes, report: VerifyReport) -> tuple[str, ...]:
    """Mend what `report` names within the open transaction and return the sources that have to be read again.

    A document whose text rotted is deleted, since no answer may rest on it; one whose vectors rotted keeps its text,
    which full-text search still finds.
    """
    repair = _Repair(changes)
    for problem in report.problems:
        repair.mend(problem)
    return repair.finish()


class _Repair:
    def __init__(self, changes: Changes) -> None:
        self._changes = changes
        self._connection = changes.connection
        self._uris: set[str] = set()

    def mend(self, problem: Problem) -> None:
        """Do what one problem asks for."""
        steps = {
            "catalogue": self._reindex,
            "source": self._source,
            "document": self._document,
            "link": self._link,
            "filter": self._filter,
            "segment": self._segment,
            "vectors": self._vectors,
            "kv": self._kv,
            "index": self._index,
            "full_text": self._full_text,
        }
        step = steps.get(problem.part)
        if step is not None:
            step(problem)
            self._uris.update(problem.uris if problem.part not in ("filter", "index", "kv") else ())

    def finish(self) -> tuple[str, ...]:
        """Mark the sources and return them."""
        for uri in self._uris:
            sql = "SELECT source_id FROM sources WHERE uri = ?"
            for (source_id,) in self._connection.execute(sql, (to_sql(uri),)).fetchall():
                self._changes.mark_source(source_id)
        return tuple(sorted(self._uris))

    def _reindex(self, _: Problem) -> None:
        self._connection.execute("REINDEX")
        self._changes.rebuild_full_text()

    def _source(self, problem: Problem) -> None:
        self._changes.mark_source(problem.key)

    def _document(self, problem: Problem) -> None:
        if problem.key:
            self._changes.delete_document(problem.key)
            self._changes.rebuild_full_text()

    def _link(self, problem: Problem) -> None:
        self._changes.drop_link(problem.key)

    def _filter(self, problem: Problem) -> None:
        self._connection.execute("DELETE FROM link_values WHERE link_id NOT IN (SELECT link_id FROM links)")
        self._connection.execute("DELETE FROM link_values WHERE link_id = ?", (problem.key,))
        row = self._connection.execute("SELECT metadata FROM links WHERE link_id = ?", (problem.key,)).fetchone()
        if row is not None:
            values = filter_rows(problem.key, json.loads(row[0]))
            self._connection.executemany("INSERT INTO link_values (link_id, key, value) VALUES (?,?,?)", values)

    def _segment(self, problem: Problem) -> None:
        sql = "SELECT kind, first_row, last_row FROM segments WHERE segment_id = ?"
        kind, first, last = self._connection.execute(sql, (problem.key,)).fetchone()
        self._changes.drop_segment(problem.key)  # KV entries go with it: they are computed again
        if kind == VECTOR_SEGMENT:
            self._mark_documents("SELECT DISTINCT doc_key FROM chunks WHERE row_id BETWEEN ? AND ?", (first, last))

    def _vectors(self, problem: Problem) -> None:
        if problem.uris:
            marks = ",".join("?" * len(problem.uris))
            sql = f"SELECT DISTINCT doc_key FROM links JOIN sources s USING (source_id) WHERE s.uri IN ({marks})"  # noqa: S608
            self._mark_documents(sql, problem.uris)

    def _mark_documents(self, sql: str, values: tuple[object, ...]) -> None:
        for (doc_key,) in self._connection.execute(sql, values).fetchall():
            self._changes.rewrite_document(doc_key, damaged=True)

    def _kv(self, problem: Problem) -> None:
        self._connection.execute("DELETE FROM kv WHERE kv_id = ?", (problem.key,))

    def _index(self, _: Problem) -> None:
        self._connection.execute("DELETE FROM vector_index")

    def _full_text(self, _: Problem) -> None:
        self._changes.rebuild_full_text()
