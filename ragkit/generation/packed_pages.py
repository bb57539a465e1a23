"""Attention of one token of each of several questions over the same document, whose tokens stand in one matrix.

What does not depend on the pages of a question is done once for all of them. Each attends to its own pages and rows:
these lie in a buffer of its own, as for a question that is asked alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ragkit.errors import RagkitError
from ragkit.generation.page_attention import PageAttention
from ragkit.kernels.rope_write_kv import rope_write_kv


class PackedPages:
    """The `Attend` of passes with a token of each question, in the order of `attends`.

    What goes wrong with the pages of one question is noted and ends its attention in the pass, not that of others.

    Args:
        attends: what each question attends to; all behind the same document, in the same way.

    Attributes:
        failed: why questions, by their places, have no output in the last pass.
    """

    def __init__(self, attends: Sequence[PageAttention]) -> None:
        self.failed: dict[int, RagkitError] = {}
        self._attends = attends
        # Positions in use stay within the model's window, so the rows of one table are those of any longer one.
        self._rotary = max((one.rotary for one in attends), key=lambda rotary: len(rotary.cos))
        device = self._rotary.cos.device
        self._places = torch.arange(len(attends), device=device)
        self._positions = torch.empty(0, dtype=torch.int64, device=device)
        self._written = torch.empty(0)  # rows of a pass as they are before they are turned; nobody reads them

    def begin_at(self, own: Tensor, *, choose: Sequence[bool]) -> None:
        """Begin a pass whose tokens stand at `own` (questions,) int64 among the own ones of each question.

        Args:
            own: known on the device alone.
            choose: whether each question chooses pages or keeps those of the pass before.
        """
        self.failed = {}
        self._positions = own + self._attends[0].layout.start
        for place, attend in enumerate(self._attends):
            attend.begin_at(own[place : place + 1], choose=choose[place])

    def __call__(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Return the attention output, as `Attend` says; zeros of questions that failed."""
        for place, attend in enumerate(self._attends):
            if place not in self.failed:
                row = slice(place, place + 1)
                try:
                    attend.find(layer, queries[row], keys[row])
                except RagkitError as error:
                    self.failed[place] = error
        scratch = self._scratch(keys)
        rope_write_kv(
            queries, keys, values, self._positions, self._places, self._rotary.cos, self._rotary.sin,
            scratch, scratch, rotate_keys=True,
        )  # fmt: skip
        out = torch.zeros_like(queries)
        for place, attend in enumerate(self._attends):
            if place not in self.failed:
                row = slice(place, place + 1)
                out[row] = attend.attend_turned(layer, queries[row], keys[row], values[row])
        return out

    def _scratch(self, keys: Tensor) -> Tensor:
        if self._written.shape[1:] != keys.shape:
            self._written = keys.new_empty((1, *keys.shape))
        return self._written
