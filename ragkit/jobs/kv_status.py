"""How much chunk KV a store holds, and what all of it would take. Loads neither torch nor a model."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from ragkit.config import KVConfig, PipelineConfig
from ragkit.errors import ModelError, RagkitError
from ragkit.reports import KVStatus
from ragkit.store import Store
from ragkit.store.base import StoreCounts
from ragkit.store.records import KVEntry, is_document_owner

_DISK = "disk"
_PRELUDE_BYTES = 24  # of a `.kv` record; the length of its settings follows, then the settings (kvcache/kv_segment.py)
_MOST_SETTINGS_BYTES = 1 << 20

logger = logging.getLogger(__name__)


def read_kv_status(store: Store, config: PipelineConfig) -> KVStatus:
    """Return how much chunk KV is stored; a tier that cannot be asked is left out, with a warning."""
    with store.snapshot():
        counts, listing = store.counts(), store.kv_listing()
    sizes = _file_sizes({path for path, _ in listing})
    there = [(path, entry) for path, entry in listing if path in sizes]
    pages = sum(entry.bytes for _, entry in there if is_document_owner(entry.chunk_id))
    of_chunks = [(path, entry) for path, entry in there if not is_document_owner(entry.chunk_id)]
    codecs = _codecs(of_chunks)
    codec = config.kv.codec.value
    chunk_ids = {entry.chunk_id for _, entry in of_chunks if codecs[entry.key] == codec}
    others = sum(entry.bytes for _, entry in of_chunks if codecs[entry.key] != codec)
    bytes_by_tier = {_DISK: sum(sizes.values())} | _remote_bytes(config.kv)
    return KVStatus(len(chunk_ids), bytes_by_tier, codec, _estimate(counts, config), pages, others)


def _file_sizes(paths: set[Path]) -> dict[Path, int]:
    """Return the sizes of those files that are there; KV whose file is gone is computed again."""
    sizes = {}
    for path in paths:
        try:
            sizes[path] = path.stat().st_size
        except OSError as error:
            logger.warning("KV is lost and will be computed again: %s", error)
    return sizes


def _codecs(listing: list[tuple[Path, KVEntry]]) -> dict[str, str]:
    """Return the codec's name of each KV key, empty where its record cannot be read."""
    by_path: dict[Path, list[KVEntry]] = {}
    for path, entry in listing:
        by_path.setdefault(path, []).append(entry)
    names = {entry.key: "" for _, entry in listing}
    for path, entries in by_path.items():
        try:
            with path.open("rb") as file:
                for entry in entries:
                    file.seek(entry.offset + _PRELUDE_BYTES)
                    length = int.from_bytes(file.read(4), "little")
                    names[entry.key] = _codec_name(file.read(min(length, _MOST_SETTINGS_BYTES)))
        except OSError as error:
            logger.warning("KV cannot be read and will be computed again: %s", error)
    return names


def _codec_name(settings: bytes) -> str:
    """Return how the configuration calls the codec of a record: of `int4-group32+bf16` it is `int4+bf16`."""
    try:
        codec_id = str(json.loads(settings)["codec"])
    except (ValueError, KeyError, TypeError):  # damaged: it is a miss when it is asked for
        return ""
    return "+".join(part.partition("-")[0] for part in codec_id.split("+"))


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
