"""The KV pool as the scheduler of a batch sees it: what is left beside the requests of other threads."""

from __future__ import annotations

from collections.abc import Callable

from ragkit.generation.batch_entries import Entry, RequestEntry
from ragkit.generation.engine import Engine

_ROOMY_WINDOWS = 4  # a pool of so many windows of the model keeps one free, for questions from other threads


class PoolSupply:
    """A `BlockSupply` over an engine's pool; it takes part in the engine's admission until it is closed.

    Args:
        engine: whose pool.
        release: gives the rows of an entry up.
        give_back: gives up what an entry has for its drafts alone; returns whether there was any.

    Attributes:
        capacity: blocks that the batch could have if nothing ran.
    """

    def __init__(
        self, engine: Engine, release: Callable[[Entry], None], give_back: Callable[[RequestEntry], bool]
    ) -> None:
        self._pool = pool = engine.pool
        self._release = release
        self._give_back = give_back
        self._share = engine.admission.join()
        window = pool.blocks_for(engine.max_context)
        self._kept = window if pool.num_blocks >= _ROOMY_WINDOWS * window else 0
        self.capacity = pool.num_blocks - 1 - self._kept  # on a GPU one belongs to the graphs of decoding

    def blocks_for(self, tokens: int) -> int:
        """Return how many blocks so many rows take."""
        return self._pool.blocks_for(tokens)

    def free(self, wanted: int) -> int:
        """Return how many blocks are free, after tiers gave some back if these are fewer than `wanted`.

        What others were promised is not among them, nor is the window that is kept for them, unless they have it.
        """
        return self._share.free(wanted, self._kept)

    def settle(self) -> None:
        """Note that the step at hand has taken its blocks."""
        self._share.settle()

    @property
    def others_wait(self) -> bool:
        """Whether a single request waits for blocks."""
        return self._share.others_wait

    def wait(self) -> bool:
        """Wait until others gave blocks up; False where there is nobody who could."""
        return self._share.wait()

    def give_back(self, entry: RequestEntry) -> bool:
        """Give up what an entry has for its drafts alone; return whether there was any."""
        has_given = self._give_back(entry)
        if has_given:
            self._share.gave_back()
        return has_given

    def release(self, entry: Entry) -> None:
        """Give the rows of an entry up."""
        self._release(entry)
        self._share.gave_back()

    def close(self) -> None:
        """Leave the admission."""
        self._share.close()
