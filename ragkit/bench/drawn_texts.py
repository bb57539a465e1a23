"""Texts of a source without end, drawn and tokenised in batches as they are needed, and kept for whoever asks next."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Sequence


class DrawnTexts:
    """Texts and their tokens, the same for everybody whatever others draw; threads may draw at the same time.

    Args:
        texts: those that are there before any is drawn.
        source: gives more, without end.
        count: counts the tokens of texts.
        batch: texts that are drawn at once.

    Attributes:
        texts: so far; they only become more.
        counts: tokens of each, and perhaps of some more.
    """

    def __init__(
        self, texts: Sequence[str], source: Iterator[str], count: Callable[[list[str]], Sequence[float]], batch: int
    ) -> None:
        self.texts = list(texts)
        self.counts = [float(tokens) for tokens in count(self.texts)] if texts else []
        self._source = source
        self._count = count
        self._batch = batch
        self._drawing = threading.Lock()

    def draw(self, wanted: int) -> None:
        """Draw until there are `wanted` texts."""
        while len(self.texts) < wanted:
            with self._drawing:
                if len(self.texts) < wanted:  # no other thread did meanwhile
                    self._draw()

    def _draw(self) -> None:
        texts = list(itertools.islice(self._source, self._batch))
        try:
            counts = [float(tokens) for tokens in self._count(texts)]
        except BaseException:
            self._source = itertools.chain(texts, self._source)  # for the next who asks: none may be left out
            raise
        self.counts += counts  # before the texts, whose number says what is there
        self.texts += texts
