"""Losses of the tokens of texts of any length, in one streaming pass with a sliding KV window.

Texts run side by side as streams: each pass takes the next segment of as many streams as fit a batch, through the
linear layers as one packed matrix and through attention stream by stream. A segment attends to itself and to the
last `window` tokens before it. Keys are kept before RoPE and turned by their place in the window when they are used,
so that dropping the oldest leaves every distance as it was and no position grows beyond the trained ones. The first
few tokens of a text are never dropped: models lean on them, and lose their footing where they are gone (attention
sinks, StreamingLLM, arXiv 2309.17453); they stand right before the window.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ragkit.errors import UsageError
from ragkit.generation.attention import causal_attention
from ragkit.kvcache.rope import RotaryTable

if TYPE_CHECKING:
    from ragkit.generation.decoder import Activations, Decoder

Losses = NDArray[np.float32]

_SINKS = 4
_WINDOW, _SEGMENT = 1024, 2048
_LOGITS = 1 << 28  # logits held at once, in numbers, on a GPU; a sixteenth of that on a CPU


@dataclass
class _Stream:
    """One text on its way: its ids, what is done, and its KV window (keys un-rotated), a pair a layer."""

    index: int
    token_ids: Sequence[int]
    done: int = 0
    window: list[tuple[Tensor, Tensor]] = field(default_factory=list)


class DecoderLosses:
    """Computes token losses with a `Decoder`.

    Args:
        decoder: the model.
        window: tokens before a segment that it attends to; 1,024, or what the model's own window leaves.
        segment: most tokens of one text that a pass takes; 2,048, or two thirds of a smaller window of the model.
        batch: most tokens of all texts that a pass takes.

    Attributes:
        tokens_forwarded: tokens that went through the model since it was made.
    """

    def __init__(
        self, decoder: Decoder, window: int | None = None, segment: int | None = None, batch: int = 4096
    ) -> None:
        longest = decoder.config.max_context
        if segment is None:
            segment = min(_SEGMENT, max(1, (longest - _SINKS) * 2 // 3))
        if window is None:
            window = min(_WINDOW, max(1, longest - _SINKS - segment))
        reach = _SINKS + window + segment
        if min(window, segment, batch) < 1 or reach > longest:
            raise UsageError(
                f"window, segment and batch must be at least 1, and window + segment at most {longest - _SINKS} tokens "
                f"for this model, got {window}, {segment} and {batch}"
            )
        self._decoder = decoder
        self._window, self._segment, self._batch = window, segment, batch
        self._rotary = RotaryTable.build(decoder.config.rope, decoder.config.head_dim, reach, decoder.device, reach)
        on_cpu = decoder.device.type == "cpu"
        self._logit_rows = max(1, _LOGITS // (16 if on_cpu else 1) // decoder.config.vocab_size)
        self.tokens_forwarded = 0

    @property
    def settings(self) -> str:
        """What changes the losses besides the weights."""
        return f"window {self._window} segment {self._segment} {self._decoder.dtype}"

    @torch.inference_mode()
    def token_losses(self, texts: Sequence[Sequence[int]]) -> list[Losses]:
        """Return, for the token ids of each text, (tokens - 1,) nats of each token given those before it."""
        found: list[list[Tensor]] = [[] for _ in texts]
        for parts in _passes([_Stream(index, ids) for index, ids in enumerate(texts)], self._segment, self._batch):
            for stream, losses in zip([stream for stream, _ in parts], self._forward(parts), strict=True):
                found[stream.index].append(losses)
        return [torch.cat(some).float().cpu().numpy() if some else np.zeros(0, np.float32) for some in found]

    def _forward(self, parts: Sequence[tuple[_Stream, int]]) -> list[Tensor]:
        ids = [token for stream, size in parts for token in stream.token_ids[stream.done : stream.done + size]]
        last = [stream.done + size == len(stream.token_ids) for stream, size in parts]
        self.tokens_forwarded += len(ids)
        attend = _WindowAttention(self._rotary, self._decoder.scale, self._window, parts, last)
        activations = self._decoder.run(ids, attend)
        # Row t foretells token t + 1, which for the last row of a segment is the first of the next one.
        targets: list[int] = []
        rows: list[int] = []
        sizes: list[int] = []
        begin = 0
        for (stream, size), ends in zip(parts, last, strict=True):
            known = size - 1 if ends else size
            targets += stream.token_ids[stream.done + 1 : stream.done + 1 + known]
            rows += range(begin, begin + known)
            sizes.append(known)
            begin += size
            stream.done += size
        return list(self._losses(activations, rows, targets).split(sizes))

    def _losses(self, activations: Activations, rows: list[int], targets: list[int]) -> Tensor:
        device = self._decoder.device
        row = torch.tensor(rows, dtype=torch.int64).to(device)
        target = torch.tensor(targets, dtype=torch.int64).to(device)
        losses = [
            torch.nn.functional.cross_entropy(
                self._decoder.logits(activations.rows(some)).float(), wanted, reduction="none"
            )
            for some, wanted in zip(row.split(self._logit_rows), target.split(self._logit_rows), strict=True)
            if len(some)
        ]
        return torch.cat(losses) if losses else torch.zeros(0, device=device)


class _WindowAttention:
    """The `Attend` of one pass: each stream's segment behind its own window, which is moved on."""

    def __init__(
        self,
        rotary: RotaryTable,
        scale: float,
        window: int,
        parts: Sequence[tuple[_Stream, int]],
        last: Sequence[bool],
    ) -> None:
        self._rotary, self._scale, self._window = rotary, scale, window
        self._parts, self._last = parts, last
        longest = _SINKS + window + max(size for _, size in parts)
        self._positions = torch.arange(longest, device=rotary.cos.device)

    def __call__(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Return the attention output of the packed segments, as `Attend` says."""
        out: list[Tensor] = []
        begin = 0
        for (stream, size), ends in zip(self._parts, self._last, strict=True):
            own = slice(begin, begin + size)
            begin += size
            key, value = keys[own], values[own]
            if stream.done:
                earlier_key, earlier_value = stream.window[layer]
                key, value = torch.cat((earlier_key, key)), torch.cat((earlier_value, value))
            positions = self._positions[: len(key)]
            rotated = self._rotary.rotate(key, positions)
            query = self._rotary.rotate(queries[own], positions[len(key) - size :])
            if not ends:
                kept = self._kept(key), self._kept(value)
                if stream.done:
                    stream.window[layer] = kept
                else:
                    stream.window.append(kept)
            out.append(causal_attention(query, rotated, value, self._scale))
        return torch.cat(out) if len(out) > 1 else out[0]

    def _kept(self, rows: Tensor) -> Tensor:
        """Return the rows that the next segment attends to."""
        if len(rows) <= _SINKS + self._window:
            return rows.clone()
        return torch.cat((rows[:_SINKS], rows[-self._window :]))


def _passes(streams: list[_Stream], segment: int, batch: int) -> Iterator[list[tuple[_Stream, int]]]:
    """Yield batches of (stream, tokens of its next segment) until all texts are done.

    A text in hand goes on before another is begun, so that few KV windows live at a time.
    """
    waiting = [stream for stream in streams if len(stream.token_ids) > 1]
    waiting.reverse()
    while waiting:
        parts: list[tuple[_Stream, int]] = []
        room = batch
        unfinished: list[_Stream] = []
        while waiting and room:
            stream = waiting.pop()
            size = min(segment, room, len(stream.token_ids) - stream.done)
            parts.append((stream, size))
            room -= size
            if stream.done + size < len(stream.token_ids):
                unfinished.append(stream)
        yield parts
        waiting += reversed(unfinished)
