"""The BM25 leg: a question in plain words becomes a full-text query, its commonest words left out.

FTS5 scores every chunk that holds any term, so a word that half the collection holds costs far more than it tells
(its inverse document frequency is near zero). Terms that stand in over a tenth of all chunks are left out where
others remain, and so are the commonest of the rest when there are very many chunks to score;
`benchmarks/retrieval_quality.py` shows what that costs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate

from ragkit.retrieval.base import FloatMatrix, IdVector, SearchableStore

# What SQLite's tokenizer is sure to cut at, in ASCII, Latin-1, general punctuation and CJK punctuation. Everything else
# stays together: a quoted word that SQLite cuts further is searched for as a phrase, so nothing of it is lost.
_SEPARATORS = (
    r"\x00-/:-@\[-`{-\xa9\xab-\xb1\xb4\xb6-\xb8\xbb\xbf\xd7\xf7"
    r"\u2000-\u2064\u206a-\u206f\u3000-\u3004\u3008-\u3020\u3030"
)
_WORD = re.compile(f"[^{_SEPARATORS}]+")


@dataclass(frozen=True, slots=True)
class TermSelection:
    """Which terms of a question are searched for.

    Attributes:
        common_share: terms in a larger share of the chunks are common; 1 keeps every term.
        max_terms: only so many, the rarest ones.
        max_postings, postings_share: terms are taken, rarest first, while the chunks that hold them are together at
            most `max_postings` or this share of all chunks, whichever is more; FTS5 takes about a microsecond for each.
        fallback_terms: where every term is common, so many of the rarest are searched for.
    """

    common_share: float = 0.1
    max_terms: int = 32
    max_postings: int = 30_000
    postings_share: float = 0.1
    fallback_terms: int = 3


def query_terms(question: str) -> list[str]:
    """Return the different words of `question` in order, without regard to case."""
    words: dict[str, str] = {}
    for word in _WORD.findall(question):
        words.setdefault(word.casefold(), word)
    return list(words.values())


def select_terms(frequencies: Mapping[str, int], chunks: int, selection: TermSelection) -> list[str]:
    """Return the terms to search for, rarest first.

    Args:
        frequencies: the number of chunks that hold each term.
        chunks: how many chunks there are.
        selection: the rules.
    """
    found = sorted((count, term) for term, count in frequencies.items() if count)
    rare = [(count, term) for count, term in found if count <= selection.common_share * chunks]
    chosen = rare[: selection.max_terms] or found[: selection.fallback_terms]
    budget = max(selection.max_postings, selection.postings_share * chunks)
    affordable = sum(total <= budget for total in accumulate(count for count, _ in chosen))
    return [term for _, term in chosen[: max(1, affordable)]]


def full_text_query(terms: list[str]) -> str:
    """Return an FTS5 query for chunks that hold any of `terms`, each quoted, so that none is read as syntax."""
    return " OR ".join('"' + term.replace('"', '""') + '"' for term in terms)


def search_bm25(
    store: SearchableStore,
    question: str,
    k: int,
    chunks: int,
    allowed: IdVector | None = None,
    selection: TermSelection | None = None,
) -> tuple[FloatMatrix, IdVector]:
    """Return scores (hits,) and row ids (hits,) of the best `k` chunks for `question`, best first.

    Args:
        store: what is searched.
        question: plain words; nothing in it is obeyed as query syntax.
        k: how many hits at most.
        chunks: how many chunks the store holds.
        allowed: sorted row ids that the search is restricted to.
        selection: which terms are searched for.
    """
    import numpy as np

    frequencies = store.document_frequency(query_terms(question))
    terms = select_terms(frequencies, chunks, selection or TermSelection())
    if not terms or (allowed is not None and not len(allowed)):
        return np.empty(0, dtype=np.float32), np.empty(0, dtype=np.int64)
    row_ids, scores = store.match(full_text_query(terms), k, allowed)
    return scores, row_ids
