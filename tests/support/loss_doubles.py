"""A language model double whose losses are known by hand."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray


class TableLosses:
    """Loss 1 from one of the `low` words on until the next full stop, 2 elsewhere; counts the tokens it is given."""

    settings = "table"

    def __init__(self, tokenizer: object, low: Iterable[str]) -> None:
        encode = tokenizer.encode  # type: ignore[attr-defined]
        self._low = {encode(form)[0] for word in low for form in (word, " " + word)}
        self._stop = encode(".")[0]
        self.tokens = 0

    def token_losses(self, texts: Sequence[Sequence[int]]) -> list[NDArray[np.float32]]:
        return [self._losses(ids) for ids in texts]

    def _losses(self, ids: Sequence[int]) -> NDArray[np.float32]:
        self.tokens += len(ids)
        losses, level = [], 2.0
        for token in ids:
            level = 1.0 if token in self._low else level
            losses.append(level)
            level = 2.0 if token == self._stop else level
        return np.asarray(losses[1:], np.float32)


class CodePointTokenizer:
    """A `TextTokenizer` of one token a code point: what a language model brings that is not the generator."""

    tokenizer_id = "code-points"

    def encode(self, text: str) -> list[int]:
        return [ord(char) for char in text]

    def count_batch(self, texts: Sequence[str]) -> list[int]:
        return [len(text) for text in texts]

    def offsets(self, text: str) -> list[tuple[int, int]]:
        return [(at, at + 1) for at in range(len(text))]

    def decode(self, token_ids: Sequence[int]) -> str:
        return "".join(map(chr, token_ids))
