"""The seam between the scheduler of a batch and the KV pool: numbers of blocks alone."""

from __future__ import annotations

from typing import Protocol

from ragkit.generation.batch_entries import Entry, RequestEntry


class BlockSupply(Protocol):
    """The KV pool, as the scheduler sees it."""

    @property
    def capacity(self) -> int:
        """Blocks that the batch could have if nothing ran."""
        ...

    def free(self, wanted: int) -> int:
        """Return how many blocks are free, once others gave up what they can spare if that is fewer than `wanted`."""
        ...

    @property
    def others_wait(self) -> bool:
        """Whether somebody else waits for blocks, so that nothing new should take any."""
        ...

    def wait(self) -> bool:
        """Wait until somebody else gave blocks up; False where there is nobody who could."""
        ...

    def blocks_for(self, tokens: int) -> int:
        """Return how many blocks so many rows take."""
        ...

    def give_back(self, entry: RequestEntry) -> bool:
        """Give up what an entry has for its drafts alone, out of its `blocks` too; return whether there was any."""
        ...

    def release(self, entry: Entry) -> None:
        """Give the rows of an entry up."""
        ...
