"""Chunks of many prompts in an order in which more of them stand at a common beginning.

The order of a frequent-pattern tree (Han, Pei, Yin, SIGMOD 2000): within each prompt the chunk that most prompts hold
comes first. Two prompts then share a beginning as soon as they share their most common chunks, wherever relevance had
put them. The model reads the chunks in another order than by relevance, so answers may differ: who wants the answers
of single questions leaves the order alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from ragkit.types import Prompt, Segment


def common_chunks_first(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Return `prompts` with the chunks of each ordered by how many prompts hold them; ties keep one order for all."""
    held = Counter(tokens for prompt in prompts for tokens in {one.token_ids for one in _chunks(prompt)})

    def place(segment: Segment) -> tuple[int, tuple[int, ...]]:
        return -held[segment.token_ids], segment.token_ids

    ordered = []
    for prompt in prompts:
        chunks = iter(sorted(_chunks(prompt), key=place))
        ordered.append(Prompt(tuple(one if one.chunk_id is None else next(chunks) for one in prompt.segments)))
    return ordered


def _chunks(prompt: Prompt) -> list[Segment]:
    return [segment for segment in prompt.segments if segment.chunk_id is not None]
