"""Blended prefill over one store: the chunk-KV store with its tiers, and the strategy that uses it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Protocol

from ragkit.config import BlendConfig, BlendRows, KVConfig, LoadingMode
from ragkit.errors import KVCacheError
from ragkit.generation.blend_prefill import BlendOptions, BlendPrefill
from ragkit.generation.chunk_prefill import ChunkPrefill, expected_cost
from ragkit.generation.engine import Engine
from ragkit.generation.neighbours import ChunkNeighbours, ChunkOrder
from ragkit.kvcache.backing_tier import BackingTier
from ragkit.kvcache.chunk_kv import ChunkRef
from ragkit.kvcache.codecs import encoding_seconds, make_codec
from ragkit.kvcache.coverage import configured_ratio
from ragkit.kvcache.eviction import make_policy
from ragkit.kvcache.kv_key import ContextKind, KVRecipe
from ragkit.kvcache.kv_store import KVStore
from ragkit.kvcache.load_controller import LoadController
from ragkit.kvcache.memory_tier import MemoryTier
from ragkit.kvcache.pool import KVPool
from ragkit.kvcache.pool_tier import PoolTier
from ragkit.kvcache.remote_tier import RemoteTier
from ragkit.kvcache.segment_tier import KVCatalogue, SegmentTier
from ragkit.kvcache.selectors import make_selector
from ragkit.models.fingerprint import weights_fingerprint, weights_stamp
from ragkit.types import Chunk

MEMORY = "ram"  # how the memory tier is called in reports

_log = logging.getLogger(__name__)


class BlendedStore(KVCatalogue, ChunkOrder, Protocol):
    """What blending needs of a store; `ragkit.store.Store` has it."""


class Blending:
    """Blended prefill for one engine and one store. Thread-safe; `close` writes what is unsaved.

    Chunk KV is computed behind the model's canonical prefix (chat template with a fixed date, default system prompt),
    whatever the prompts say that it will stand in; with the context `neighbours` also behind the chunks before it in
    its document. Where the weights on disk are not those that the engine loaded, no key could name them, so their KV
    stays in memory.

    Args:
        engine: the model.
        kv: tiers, codec and context.
        blend: how chunks are blended.
        store: where the disk tier lies, and what says which chunks are neighbours; None for none.

    Attributes:
        kv_store: finds and keeps chunk KV.
        chunks: names chunk KV and computes what is missing.
        prefill: the strategy, which `Engine.generate` takes.
    """

    def __init__(self, engine: Engine, kv: KVConfig, blend: BlendConfig, store: BlendedStore | None) -> None:
        decoder = engine.decoder
        codec = make_codec(kv.codec, decoder.layout)
        recipe = KVRecipe(
            weights_fingerprint=weights_fingerprint(engine.folder),
            config=decoder.config,
            tokenizer_id=engine.tokenizer.tokenizer_id,
            dtype=decoder.dtype,
            codec_id=codec.codec_id,
        )
        # Compared after hashing: files that were replaced before or meanwhile are not those in memory.
        weights_are_named = weights_stamp(engine.folder) == engine.weights_stamp
        if not weights_are_named:
            _log.warning("the weights in %s were replaced since they were loaded: KV stays in memory", engine.folder)
        self._builder = engine.prompt_builder()
        prefix = self._builder.prefix.token_ids
        self._longest_chunk = engine.max_context - len(prefix) - len(self._builder.ending("").token_ids) - 1
        neighbours = None
        if store is not None:
            neighbours = ChunkNeighbours(store, self._builder, kv.neighbour_tokens, engine.max_context)
        self.chunks = ChunkPrefill(decoder, engine.rotary, recipe, prefix, ContextKind(kv.context), neighbours)
        self.chunks.prefix_kv(prefix)  # part of loading, so that the first question does not wait for it
        on_gpu = decoder.device.type == "cuda"
        memory = MemoryTier(MEMORY, _megabytes(kv.memory_mb), make_policy(kv.policy), page_locked=on_gpu)
        backing = _backing_tiers(kv, store) if weights_are_named else ()
        pool = _pool_tier(kv, engine.pool) if on_gpu or blend.rows is BlendRows.SHARED else None
        decides = LoadController(expected_cost(decoder, encoding_seconds(kv.codec)))
        controller = decides if kv.loading is LoadingMode.AUTO else None
        self.kv_store = KVStore(codec, memory, backing, pool=pool, controller=controller)
        selector = make_selector(blend.selector, decoder.config.num_layers)
        options = BlendOptions(configured_ratio(blend), selector, rows=blend.rows)
        self.prefill = BlendPrefill(self.kv_store, self.chunks, options)
        self._store = store
        self._generation = -1

    def refs(self, chunks: Sequence[Chunk]) -> list[ChunkRef]:
        """Return the references of the KV of `chunks`."""
        return [self.chunks.ref(self._builder.chunk_segment(chunk)) for chunk in chunks]

    def fits_a_prompt(self, ref: ChunkRef) -> bool:
        """Return whether a chunk can stand in a prompt with a question and an answer: no other one's KV is of use."""
        return len(ref.token_ids) <= self._longest_chunk

    def prefetch(self, chunks: Sequence[Chunk]) -> None:
        """Start to bring the KV of `chunks` into memory and return at once."""
        self.kv_store.prefetch(self.refs(chunks))

    def follow(self, generation: int) -> None:
        """Do what `forget_removed` does if the store has another generation than at the last call."""
        if generation != self._generation:
            self.forget_removed()
            self._generation = generation  # now: after an error the next question has to look again

    def forget_removed(self, heirs: Mapping[str, str] | None = None) -> None:
        """Drop from memory the KV of chunks that have left the store.

        KV stays where the same text is still stored: under a chunk that `heirs` names (old chunk id to new one), or
        where the store has handed it to another chunk.
        """
        if self._store is None:
            return
        refs = self.kv_store.refs()
        owners = {ref: (heirs or {}).get(ref.chunk_id, ref.chunk_id) for ref in refs}
        known = self._store.known_chunks(list(owners.values()))
        entries = self._store.kv_entries([ref.key.digest for ref in refs if owners[ref] not in known])
        handed_on = {key: entry.chunk_id for key, (_, entry) in entries.items()}
        for ref in refs:
            owner = owners[ref] if owners[ref] in known else handed_on.get(ref.key.digest)
            if owner is None:
                self.kv_store.discard([ref.key])
            elif owner != ref.chunk_id:
                self.kv_store.reown(ref, owner)

    def close(self) -> None:
        """Write what is unsaved to the tiers and stop."""
        self.kv_store.close()


def _pool_tier(kv: KVConfig, pool: KVPool) -> PoolTier | None:
    blocks = _megabytes(kv.gpu_mb) // (pool.block_size * pool.layout.bytes_per_token)
    if not blocks:
        return None
    name = "gpu" if pool.device.type == "cuda" else "pool"  # in reports; on a CPU it is there for shared rows
    budget = _megabytes(kv.gpu_mb)
    return PoolTier(pool, min(blocks, pool.num_blocks), make_policy(kv.policy), name, budget_bytes=budget)


def _backing_tiers(kv: KVConfig, store: KVCatalogue | None) -> list[BackingTier]:
    tiers: list[BackingTier] = []
    if store is not None and kv.disk_mb:
        tiers.append(SegmentTier(store, _megabytes(kv.disk_mb), make_policy(kv.policy)))
    if kv.remote:
        try:
            tiers.append(RemoteTier(kv.remote, _megabytes(kv.remote_mb), make_policy(kv.policy)))
        except KVCacheError as error:  # KV is only a cache: answers need none of it
            _log.warning("%s; this process goes on without it", error)
    return tiers


def _megabytes(count: int) -> int:
    return count << 20
