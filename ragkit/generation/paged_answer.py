"""An answer over a paged document: the question is read over its pages, and token after token generated over them."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ragkit.generation.page_decode import PageSteps
from ragkit.generation.paged_question import PagedQuestion
from ragkit.generation.steps import GenerationStep


class PagedAnswer(PagedQuestion):
    """A question that is answered alone. Iterating over `steps` generates the answer."""

    @torch.inference_mode()
    def steps(self) -> Iterator[GenerationStep]:
        """Yield a `GeneratedToken` a token, and `Finished` at the end.

        The document's lock is held for each pass, never across a step that is given away: the next may be asked for
        by another thread.

        Raises:
            KVCacheError: the document was not read to its end, or a page is damaged and cannot be computed again.
            CacheCapacityError: the pages of one layer do not fit the cache.
        """
        logits = self.read()
        steps: PageSteps | None = None
        while True:
            token = self.take(logits)
            if token is not None:
                yield token
            if self.reason is not None:
                break
            if steps is None:
                steps = PageSteps.of(self._engine.decoder, [self.attend], [self.next_row])
            logits = steps.step([self.answer[-1]], [self.chooses])[0]
        yield self.finished()
