"""Fixed-size blocks of rows, handed out and counted: what every pool of KV has, whatever its rows consist of."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from ragkit.errors import CacheCapacityError, KVCacheError

BLOCK_SIZE = 64


class BlockPool:
    """Blocks of `block_size` rows that requests share.

    A block is free when nobody holds a reference; handing out and releasing are thread-safe, writing rows is the
    business of whoever allocated the block.

    Attributes:
        num_blocks: free and held.
        block_size: rows of a block.
        reclaim: called where too few blocks are free, with how many are wanted: a tier gives some of its own back, and
            says how many are free then.
    """

    def __init__(self, num_blocks: int, block_size: int = BLOCK_SIZE) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.reclaim: Callable[[int], int] | None = None
        self._references = [0] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._lock = threading.Lock()

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free)

    def free_after_reclaim(self, wanted: int) -> int:
        """Return how many blocks are free, after a tier gave some back where these are fewer than `wanted`."""
        reclaim = self.reclaim
        return reclaim(wanted) if reclaim is not None and self.num_free < wanted else self.num_free

    def blocks_for(self, tokens: int) -> int:
        """Return how many blocks `tokens` rows take."""
        return -(-tokens // self.block_size)

    def allocate(self, count: int, *, reclaim: bool = True) -> list[int]:
        """Return the ids of `count` free blocks, each now held once.

        Args:
            count: how many.
            reclaim: whether a tier may be asked to give blocks back; the tier itself may not.

        Raises:
            CacheCapacityError: fewer are free; nothing is handed out then.
        """
        while (blocks := self._take(count)) is None:
            # What a tier gives back others may take before this thread does; then it is asked again.
            give_back = self.reclaim if reclaim else None
            if give_back is None or give_back(count) < count:
                raise CacheCapacityError(
                    f"asked for {count} KV blocks of {self.block_size} tokens, {len(self._free)} of "
                    f"{self.num_blocks} are free: end other requests, shorten the prompt or enlarge the pool"
                )
        return blocks

    def retain(self, blocks: Sequence[int]) -> None:
        """Hold `blocks`, which somebody else holds already, once more."""
        with self._lock:
            self._require_held(blocks)
            for block in blocks:
                self._references[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Give up one reference to each of `blocks`; those that nobody holds any more become free."""
        with self._lock:
            self._require_held(blocks)
            references = self._references
            for block in blocks:
                references[block] -= 1
            self._free += [block for block in blocks if not references[block]]

    def references(self, block: int) -> int:
        """Return how often `block` is held."""
        return self._references[block]

    def rows_of(self, blocks: Sequence[int]) -> Tensor:
        """Return (rows,) int64: the rows of `blocks`, block after block."""
        # By numpy: torch wakes all cores for a sum of this size.
        rows = np.asarray(blocks, dtype=np.int64)[:, None] * self.block_size + np.arange(self.block_size)
        return torch.from_numpy(rows.reshape(-1))

    def _take(self, count: int) -> list[int] | None:
        with self._lock:
            if count > len(self._free):
                return None
            blocks = [self._free.pop() for _ in range(count)]
            for block in blocks:
                self._references[block] = 1
            return blocks

    def _require_held(self, blocks: Sequence[int]) -> None:
        references = self._references
        unheld = [block for block in blocks if references[block] < 1]
        if unheld:
            raise KVCacheError(f"KV block {unheld[0]} is not held by anybody, so it cannot be retained or released")
        if len(set(blocks)) != len(blocks):
            raise KVCacheError("a KV block is named twice in one call")
