"""Which of the ranked chunks are worth a place: not those whose text stands in a better one already."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ragkit.store.base import StoredChunk

# A chunk is left out when more than this share of it lies within a better chunk of the same document.
COVERED_SHARE = 0.5


def select_distinct(kept: Sequence[StoredChunk], ranked: Sequence[StoredChunk], limit: int) -> list[StoredChunk]:
    """Return `kept` followed by those of `ranked` that say something new, at most `limit` in all, order kept.

    A chunk says nothing new when a kept one has the same text, white space and case aside, or covers more than half
    of its span in the same document.
    """
    result = list(kept)
    texts = {_folded(stored) for stored in result}
    for stored in ranked:
        if len(result) >= limit:
            break
        text = _folded(stored)
        if text in texts or any(_covers(other, stored) for other in result):
            continue
        texts.add(text)
        result.append(stored)
    return result


def _folded(stored: StoredChunk) -> str:
    return " ".join(stored.chunk.text.split()).casefold()


def _covers(other: StoredChunk, stored: StoredChunk) -> bool:
    a, b = other.chunk, stored.chunk
    if a.doc_id != b.doc_id:
        return False
    shared = min(a.char_stop, b.char_stop) - max(a.char_start, b.char_start)
    return shared > COVERED_SHARE * (b.char_stop - b.char_start)
