"""One document of a store, found by what a user calls it, for answers that read it whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ragkit.errors import UsageError

if TYPE_CHECKING:
    from ragkit.store import Store
    from ragkit.store.base import StoredChunk
    from ragkit.types import AttendedSpan, Chunk, Document


@dataclass(frozen=True, slots=True)
class WholeDocument:
    """A document with its chunks in order.

    Attributes:
        document: its text and pages.
        uri: where it came from.
        chunks: they tile the text.
    """

    document: Document
    uri: str
    chunks: tuple[Chunk, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens of its chunks; the text as a whole may have some fewer."""
        return sum(chunk.token_count for chunk in self.chunks)


class FoundDocuments:
    """Finds documents of one store. Thread-safe.

    The one found last is kept while nobody writes to the store: to read and check a text of a million tokens takes a
    fifth of a second, and one question about a document is mostly followed by another.

    Args:
        store: where they are.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._last: tuple[tuple[int, str | None], list[WholeDocument], int] | None = None

    def find(self, uri: str | None) -> WholeDocument:
        """Return the document that `uri` names, or the only one of the store where it is None.

        Raises:
            UsageError: there is none, or more than one.
        """
        found, count = self._named(uri)
        if count != 1:
            named = "the store" if uri is None else repr(uri)
            raise UsageError(
                f"an answer from pages reads one document, and {named} holds {count:,}: name one by --document URI "
                "(a row or a member of a file by its own URI, as citations show it)"
            )
        return found[0]

    def find_single(self, uri: str) -> WholeDocument | None:
        """Return the document that `uri` names, or None where it names more than one or none."""
        found, _ = self._named(uri)
        return found[0] if found else None

    def forget_removed(self) -> None:
        """Let the one found last go if somebody has written to the store since: its text may have been erased."""
        if self._last is not None and self._last[0][0] != self._store.generation:
            self._last = None

    def _named(self, uri: str | None) -> tuple[list[WholeDocument], int]:
        """Return the document, if it is one, and how many there are."""
        key, last = (self._store.generation, uri), self._last
        if last is None or last[0] != key:  # asked before reading: what is written meanwhile is read the next time
            found = _documents(self._store, uri)
            whole = [_whole(self._store, *one) for one in found.items()] if len(found) == 1 else []
            self._last = last = key, whole, len(found)
        return last[1], last[2]


def long_documents(store: Store, most_tokens: int) -> Iterator[WholeDocument]:
    """Yield the documents of more than `most_tokens` tokens, one after the other."""
    for doc_id, chunks in _documents(store, None).items():
        if sum(one.chunk.token_count for one in chunks) > most_tokens:
            yield _whole(store, doc_id, chunks)


def _whole(store: Store, doc_id: str, chunks: list[StoredChunk]) -> WholeDocument:
    return WholeDocument(store.document(doc_id), chunks[0].uri, tuple(one.chunk for one in chunks))


def _documents(store: Store, uri: str | None) -> dict[str, list[StoredChunk]]:
    """Return the chunks of each document, in order."""
    rows = store.row_ids() if uri is None else store.rows_where({"uri": uri})
    found: dict[str, list[StoredChunk]] = {}
    for one in store.chunks(rows):
        found.setdefault(one.chunk.doc_id, []).append(one)
    for chunks in found.values():
        chunks.sort(key=lambda one: one.chunk.index)
    return found


def chunks_attended(whole: WholeDocument, attended: Sequence[AttendedSpan], most: int) -> list[tuple[Chunk, float]]:
    """Return the chunks that an answer attended to most, with the sum of the shares of the spans they overlap.

    Where nothing was found among others, because all of the document was attended to, the first ones are returned.
    """
    scores = [
        sum(span.share for span in attended if span.char_start < chunk.char_stop and chunk.char_start < span.char_stop)
        for chunk in whole.chunks
    ]
    order = sorted(range(len(scores)), key=lambda index: -scores[index])
    return [(whole.chunks[index], scores[index]) for index in order[:most]]
