"""Decoding steps over pages: on a GPU that holds the whole document, CUDA graphs replay them.

One graph is of steps that choose pages, another of those that keep them. The tokens and their places are all that
changes from step to step, and both lie on the device; which pages a layer attends to never becomes known to the host.
A step of several questions is one pass of the model: its weights are read once for all of them. Which of them choose
is the same again after as many steps as share a choice, so those have a graph each.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ragkit.errors import RagkitError
from ragkit.generation.decoder import Decoder
from ragkit.generation.graph_recorder import GraphRecorder, Recorder
from ragkit.generation.packed_pages import PackedPages
from ragkit.generation.page_attention import PageAttention
from ragkit.generation.put_ids import put_ids

# Several questions are soon others: a step is recorded that came before as often as recording it costs launches.
_SEEN_BEFORE = 2


class PageSteps:
    """The steps of one question over pages, or of several over the same ones.

    Args:
        decoder: the model.
        attends: what each attends to, its question's rows among it.
        own: the place of the first token of each among its own rows.
        recorder: records steps; None launches them one by one.
    """

    def __init__(
        self, decoder: Decoder, attends: Sequence[PageAttention], own: Sequence[int], recorder: Recorder | None
    ) -> None:
        self._decoder = decoder
        self._attends = attends
        self._packed = PackedPages(attends) if len(attends) > 1 else None
        self._recorder = recorder
        self._replays: dict[tuple[bool, ...], Callable[[], object]] = {}
        self._seen: Counter[tuple[bool, ...]] = Counter()
        self._tokens = torch.zeros(len(attends), dtype=torch.int64, device=decoder.device)
        self._own = torch.tensor(own, dtype=torch.int64, device=decoder.device)
        self._logits = torch.empty(0)

    @classmethod
    def of(cls, decoder: Decoder, attends: Sequence[PageAttention], own: Sequence[int]) -> PageSteps:
        """Return the steps of answers, recorded where nothing of them needs the host."""
        can_record = decoder.device.type == "cuda" and all(one.stays_on_device for one in attends)
        return cls(decoder, attends, own, GraphRecorder(decoder.device) if can_record else None)

    @property
    def failed(self) -> Mapping[int, RagkitError]:
        """Why questions have no logits in the last step, by their places; of one alone the step raises it."""
        return {} if self._packed is None else self._packed.failed

    def step(self, token_ids: Sequence[int], choose: Sequence[bool]) -> Tensor:
        """Return (questions, vocab_size) logits after one more token of each; the next step writes there as well.

        Args:
            token_ids: one of each question.
            choose: whether each question chooses pages for it.

        Raises:
            KVCacheError: a page of the only question is damaged and cannot be computed again.
        """
        with self._attends[0].lock:
            self._put(token_ids)
            self._launch(tuple(choose))
            self._own += 1
        return self._logits

    def close(self) -> None:
        """Wait for the last step and let recorded ones go: their memory goes to somebody else."""
        if self._recorder is not None:
            self._recorder.wait()
        self._replays.clear()

    def _put(self, token_ids: Sequence[int]) -> None:
        if len(token_ids) == 1:
            self._tokens.fill_(token_ids[0])
            return
        put_ids(token_ids, self._tokens)

    def _launch(self, choose: tuple[bool, ...]) -> None:
        recorder = self._recorder
        if recorder is None or (self._packed is not None and self._seen[choose] < _SEEN_BEFORE):
            self._seen[choose] += 1
            self._work(choose)
            return
        recorder.begin()
        if choose in self._replays:
            self._replays[choose]()
        else:
            self._replays[choose] = recorder.record(lambda: self._work(choose))
        recorder.end()

    def _work(self, choose: tuple[bool, ...]) -> None:
        if self._packed is None:
            attend, (chooses,) = self._attends[0], choose
            attend.begin_at(self._own, choose=chooses)
            logits = self._decoder.logits(self._decoder.run(self._tokens, attend))
        else:
            self._packed.begin_at(self._own, choose=choose)
            logits = self._decoder.logits(self._decoder.run(self._tokens, self._packed))
        if self._logits.numel():
            self._logits.copy_(logits)
        else:
            self._logits = logits.clone()
