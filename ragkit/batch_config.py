"""Settings of batches of questions."""

from __future__ import annotations

from dataclasses import dataclass

from ragkit.setting_checks import at_least
from ragkit.setting_names import BatchOrder, ChunkPlacement


@dataclass(frozen=True, slots=True)
class BatchConfig:
    """How many questions are answered at once, and what they share.

    A step computes at most `token_budget` tokens: one of every running answer first, then pieces of prompts; at most
    `max_running` requests are running. `look_ahead` requests are known before the first of them starts, which is how
    common beginnings are found. With `sharing` they are computed once and held once.

    An `order` of `reuse` starts requests with the same beginning one after another, those with long answers and short
    prompts first; `given` keeps the order. With a `chunk_order` of `free` the chunks of a prompt may change places so
    that more of them stand at a common beginning; the model then reads them in another order than by relevance.

    `kv_tokens` is the size of the KV pool that the generator is loaded with, in tokens, which bounds how many requests
    run at once; 0 takes what a single question may need, and on a CPU eight times that, as far as memory allows.
    """

    token_budget: int = 2048
    max_running: int = 256
    look_ahead: int = 1024
    sharing: bool = True
    order: BatchOrder = BatchOrder.REUSE
    chunk_order: ChunkPlacement = ChunkPlacement.RELEVANCE
    kv_tokens: int = 0

    def __post_init__(self) -> None:
        at_least("batch.token_budget", self.token_budget, 1)
        at_least("batch.max_running", self.max_running, 1)
        at_least("batch.look_ahead", self.look_ahead, 1)
        at_least("batch.kv_tokens", self.kv_tokens, 0)
