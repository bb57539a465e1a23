"""Attention of segments of texts, each to itself and to a window before it, many segments in one pass of a model.

A pass takes consecutive segments of one text, or of several, packed behind each other. A segment's window lies in the
segments before it, in the same pass or in the one before; since attention goes layer by layer, it does not matter in
which: segments in one pass see what they would see in passes of their own. Keys are kept before RoPE and turned by
their place in the window when they are used, so that dropping the oldest leaves every distance as it was and no
position grows beyond the trained ones. The first few tokens of a text are never dropped: models lean on them, and lose
their footing where they are gone (attention sinks, StreamingLLM, arXiv 2309.17453); they stand right before the window.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from ragkit.generation.attention import causal_attention
from ragkit.kernels.host_copy import to_device
from ragkit.kernels.rope_write_kv import rope_write_kv
from ragkit.kvcache.rope import RotaryTable

SINKS = 4
_LEAST_PADDED = 64  # segments of up to so many tokens are filled up to one length

_Rows: TypeAlias = NDArray[np.int64]
_Index: TypeAlias = slice | Tensor


@dataclass(frozen=True, slots=True)
class Piece:
    """The tokens from `start` to `stop` of a text that a pass takes: whole segments, or up to the text's end."""

    start: int
    stop: int
    ends: bool


@dataclass(frozen=True, slots=True)
class _Segment:
    """The rows `begin` to `stop` of a pass, and the rows of all keys that stand before them."""

    begin: int
    stop: int
    context: _Rows


@dataclass(frozen=True, slots=True)
class _Group:
    """Segments behind contexts of one length, attended to at once; shorter ones are filled up behind their end.

    Attributes:
        count: number of segments.
        query_rows: (count * tokens,) rows of the pass.
        key_rows: (count * keys,) rows of all keys.
        places: (count * keys,) position of each key in its window.
    """

    count: int
    query_rows: _Index
    key_rows: _Index
    places: Tensor


