"""What a pass over few tokens does between two attentions: launched one by one, or replayed as one CUDA graph a layer.

Between two attentions everything depends on the number of tokens alone: the end of one layer (output projection,
feed-forward) and the beginning of the next (norm, queries, keys and values). A question's tokens are so few that
launching these steps takes the host longer than the GPU takes to run them. So the numbers of tokens are rounded up to
buckets; a bucket that is asked for again gets static buffers and a CUDA graph for each layer, recorded while that
request runs. Plain launches take the same number of rows, so that both multiply by the same kernels.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from ragkit.generation.graph_recorder import GraphRecorder, Recorder
from ragkit.generation.second_sight import SecondSight
from ragkit.kernels.backend import ceil_div

if TYPE_CHECKING:
    from ragkit.generation.decoder import Activations, Decoder

ROW_STEP = 16  # buckets are multiples of this: a matrix product's smallest tile has as many rows
MOST_ROWS = 256  # for more tokens the GPU has work while the host launches
_MOST_BUCKETS = 4  # that have graphs at a time; one of 64 rows takes about 10 MB beside an 8B model


class Heads(NamedTuple):
    """What a layer gives attention.

    Attributes:
        queries: (tokens, q_heads, head_dim), before rotation; may be overwritten.
        keys, values: (tokens, kv_heads, head_dim), keys after bias and norm and before rotation; as queries.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor


class Steps(Protocol):
    """What one pass does beside attention. The tensors hold until the next call."""

    def first(self, token_ids: Tensor) -> Heads:
        """Return what the first layer gives attention, for (tokens,) int64 ids."""
        ...

    def following(self, layer: int, attended: Tensor) -> Heads:
        """Return what the layer after `layer` gives attention, whose output there was `attended`, as queries."""
        ...


class DenseSteps:
    """The steps of one decoder. Thread-safe: one pass at a time has the buffers, others launch one by one.

    Args:
        make_recorder: makes what records a bucket; None never records.
        most_buckets: buckets that have graphs at a time; the one that was not used for longest goes.
        row_step: what numbers of tokens are rounded up to.
    """

    def __init__(
        self,
        make_recorder: Callable[[], Recorder] | None,
        most_buckets: int = _MOST_BUCKETS,
        row_step: int = ROW_STEP,
    ) -> None:
        self._make_recorder = make_recorder
        self._row_step = row_step
        self._lock = threading.Lock()
        self._buckets: SecondSight[RecordedSteps] = SecondSight(most_buckets)

    @classmethod
    def on(cls, device: torch.device) -> DenseSteps:
        """Return those of a decoder on `device`: recorded on a GPU, rows as they are on a CPU."""
        if device.type != "cuda":
            return cls(None, row_step=1)
        return cls(partial(GraphRecorder, device))

    @contextmanager
    def of(self, decoder: Decoder, tokens: int) -> Iterator[Steps]:
        """Give the steps of one pass over `tokens` tokens; `decoder` is always the same one."""
        rows = ceil_div(tokens, self._row_step) * self._row_step
        make = self._make_recorder
        if make is None or not 0 < rows <= MOST_ROWS:
            yield PlainSteps(decoder, tokens)
        elif not self._lock.acquire(blocking=False):
            yield PlainSteps(decoder, rows)
        else:
            try:
                steps = self._buckets.take(rows, partial(_recorded_steps, decoder, rows, make), RecordedSteps.close)
                if steps is None:
                    yield PlainSteps(decoder, rows)
                else:
                    yield from steps.one_pass(decoder)
            finally:
                self._lock.release()


def _recorded_steps(decoder: Decoder, rows: int, make_recorder: Callable[[], Recorder]) -> RecordedSteps:
    return RecordedSteps(decoder, rows, make_recorder())


