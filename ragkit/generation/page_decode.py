"""Decoding steps over pages: on a GPU that holds the whole document, two CUDA graphs replay them.

One graph is of steps that choose pages, the other of those that keep them. The token and its place are all that changes
from step to step, and both lie on the device; which pages a layer attends to never becomes known to the host.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ragkit.generation.decode_state import DecodeState
from ragkit.generation.decoder import Decoder
from ragkit.generation.graph_recorder import GraphRecorder, Recorder
from ragkit.generation.page_attention import PageAttention
from ragkit.kvcache.request_kv import RequestKV
from ragkit.kvcache.rope import RotaryTable


class PageSteps:
    """The `StepRunner` of one answer over pages.

    Args:
        decoder: the model.
        attend: what it attends to, the question's rows among it.
        interval: steps that share one choice.
        first: the place of the first token among the own rows.
        recorder: records steps; None launches them one by one.
    """

    def __init__(
        self, decoder: Decoder, attend: PageAttention, interval: int, first: int, recorder: Recorder | None
    ) -> None:
        self._decoder = decoder
        self._attend = attend
        self._interval = interval
        self._recorder = recorder
        self._done = 0
        self._replays: dict[bool, Callable[[], object]] = {}
        self._token = torch.zeros(1, dtype=torch.int64, device=decoder.device)
        self._own = torch.full((1,), first, dtype=torch.int64, device=decoder.device)
        self._logits = torch.empty(0)

    @classmethod
    def of(cls, decoder: Decoder, attend: PageAttention, interval: int, first: int) -> PageSteps:
        """Return the steps of an answer, recorded where nothing of them needs the host."""
        can_record = decoder.device.type == "cuda" and attend.stays_on_device
        return cls(decoder, attend, interval, first, GraphRecorder(decoder.device) if can_record else None)

    def begin(self, kv: RequestKV, rotary: RotaryTable) -> DecodeState:
        """Return a state that nobody looks at."""
        return DecodeState(kv, rotary)

    def step(self, states: Sequence[DecodeState], token_ids: Sequence[int]) -> Tensor:
        """Return (1, vocab_size) logits after one more token."""
        with self._attend.lock:
            return self._step(token_ids[0])

    def _step(self, token_id: int) -> Tensor:
        chooses = self._done % self._interval == 0
        self._token.fill_(token_id)
        if self._recorder is None:
            self._work(chooses)
        elif chooses in self._replays:
            self._recorder.begin()
            self._replays[chooses]()
            self._recorder.end()
        else:
            self._recorder.begin()
            self._replays[chooses] = self._recorder.record(lambda: self._work(chooses))
            self._recorder.end()
        self._own += 1
        self._done += 1
        return self._logits

    def _work(self, chooses: bool) -> None:
        self._attend.begin_at(self._own, choose=chooses)
        logits = self._decoder.logits(self._decoder.run(self._token, self._attend))
        if self._logits.numel():
            self._logits.copy_(logits)
        else:
            self._logits = logits.clone()
