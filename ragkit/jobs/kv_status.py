"""How much chunk KV a store holds, and what all of it would take. Loads neither torch nor a model."""

from __future__ import annotations

import logging

from ragkit.config import KVConfig, PipelineConfig
from ragkit.errors import ModelError, RagkitError
from ragkit.reports import KVStatus
from ragkit.store import Store
from ragkit.store.base import StoreCounts
from ragkit.store.records import is_document_owner

_DISK = "disk"

logger = logging.getLogger(__name__)


def read_kv_status(store: Store, config: PipelineConfig) -> KVStatus:
    """Return how much chunk KV is stored; a tier that cannot be asked is left out, with a warning."""
    with store.snapshot():
        totals, counts, listing = store.kv_totals(), store.counts(), store.kv_listing()
    pages = [entry.bytes for _, entry in listing if is_document_owner(entry.chunk_id)]
    bytes_by_tier = {_DISK: totals.bytes} | _remote_bytes(config.kv)
    estimate = _estimate(counts, config)
    return KVStatus(totals.entries - len(pages), bytes_by_tier, config.kv.codec.value, estimate, sum(pages))


def _remote_bytes(kv: KVConfig) -> dict[str, int]:
    if not kv.remote:
        return {}
    from ragkit.kvcache.eviction import make_policy
    from ragkit.kvcache.remote_tier import RemoteTier

    try:
        tier = RemoteTier(kv.remote, kv.remote_mb << 20, make_policy(kv.policy))
    except RagkitError as error:
        logger.warning("%s", error)
        return {}
    return {tier.name: tier.bytes_used}


def _estimate(counts: StoreCounts, config: PipelineConfig) -> int | None:
    """Return about how many bytes the KV of all chunks takes, or None where the generator is not here."""
    from ragkit.kvcache.kv_size import estimated_kv_bytes
    from ragkit.models import local_folder
    from ragkit.models.model_config import load_model_config

    folder = local_folder(config.generation.model)
    try:
        model = None if folder is None else load_model_config(folder)
    except ModelError as error:
        logger.warning("%s", error)
        return None
    return None if model is None else estimated_kv_bytes(config.kv.codec, model, counts.chunks, counts.tokens)