class PlainSteps:
    """Every step launched.

    Args:
        decoder: the model.
        rows: rows that are computed; those past the tokens mean nothing.
    """

    def __init__(self, decoder: Decoder, rows: int) -> None:
        self._decoder = decoder
        self._rows = rows
        self._tokens = 0
        self._residual = torch.empty(0)

    def first(self, token_ids: Tensor) -> Heads:
        """Return what the first layer gives attention."""
        self._tokens = len(token_ids)
        return self._projected(0, self._decoder.embed(self._padded(token_ids)))

    def following(self, layer: int, attended: Tensor) -> Heads:
        """Return what the layer after `layer` gives attention."""
        return self._projected(layer + 1, self._decoder.complete(layer, self._padded(attended), self._residual))

    def _projected(self, layer: int, activations: Activations) -> Heads:
        queries, keys, values, self._residual = self._decoder.project(layer, activations)
        return Heads(queries[: self._tokens], keys[: self._tokens], values[: self._tokens])

    def _padded(self, tensor: Tensor) -> Tensor:
        missing = self._rows - len(tensor)
        return functional.pad(tensor, (0, 0) * (tensor.dim() - 1) + (0, missing)) if missing else tensor


class RecordedSteps:
    """The steps of one bucket in static buffers: recorded when they are first done, one call each from then on.

    Buffers are shared by all layers, and a step begins where the one before it ended. Rows past the tokens hold
    whatever was there before: no step mixes rows.

    Args:
        decoder: the model.
        rows: rows of the buffers.
        recorder: records the steps.
    """

    def __init__(self, decoder: Decoder, rows: int, recorder: Recorder) -> None:
        config, device, dtype = decoder.config, decoder.device, decoder.dtype
        q_heads, kv_heads = config.num_q_heads, config.num_kv_heads
        with torch.inference_mode(False):  # so that passes may write into them in either mode
            self._token_ids = torch.zeros(rows, dtype=torch.int64, device=device)
            self._attended = torch.zeros((rows, q_heads, config.head_dim), dtype=dtype, device=device)
            self._heads = torch.zeros((rows, q_heads + 2 * kv_heads, config.head_dim), dtype=dtype, device=device)
            self._residual = torch.zeros((rows, config.hidden_size), dtype=dtype, device=device)
        self._split = (q_heads, kv_heads, kv_heads)
        self._recorder = recorder
        self._replays: dict[int, Callable[[], object]] = {}

    def one_pass(self, decoder: Decoder) -> Iterator[Steps]:
        """Give the steps of one pass."""
        self._recorder.begin()
        try:
            yield _RecordedPass(self, decoder)
        finally:
            self._recorder.end()

    def close(self) -> None:
        """Wait for the last pass: the memory goes to somebody else."""
        self._recorder.wait()
        self._replays.clear()

    def begin(self, decoder: Decoder, token_ids: Tensor) -> Heads:
        """Return views of the tokens' rows, in which each step leaves what the next layer gives attention."""
        self._token_ids[: len(token_ids)] = token_ids
        self._step(decoder, 0)
        return Heads(*self._heads[: len(token_ids)].split(self._split, dim=1))

    def proceed(self, decoder: Decoder, layer: int, attended: Tensor) -> None:
        """Do what follows attention in `layer`."""
        self._attended[: len(attended)] = attended
        self._step(decoder, layer + 1)

    def _step(self, decoder: Decoder, layer: int) -> None:
        replay = self._replays.get(layer)
        if replay is None:
            self._replays[layer] = self._recorder.record(partial(self._work, decoder, layer))
        else:
            replay()

    def _work(self, decoder: Decoder, layer: int) -> None:
        """Do everything from the attention before `layer` to the one in it."""
        if layer == 0:
            activations = decoder.embed(self._token_ids)
        else:
            activations = decoder.complete(layer - 1, self._attended, self._residual)
        queries, keys, values, residual = decoder.project(layer, activations)
        torch.cat((queries, keys, values), dim=1, out=self._heads)
        self._residual.copy_(residual)


class _RecordedPass:
    """One pass through recorded steps."""

    def __init__(self, steps: RecordedSteps, decoder: Decoder) -> None:
        self._steps = steps
        self._decoder = decoder
        self._heads = Heads(*(torch.empty(0),) * 3)

    def first(self, token_ids: Tensor) -> Heads:
        """Return what the first layer gives attention."""
        self._heads = self._steps.begin(self._decoder, token_ids)
        return self._heads

    def following(self, layer: int, attended: Tensor) -> Heads:
        """Return what the layer after `layer` gives attention: the same views, with other numbers."""
        self._steps.proceed(self._decoder, layer, attended)
        return self._heads
