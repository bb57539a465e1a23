"""Who inherits the KV of chunks that leave: a chunk of the same text, so that an edit keeps what it did not touch.

A KV key depends on the tokens and their context, not on the document; the catalogue ties it to one chunk, so that it
goes with its text. Equal text has equal tokens: the entry passes to the chunk that has it now, in the transaction that
removes the old one.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from dataclasses import dataclass

from ragkit.store.records import document_owner
from ragkit.store.rows import row_crc

KV_COLUMNS = "kv_id, key, chunk_id, segment_id, offset, bytes, crc32"


@dataclass(frozen=True, slots=True)
class _Text:
    """What identifies a text: its digest, and its number of characters, by which it is looked for."""

    digest: bytes
    characters: int


class KVHeirs:
    """Chunks that come and go in one transaction. `settle` must be called when all of them have."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self._new: dict[_Text, str] = {}
        self._gone: dict[str, _Text] = {}

    def came(self, chunk_id: str, text: bytes, characters: int) -> None:
        """Hear of a chunk that was stored."""
        self._new.setdefault(_Text(_digest(text), characters), chunk_id)

    def went(self, chunk_id: str, text: bytes, characters: int) -> None:
        """Hear of a chunk that was deleted."""
        if (
            self._new or self._has_kv(chunk_id) or self._has_kv(document_owner(chunk_id))
        ):  # of a large removal only what matters is kept in mind
            self._gone[chunk_id] = _Text(_digest(text), characters)

    def settle(self) -> dict[str, str]:
        """Hand KV entries on, delete those without an heir, and return the new chunk id of old ones.

        Among chunks of this transaction every heir is found. Other chunks are only searched, in one pass over the
        catalogue, for the texts of KV that would be lost otherwise.
        """
        # A document that was cut again may have some of its chunks as before.
        gone = {old: text for old, text in self._gone.items() if not self._is_stored(old)}
        heirs = {old: self._new[text] for old, text in gone.items() if text in self._new}
        orphans = {old: text for old, text in gone.items() if old not in heirs and self._has_kv(old)}
        if orphans:
            elsewhere = self._stored_elsewhere(set(orphans.values()))
            heirs |= {old: elsewhere[text] for old, text in orphans.items() if text in elsewhere}
        for old in gone:
            self._connection.execute("DELETE FROM kv WHERE chunk_id = ?", (document_owner(old),))
            if old in heirs:
                self._hand_on(old, heirs[old])
            else:
                self._connection.execute("DELETE FROM kv WHERE chunk_id = ?", (old,))
        return heirs

    def _stored_elsewhere(self, wanted: set[_Text]) -> dict[_Text, str]:
        sql = (
            "SELECT chunk_id, CAST(text AS BLOB), char_stop - char_start FROM chunks "
            "WHERE char_stop - char_start IN (SELECT value FROM json_each(?))"
        )
        lengths = json.dumps(sorted({text.characters for text in wanted}))
        found: dict[_Text, str] = {}
        for chunk_id, content, characters in self._connection.execute(sql, (lengths,)):
            text = _Text(_digest(content), characters)
            if text in wanted:
                found.setdefault(text, chunk_id)
        return found

    def _hand_on(self, old: str, new: str) -> None:
        rows = self._connection.execute(f"SELECT {KV_COLUMNS} FROM kv WHERE chunk_id = ?", (old,)).fetchall()  # noqa: S608
        for kv_id, key, _, *place in rows:
            self._connection.execute("DELETE FROM kv WHERE kv_id = ?", (kv_id,))
            row = (kv_id, key, new, *place)
            self._connection.execute(  # the heir may have the same KV already
                f"INSERT OR IGNORE INTO kv ({KV_COLUMNS}, crc) VALUES (?,?,?,?,?,?,?,?)",  # noqa: S608
                (*row, row_crc(*row)),
            )

    def _has_kv(self, chunk_id: str) -> bool:
        return self._connection.execute("SELECT 1 FROM kv WHERE chunk_id = ?", (chunk_id,)).fetchone() is not None

    def _is_stored(self, chunk_id: str) -> bool:
        return self._connection.execute("SELECT 1 FROM chunks WHERE chunk_id = ?", (chunk_id,)).fetchone() is not None


def _digest(text: bytes) -> bytes:
    return hashlib.sha256(text).digest()
