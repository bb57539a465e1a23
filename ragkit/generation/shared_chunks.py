"""Chunks that a request lists where they lie in the pool, instead of copying them."""

from __future__ import annotations

from collections.abc import Sequence

from ragkit.errors import CacheCapacityError
from ragkit.generation.reused_rows import BlendLayout
from ragkit.generation.strategy import PrefillRequest
from ragkit.generation.streamed_rows import StreamedChunks
from ragkit.kvcache.chunk_kv import ChunkRef, EncodedKV
from ragkit.kvcache.pool_tier import PinnedBlocks, PoolTier


def list_chunks(
    request: PrefillRequest,
    layout: BlendLayout,
    refs: Sequence[ChunkRef],
    chunks: Sequence[EncodedKV | PinnedBlocks],
    streamed: StreamedChunks,
    tier: PoolTier,
) -> str:
    """Return why the request cannot list its chunks, which leaves it as it was, or nothing once all its rows are there.

    The prompt's first tokens and its ending get private rows. Chunks that are not in the pool are brought there first;
    the request holds their blocks then, whatever becomes of them in the tier.

    Args:
        request: whose rows are empty.
        layout: its prompt.
        refs: the chunks in the order of the prompt.
        chunks: as they were fetched, still pinned.
        streamed: the same on their way to the pool's device.
        tier: where they are to lie, in the request's pool.
    """
    kv = request.kv
    found = {ref: chunk for ref, chunk in zip(refs, chunks, strict=True) if isinstance(chunk, PinnedBlocks)}
    missing = [ref for ref in dict.fromkeys(refs) if ref.token_ids and ref not in found]
    pins: dict[ChunkRef, PinnedBlocks] = {}
    if missing:
        streamed.add_to(tier)
        pinned = zip(missing, tier.pin_all(missing), strict=True)
        pins = {ref: pin for ref, pin in pinned if pin is not None}
    try:
        if len(pins) < len(missing):
            return (
                f"{len(missing) - len(pins)} of {len(refs)} chunks found no room in the tier {tier.name}, which keeps "
                f"{tier.max_blocks} blocks: raise kv.gpu_mb, or ask fewer questions at a time"
            )
        found |= pins
        kv.append_private(layout.first)
        for ref in refs:
            if ref.token_ids:
                kv.append_shared(found[ref].block_ids, len(ref.token_ids))
        kv.reserve(layout.num_tokens + request.answer_tokens)
    except CacheCapacityError as error:
        kv.release()
        return str(error)
    finally:
        tier.release_all(pins.values())
    return ""
