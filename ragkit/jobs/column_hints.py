"""Columns that mean nothing to a batch, in words: each with the one that a user may have meant."""

from __future__ import annotations

import difflib
from collections.abc import Collection

_SHOWN = 8
# What other tools call the columns of a batch.
_CALLED_OTHERWISE = {
    **dict.fromkeys(("query", "prompt", "input", "q", "user_input"), "question"),
    **dict.fromkeys(("qid", "question_id", "query_id", "_id", "key"), "id"),
    **dict.fromkeys(("top_k", "topk", "n_chunks"), "k"),
    **dict.fromkeys(("max_tokens", "max_completion_tokens", "max_length"), "max_new_tokens"),
    **dict.fromkeys(("doc", "file", "uri", "source"), "document"),
    **dict.fromkeys(("system", "instructions"), "system_prompt"),
}


def named_columns(names: Collection[str], known: Collection[str]) -> str:
    """Return the first of `names`, quoted, each with the one of `known` that may be meant by it, if any."""
    shown = ", ".join(_with_hint(name, known) for name in list(names)[:_SHOWN])
    return shown + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _with_hint(name: str, known: Collection[str]) -> str:
    if name in known:
        return repr(name)
    folded = name.strip().lower()
    meant = _CALLED_OTHERWISE.get(folded, "")
    close = [meant] if meant in known else difflib.get_close_matches(folded, known, n=1, cutoff=0.75)
    return f"{name!r} (did you mean {close[0]!r}?)" if close else repr(name)
