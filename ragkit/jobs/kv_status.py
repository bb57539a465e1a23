"""How much chunk KV a store holds, what of it the present settings use, and what all of it would take."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from ragkit.config import KVConfig, PipelineConfig
from ragkit.errors import ModelError, RagkitError, UsageError
from ragkit.reports import KVStatus
from ragkit.store import Store
from ragkit.store.base import StoreCounts
from ragkit.store.records import KVEntry, is_document_owner

if TYPE_CHECKING:
    from ragkit.generation.engine import Engine

_DISK = "disk"

_Place = tuple[Path, KVEntry]

logger = logging.getLogger(__name__)


def read_kv_status(store: Store, config: PipelineConfig, engine: Engine | None = None) -> KVStatus:
    """Return how much chunk KV is stored; a tier that cannot be asked is left out, with a warning.

    No model is loaded; torch is, where there is chunk KV.

    Args:
        store: where it lies.
        config: the present settings.
        engine: the generator where it is loaded, else the configured one is looked for.
    """
    with store.snapshot():
        counts, listing = store.counts(), store.kv_listing()
        sizes = _file_sizes({path for path, _ in listing})
        there = [(path, entry) for path, entry in listing if path in sizes]
        of_chunks = _of_chunks(there)
        used = _used(store, config, engine, of_chunks)
    nbytes = sum(entry.bytes for _, entry in of_chunks)
    return KVStatus(
        chunks=len({entry.chunk_id for _, entry in used or ()}),
        bytes_by_tier={_DISK: sum(sizes.values())} | _remote_bytes(config.kv),
        codec=config.kv.codec.value,
        estimated_bytes=estimated_bytes(counts, config),
        page_bytes=sum(entry.bytes for _, entry in there) - nbytes,
        other_bytes=0 if used is None else nbytes - sum(entry.bytes for _, entry in used),
        unknown_bytes=nbytes if used is None else 0,
    )


def unused_kv(store: Store, config: PipelineConfig, engine: Engine | None = None) -> list[str]:
    """Return the keys of the chunk KV that the present settings do not use; pages of documents are none of it.

    Arguments as for `read_kv_status`.

    Raises:
        UsageError: the generator is not at hand, so that nothing says which they are.
    """
    with store.snapshot():
        of_chunks = _of_chunks(store.kv_listing())
        used = _used(store, config, engine, of_chunks)
    if used is None:
        raise UsageError(
            f"which chunk KV is of other settings cannot be said without the generator {config.generation.model}, "
            "which is not at hand: pull it, or name the right one in generation.model"
        )
    return sorted({entry.key for _, entry in of_chunks} - {entry.key for _, entry in used})


def estimated_bytes(counts: StoreCounts, config: PipelineConfig) -> int | None:
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


def _of_chunks(listing: list[_Place]) -> list[_Place]:
    return [(path, entry) for path, entry in listing if not is_document_owner(entry.chunk_id)]


def _used(store: Store, config: PipelineConfig, engine: Engine | None, of_chunks: list[_Place]) -> list[_Place] | None:
    """Return the KV that the present settings use, or None where nothing says which that is."""
    if not of_chunks:
        return []
    from ragkit.jobs.present_kv import present_kv

    present = present_kv(store, config, engine)
    return None if present is None else [place for place in of_chunks if present.uses(*place)]


def _file_sizes(paths: set[Path]) -> dict[Path, int]:
    """Return the sizes of those files that are there; KV whose file is gone is computed again."""
    sizes = {}
    for path in paths:
        try:
            sizes[path] = path.stat().st_size
        except OSError as error:
            logger.warning("KV is lost and will be computed again: %s", error)
    return sizes


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
