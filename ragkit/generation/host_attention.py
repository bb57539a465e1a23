"""Attention on a CPU in bf16, scores in fp32: by matrix products of oneDNN instead of torch's SDPA.

Measured on one AMD core with AVX-512 and no AMX, 9 query heads on 3 key heads of 64: a causal pass takes half of
SDPA's time with fp32 scores and their softmax (1,600 rows: 25 to 29 ms, and 50), and three quarters of that again where
the product's own pass takes the exponentials; one token 160 us, 280 by SDPA. Behind 7,616 rows one token takes 0.7
of SDPA's time, five to nine take half of it; behind 2,048 SDPA is no slower for one.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ragkit.kernels.row_scores import (
    LEAST_SCORE,
    MOST_SCORE,
    ROWS_MULTIPLE,
    SHIFT,
    padded_rows,
    row_exponentials,
    row_scores,
)

_QUERY_BLOCK = 128  # queries at once: fewer multiply more slowly, more waste work on what is masked
_MANY_ROWS = 4096  # from which on few queries are faster here
# Sums of exponentials between which all that counts is exact: what is a 10^8th part of the least sum is still there.
_LEAST_SUM, _MOST_SUM = math.exp(LEAST_SCORE - SHIFT + 18), math.exp(MOST_SCORE - SHIFT)


def causal_host_attention(queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """Return (tokens, q_heads, head_dim): the last `tokens` rows attend to themselves and all rows before.

    Args:
        queries: (tokens, q_heads, head_dim), rotated.
        keys, values: (rows, kv_heads, head_dim), rows >= tokens, keys rotated.
        scale: factor on the scores.
    """
    tokens, rows, kv_heads = len(queries), len(keys), keys.shape[1]
    group = queries.shape[1] // kv_heads
    asking = queries.unflatten(1, (kv_heads, group)).permute(1, 0, 2, 3).contiguous()
    stored, content = _head_after_head(keys), _head_after_head(values)
    visible = torch.ones((_QUERY_BLOCK, _QUERY_BLOCK + ROWS_MULTIPLE), dtype=queries.dtype).tril_().unsqueeze(1)
    out = torch.empty(queries.shape, dtype=queries.dtype)
    result = out.unflatten(1, (kv_heads, group)).permute(1, 0, 2, 3)
    for place in range(0, tokens, _QUERY_BLOCK):
        # The last block begins earlier instead of being shorter: oneDNN compiles for each new shape.
        stop = min(place + _QUERY_BLOCK, tokens)
        start = max(stop - _QUERY_BLOCK, 0)
        own = rows - tokens + start  # from this row on, not all queries of the block see a row
        reach = padded_rows(rows - tokens + stop)
        mask = visible[: stop - start, :, : reach - own]
        for head in range(kv_heads):  # one after the other: what is computed of the scores stays in the cache
            block, seen, read = asking[head, start:stop], stored[head, :reach], content[head, :reach]
            attended = _by_exponentials(block, seen, read, mask, scale)
            result[head, start:stop] = _by_softmax(block, seen, read, mask, scale) if attended is None else attended
    return out


def _by_exponentials(queries: Tensor, keys: Tensor, values: Tensor, visible: Tensor, scale: float) -> Tensor | None:
    """Return (tokens, group, head_dim) fp32, attention by `row_exponentials`; None where that is not exact.

    Softmax without its greatest score: it does not matter what is subtracted as long as the exponentials have room.
    Whether they had is seen in their sums, none of which any exponential exceeds.

    Args:
        queries: (tokens, group, head_dim).
        keys, values: (rows, head_dim).
        visible: (tokens, 1, last rows), 1 where a query sees one of the last rows, else 0.
        scale: factor on the scores.
    """
    if math.frexp(scale)[0] != 0.5 or queries.dtype != torch.bfloat16:
        return None  # not a power of two: scaled queries would be rounded
    exponentials = row_exponentials((queries * scale).flatten(0, 1), keys)
    per_token = exponentials.view(*queries.shape[:2], len(keys))
    per_token[:, :, len(keys) - visible.shape[2] :].mul_(visible)
    sums = exponentials.sum(dim=1, dtype=torch.float32)
    least, most = sums.aminmax()
    if not _LEAST_SUM <= float(least) <= float(most) <= _MOST_SUM:
        return None
    return torch.mul(exponentials @ values, sums.reciprocal_().unsqueeze(1)).view(queries.shape)


def _by_softmax(queries: Tensor, keys: Tensor, values: Tensor, visible: Tensor, scale: float) -> Tensor:
    """Return what `_by_exponentials` returns, in the dtype of `values`, whatever the scores are."""
    scores = row_scores((queries.float() * scale).flatten(0, 1), keys.float())
    per_token = scores.view(*queries.shape[:2], len(keys))
    per_token[:, :, len(keys) - visible.shape[2] :].add_(visible.float().log())
    shares = torch.softmax(scores, dim=-1, out=scores).to(values.dtype)
    return (shares @ values).view(queries.shape)


def one_token_host_attention(queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """Return (q_heads, head_dim): one token attends to all rows.

    Args:
        queries: (q_heads, head_dim), rotated.
        keys, values: (kv_heads, rows, head_dim), keys rotated.
        scale: factor on the scores.
    """
    # The query heads of one key head stand as rows of one product: the keys are read once for all of them.
    grouped = queries.unflatten(0, (keys.shape[0], -1)).float()
    scores = torch.bmm(grouped, keys.float().transpose(1, 2)).mul_(scale)
    shares = torch.softmax(scores, dim=-1, out=scores).to(values.dtype)
    return torch.bmm(shares, values).flatten(0, 1)


def few_tokens_host_attention(
    queries: Tensor, keys: Tensor, values: Tensor, scale: float, visible: Tensor
) -> Tensor:  # fmt: skip
    """Return (kv_heads, queries, head_dim): a few queries of each key head attend to rows, not to all of the last ones.

    Args:
        queries: (kv_heads, queries, head_dim), rotated.
        keys, values: (kv_heads, rows, head_dim), keys rotated; the rows of one head behind each other. A multiple of
            `ROWS_MULTIPLE` of rows meets few shapes; those that nobody sees must be finite.
        scale: factor on the scores.
        visible: (queries, last rows), 1 where a query sees one of the last rows, else 0.
    """
    seen, out = visible.unsqueeze(1), torch.empty(queries.shape, dtype=values.dtype)
    for head, asking in enumerate(queries.unsqueeze(2)):
        attended = _by_exponentials(asking, keys[head], values[head], seen, scale)
        if attended is None:
            attended = _by_softmax(asking, keys[head], values[head], seen, scale)
        out[head] = attended.squeeze(1)
    return out


def takes_few_tokens(rows: Tensor, count: int) -> bool:
    """Return whether `few_tokens_host_attention` is faster than SDPA behind `count` rows as these."""
    return rows.device.type == "cpu" and rows.dtype == torch.bfloat16 and count >= _MANY_ROWS


def _head_after_head(rows: Tensor) -> Tensor:
    """Return (heads, padded rows, head_dim), zeros behind the rows."""
    written, heads, head_dim = rows.shape
    copy = torch.empty((heads, padded_rows(written), head_dim), dtype=rows.dtype)
    copy[:, :written], copy[:, written:] = rows.transpose(0, 1), 0
    return copy
