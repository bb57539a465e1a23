"""Losses of the tokens of texts of any length, in one streaming pass with a sliding KV window.

Texts run behind each other, in passes of as many tokens as keep the device busy: through the linear layers as one
packed matrix, and through attention in segments that attend to themselves and to the last `window` tokens before them
(`ragkit.chunking.window_attention`). Where a text is cut into segments depends on the text alone, so that what runs
beside it does not change its losses. The device is not waited for before the last pass: the ids go there at once, the
losses come back at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ragkit.chunking.window_attention import SINKS, Piece, WindowAttention
from ragkit.errors import GenerationError, UsageError
from ragkit.kernels.cross_entropy import cross_entropy
from ragkit.kernels.host_copy import to_device
from ragkit.kvcache.rope import RotaryTable

if TYPE_CHECKING:
    from ragkit.generation.decoder import Activations, Decoder

Losses = NDArray[np.float32]

_WINDOW, _SEGMENT = 1024, 2048
_BATCH = {"cpu": 4096, "cuda": 32768}
_LOGITS = {"cpu": 1 << 24, "cuda": 1 << 29}  # logits held at once, in numbers
_ROWS = 256  # slices of more rows than that are a multiple of it, as matrix products like it


class DecoderLosses:
    """Computes token losses with a `Decoder`.

    Args:
        decoder: the model.
        window: tokens before a segment that it attends to; 1,024, or what the model's own window leaves.
        segment: most tokens that share a window; 2,048, or two thirds of a smaller window of the model.
        batch: most tokens that a pass takes, no fewer than a segment; 4,096 on a CPU, 32,768 on a GPU.
        grouped: attend to segments of about one length at once, filled up to one length; None for where that is
            faster, on a GPU, for whose launches small segments are too short.

    Attributes:
        tokens_forwarded: tokens that went through the model since it was made.
    """

    def __init__(
        self,
        decoder: Decoder,
        window: int | None = None,
        segment: int | None = None,
        batch: int | None = None,
        *,
        grouped: bool | None = None,
    ) -> None:
        longest, device = decoder.config.max_context, decoder.device
        if segment is None:
            segment = min(_SEGMENT, max(1, (longest - SINKS) * 2 // 3))
        if window is None:
            window = min(_WINDOW, max(1, longest - SINKS - segment))
        if batch is None:
            batch = max(_BATCH[device.type], segment)
        reach = SINKS + window + segment
        if min(window, segment) < 1 or batch < segment or reach > longest:
            raise UsageError(
                f"window and segment must be at least 1, batch no less than segment, and window + segment at most "
                f"{longest - SINKS} tokens for this model, got {window}, {segment} and {batch}"
            )
        self._decoder = decoder
        self._window, self._segment, self._batch = window, segment, batch
        rotary = RotaryTable.build(decoder.config.rope, decoder.config.head_dim, reach, device, reach)
        grouped = device.type == "cuda" if grouped is None else grouped
        self._attention = WindowAttention(rotary, decoder.scale, window, segment, grouped=grouped)
        rows = max(1, _LOGITS[device.type] // decoder.config.vocab_size)
        self._logit_rows = rows - rows % _ROWS if rows > _ROWS else rows
        self.tokens_forwarded = 0

    @property
    def settings(self) -> str:
        """What changes the losses besides the weights."""
        return f"window {self._window} segment {self._segment} {self._decoder.dtype}"

    def keys_seen(self, tokens: int) -> int:
        """Return how many keys the tokens of one text of `tokens` see in all, their own among them."""
        seen = 0
        for start in range(0, tokens, self._segment):
            size = min(self._segment, tokens - start)
            seen += size * min(start, SINKS + self._window) + size * (size + 1) // 2
        return seen

    @torch.inference_mode()
    def token_losses(self, texts: Sequence[Sequence[int]]) -> list[Losses]:
        """Return, for the token ids of each text, (tokens - 1,) nats of each token given those before it.

        Raises:
            GenerationError: an id is not in the vocabulary.
        """
        lengths = [len(ids) if len(ids) > 1 else 0 for ids in texts]
        if not any(lengths):
            return [np.zeros(0, np.float32) for _ in texts]
        ids = np.concatenate([np.asarray(text, np.int64) for text, size in zip(texts, lengths, strict=True) if size])
        self._check(ids)
        on_device = to_device(torch.from_numpy(np.append(ids, 0)), self._decoder.device)
        found: list[Tensor] = []
        begin = 0
        for pieces in _passes(lengths, self._segment, self._batch):
            stop = begin + sum(piece.stop - piece.start for piece in pieces)
            found.append(self._forward(pieces, on_device[begin : stop + 1]))
            begin = stop
        losses = torch.cat(found).cpu().numpy()
        # The last token of a text foretells what stands behind it, which is no part of it.
        ends = np.cumsum(lengths).tolist()
        return [losses[end - size : max(end - size, end - 1)] for size, end in zip(lengths, ends, strict=True)]

    def _check(self, ids: NDArray[np.int64]) -> None:
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self._decoder.config.vocab_size:
            raise GenerationError(f"token ids must lie below {self._decoder.config.vocab_size}, got {low} to {high}")

    def _forward(self, pieces: Sequence[Piece], ids: Tensor) -> Tensor:
        """Return (tokens,) losses of the tokens behind each token of a pass; `ids` (tokens + 1,) hold one more."""
        self.tokens_forwarded += len(ids) - 1
        self._attention.begin(pieces)
        return self._losses(self._decoder.run(ids[:-1], self._attention), ids[1:])

    def _losses(self, activations: Activations, targets: Tensor) -> Tensor:
        losses = torch.empty(len(targets), dtype=torch.float32, device=targets.device)
        for start in range(0, len(targets), self._logit_rows):
            some = slice(start, start + self._logit_rows)
            losses[some] = cross_entropy(self._decoder.logits(activations.rows(some)), targets[some])
        return losses


def _passes(lengths: Sequence[int], segment: int, batch: int) -> Iterator[list[Piece]]:
    """Yield what each pass takes: the texts in order, cut between segments where a pass is full."""
    pieces: list[Piece] = []
    room = batch
    for length in lengths:
        start = 0
        while start < length:
            left = length - start
            size = left if left <= room else room - room % segment
            if size:
                pieces.append(Piece(start, start + size, ends=size == left))
                start += size
                room -= size
            if start < length:  # one text alone goes on from pass to pass, so that one KV window lives at a time
                yield pieces
                pieces, room = [], batch
    if pieces:
        yield pieces