class WindowAttention:
    """The `Attend` of passes over pieces of texts. `begin` says before each pass what it will take.

    Args:
        rotary: reaches over `SINKS` + `window` + `segment` positions.
        scale: factor on the scores.
        window: tokens before a segment that it attends to.
        segment: most tokens behind one window.
        grouped: attend to segments of about one length at once; else to one after another, and none is filled up.
    """

    def __init__(self, rotary: RotaryTable, scale: float, window: int, segment: int, *, grouped: bool) -> None:
        self._rotary, self._scale = rotary, scale
        self._window, self._segment, self._grouped = window, segment, grouped
        self._earlier: list[tuple[Tensor, Tensor]] = []  # a layer each: what the next pass goes on behind
        self._earlier_rows = 0
        self._groups: list[_Group] = []
        self._order: Tensor | None = None
        self._kept: Tensor | None = None
        self._slots = self._places = self._on_device(np.zeros(0, np.int64))

    def begin(self, pieces: Sequence[Piece]) -> None:
        """Plan a pass. Its first piece may go on with the text of the last piece of the pass before; no other may."""
        first = pieces[0]
        earlier = self._earlier_rows = min(first.start, SINKS + self._window)
        segments = list(self._segments(pieces))
        groups = _alike(segments) if self._grouped else [[one] for one in segments]
        self._groups = [self._group(some) for some in groups]
        self._order = self._inverse(groups) if self._grouped else None
        tokens = segments[-1].stop
        self._slots = self._on_device(np.arange(earlier, earlier + tokens))
        self._places = self._on_device(
            np.concatenate([len(one.context) + np.arange(one.stop - one.begin) for one in segments])
        )
        last = pieces[-1]
        origin = 0 if last is first and first.start else earlier + tokens - (last.stop - last.start)
        self._kept = None if last.ends else self._on_device(self._context(origin, earlier + tokens))

    def __call__(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Return the attention output of the packed segments, as `Attend` says."""
        earlier = self._earlier_rows
        shape = (earlier + len(keys), *keys.shape[1:])
        all_keys, all_values = keys.new_empty(shape), values.new_empty(shape)
        if earlier:
            all_keys[:earlier], all_values[:earlier] = self._earlier[layer]
        rope_write_kv(
            queries, keys, values, self._places, self._slots, self._rotary.cos, self._rotary.sin,
            all_keys.unsqueeze(0), all_values.unsqueeze(0), rotate_keys=False,
        )  # fmt: skip
        attended = [self._attended(group, queries, all_keys, all_values) for group in self._groups]
        if self._kept is not None:
            self._earlier[layer : layer + 1] = [(all_keys[self._kept], all_values[self._kept])]
        out = torch.cat(attended) if len(attended) > 1 else attended[0]
        return out if self._order is None else out[self._order]

    def _segments(self, pieces: Sequence[Piece]) -> Iterator[_Segment]:
        """Yield the segments of a pass, in order."""
        begin, earlier = 0, self._earlier_rows
        for piece in pieces:
            origin = 0 if piece.start else earlier + begin  # the row of the text's first token among all keys
            for start in range(piece.start, piece.stop, self._segment):
                size = min(self._segment, piece.stop - start)
                yield _Segment(begin, begin + size, self._context(origin, earlier + begin))
                begin += size

    def _context(self, origin: int, at: int) -> _Rows:
        """Return the rows that tokens from row `at` on see before them: the text's first ones, and the window."""
        first = max(origin + SINKS, at - self._window)
        return np.concatenate((np.arange(origin, min(origin + SINKS, at)), np.arange(first, at)))

    def _group(self, segments: Sequence[_Segment]) -> _Group:
        longest = max(one.stop - one.begin for one in segments)
        own = [np.minimum(one.begin + np.arange(longest), one.stop - 1) for one in segments]
        keys = [
            np.concatenate((one.context, self._earlier_rows + rows)) for one, rows in zip(segments, own, strict=True)
        ]
        places = np.tile(np.arange(len(keys[0])), len(segments))
        query_rows, key_rows = self._index(np.concatenate(own)), self._index(np.concatenate(keys))
        return _Group(len(segments), query_rows, key_rows, self._on_device(places))

    def _attended(self, group: _Group, queries: Tensor, all_keys: Tensor, all_values: Tensor) -> Tensor:
        """Return (count * tokens, q_heads, head_dim) of a group, with what fills up its segments."""
        keys = self._rotary.rotate(all_keys[group.key_rows], group.places)
        values, queries = all_values[group.key_rows], queries[group.query_rows]
        if group.count == 1:
            return causal_attention(queries, keys, values, self._scale)
        return _batched_attention(group.count, queries, keys, values, self._scale)

    def _inverse(self, groups: Sequence[Sequence[_Segment]]) -> Tensor | None:
        """Return where each row of the pass stands in the groups' output; None where the two are the same."""
        places: list[_Rows] = []
        order: list[int] = []
        filled = 0
        for group in groups:
            longest = max(one.stop - one.begin for one in group)
            for one in group:
                order.append(one.begin)
                places.append(filled + np.arange(one.stop - one.begin))
                filled += longest
        rows = np.concatenate([places[at] for at in np.argsort(order)])
        return None if len(rows) == filled and _consecutive(rows) else self._on_device(rows)

    def _index(self, rows: _Rows) -> _Index:
        return slice(int(rows[0]), int(rows[-1]) + 1) if _consecutive(rows) else self._on_device(rows)

    def _on_device(self, rows: _Rows) -> Tensor:
        return to_device(torch.from_numpy(rows.astype(np.int64, copy=False)), self._rotary.cos.device)


def _alike(segments: Sequence[_Segment]) -> list[list[_Segment]]:
    """Return groups of one length of context, and of sizes up to the same power of two."""
    groups: dict[tuple[int, int], list[_Segment]] = {}
    for one in segments:
        size = max(_LEAST_PADDED, one.stop - one.begin)
        groups.setdefault((len(one.context), (size - 1).bit_length()), []).append(one)
    return list(groups.values())


def _batched_attention(count: int, queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """Return what `causal_attention` does for each of `count` equal parts of the rows."""
    from torch.nn.attention.bias import causal_lower_right

    heads, stored, content = (rows.unflatten(0, (count, -1)).transpose(1, 2) for rows in (queries, keys, values))
    tokens, rows = heads.shape[2], stored.shape[2]
    out = functional.scaled_dot_product_attention(
        heads, stored, content, attn_mask=causal_lower_right(tokens, rows), scale=scale,
        enable_gqa=queries.shape[1] != keys.shape[1],
    )  # fmt: skip
    return out.transpose(1, 2).flatten(0, 1)


def _consecutive(rows: _Rows) -> bool:
    return bool((np.diff(rows) == 1).all())
