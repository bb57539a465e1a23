"""An answer as plain JSON values: what `ragkit query --json` prints, and what a batch writes for a row."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ragkit.types import Answer, Citation


def answer_json(answer: Answer) -> dict[str, Any]:
    """Return the object that stands for `answer`; where nothing was drafted, a step is a token."""
    tokens, draft, timings = answer.tokens, answer.draft, dict(answer.timings_ms)
    decoding = timings.get("total", 0.0) - timings.get("first_token", 0.0)
    plain = decoding / (tokens.generated - 1) if tokens.generated > 1 else None
    return {
        "answer": answer.text,
        "found": answer.found,
        "citations": [_citation_json(citation) for citation in answer.citations],
        "strategy": str(answer.strategy),
        "model": answer.model,
        "tokens": {
            "prompt": tokens.prompt,
            "reused": tokens.reused,
            "recomputed": tokens.recomputed,
            "generated": tokens.generated,
        },
        "dropped_chunks": list(answer.dropped_chunks),
        "warnings": list(answer.warnings),
        "kv": {
            "hits": answer.kv.hits,
            "misses": answer.kv.misses,
            "holes": answer.kv.holes,
            "bytes_by_tier": dict(answer.kv.bytes_by_tier),
            "recomputed": answer.kv.recomputed,
        },
        "draft": {
            "mode": draft.mode,
            "drafter": draft.drafter,
            "drafted": draft.drafted,
            "accepted": draft.accepted,
            "steps": draft.steps,
            "ms_per_step": draft.ms_per_step if draft.steps else plain,
        },
        "timings_ms": timings,
        "attended": [asdict(span) for span in answer.attended],
    }


def _citation_json(citation: Citation) -> dict[str, Any]:
    return {
        "uri": citation.uri,
        "page": citation.page,
        "char_start": citation.char_start,
        "char_stop": citation.char_stop,
        "quote": citation.quote,
        "score": citation.score,
        "doc_id": citation.doc_id,
    }
