"""The rows of a prompt's first tokens, which stand before its chunks: written once for all layers of a request."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from ragkit.kernels.host_copy import to_device
from ragkit.kvcache.codec import LayerKV
from ragkit.kvcache.pool import KVPool

_MOST_RUNS = 4  # of rows behind each other; with more, views of them take the host longer than launches


def write_prefix(pool: KVPool, slots: Tensor, prefix: Sequence[LayerKV]) -> None:
    """Write `prefix` into rows of the pool.

    On a GPU a launch or two write all layers, where one by one every layer takes two in each pass over the request.

    Args:
        pool: where the rows are.
        slots: (tokens,) int64 on the host, rows of the pool counted over blocks.
        prefix: keys and values (tokens, kv_heads, head_dim), a pair a layer.
    """
    if not len(slots):
        return
    rows = [part.flatten(0, 1) for pair in zip(pool.keys, pool.values, strict=True) for part in pair]
    parts = [part for pair in prefix for part in pair]
    places = slots.numpy()
    cuts = [0, *(np.flatnonzero(np.diff(places) != 1) + 1).tolist(), len(places)]
    if len(cuts) - 1 > _MOST_RUNS:
        on_device = to_device(slots, pool.device)
        for target, part in zip(rows, parts, strict=True):
            target.index_copy_(0, on_device, part)
        return
    targets, sources = [], []
    for start, stop in pairwise(cuts):
        first = int(places[start])
        targets += [target[first : first + stop - start] for target in rows]
        sources += [part[start:stop] for part in parts]
    torch._foreach_copy_(targets, sources)
