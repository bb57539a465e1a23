"""What happened to chunk KV since its store was made."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from ragkit.kvcache.kv_segment import MissReason


@dataclass(slots=True)
class KVStoreStats:
    """What happened since the store was made.

    Attributes:
        hits: hits by tier.
        misses: why chunks that requests asked for were missing from the tiers below memory, by tier and reason.
        computed: chunks that were computed.
        recomputed: those of them that a tier had, and that were computed because that was sooner than loading them.
        saved: chunks written to each tier; `not_saved` those that it refused or failed to write.
        prefetched: chunks brought into memory before they were asked for.
    """

    hits: Counter[str] = field(default_factory=Counter)
    misses: Counter[tuple[str, MissReason]] = field(default_factory=Counter)
    computed: int = 0
    recomputed: int = 0
    saved: Counter[str] = field(default_factory=Counter)
    not_saved: Counter[str] = field(default_factory=Counter)
    prefetched: int = 0
