# ruff: noqa: ANN001, ANN202 (Triton reads the annotations of kernels, and pointers have none)
# mypy: disable-error-code="no-untyped-def"
"""The logit of every page for every query by all its keys: the logarithm of the attention that it would receive.

    logit_v,page = log sum_j exp(scale * q_v . k_page,j)

Over all pages the softmax of these logits is the attention that each page receives from a query that sees everything,
so nothing stands for the keys and nothing is overlooked. Keys are numbers, or codes that become numbers in registers.
Where queries are of 16 bits, `log_sums_tile` may have codes and queries as fp16: a query is then held to +-65,504.
Of a long document only some pages may be looked at: they are listed on the device, for all key heads or for each.

Source: scores of all tokens, normalised over them: TokenSelect, arXiv 2411.02886, section 4. Cost: reads the keys once;
bandwidth bound while tokens * q_heads / kv_heads is at most about 64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ragkit.errors import KernelInputError
from ragkit.kernels.backend import Backend, ceil_div, jit, next_power_of_2, resolve_backend, tl
from ragkit.kernels.launched import launched
from ragkit.kernels.log_sums_tile import LogSumsTile, log_sums_tile, pages_at_once
from ragkit.kernels.packed_codes import halves_of_bytes, halves_of_nibbles
from ragkit.kernels.paged_rows import Blocks, load_key_halves, parts_of
from ragkit.kernels.quantized_blocks import QuantizedBlocks

_LOG2_E = 1.4426950408889634  # the kernel works with powers of two
_TORCH_PAGES = 256  # pages whose keys the torch definition holds in fp32 at a time


def page_log_sums(
    queries: Tensor, keys: Blocks, *, scale: float, listed: Tensor | None = None, backend: Backend | None = None,
    tile: LogSumsTile | None = None,
) -> Tensor:  # fmt: skip
    """Return (tokens, q_heads, pages) fp32, of all pages or of the listed ones.

    Args:
        queries: (tokens, q_heads, head_dim); heads of a token contiguous, tokens at any stride.
        keys: (pages, page_size, kv_heads, head_dim), contiguous; numbers, or codes of which the rows of a page share
            scales channel by channel.
        scale: factor on the products.
        listed: (1 or kv_heads, pages) int32 on the device: pages that are looked at, by all key heads or by each; the
            caller answers for it that they are there.
        backend: an implementation to insist on.
        tile: how the work is cut, of which `rows` share a scale; `log_sums_tile` says unless given.

    Raises:
        KernelInputError: shapes do not fit.
    """
    row_group = _check_inputs(queries, keys, listed)
    if resolve_backend(queries, backend) is Backend.TORCH:
        return page_log_sums_torch(queries, keys, scale=scale, listed=listed)
    pages = keys.shape[0] if listed is None else listed.shape[1]
    out = torch.empty((*queries.shape[:2], pages), dtype=torch.float32, device=queries.device)
    if out.numel() == 0:
        return out
    _launch(queries, keys, out, scale, listed, tile or log_sums_tile(queries, keys), row_group)
    return out


def _launch(
    queries: Tensor, keys: Blocks, out: Tensor, scale: float, listed: Tensor | None, tile: LogSumsTile, row_group: int
) -> None:
    tokens, q_heads, head_dim = queries.shape
    page_size, kv_heads = keys.shape[1:3]
    packed, pages = tokens * q_heads // kv_heads, out.shape[2]
    across = ceil_div(packed, tile.pairs)
    at_once = pages_at_once(pages, across * kv_heads, tile, queries.device)
    # Instructions of NVIDIA's GPUs; the interpreter has none.
    in_pairs = queries.is_cuda and torch.version.hip is None
    _page_log_sums_kernel[(across, kv_heads, ceil_div(pages, at_once))](
        queries, *parts_of(keys), out if listed is None else listed, out, scale * _LOG2_E, packed, pages, at_once,
        queries.stride(0), 0 if listed is None or len(listed) == 1 else pages,
        GROUP=q_heads // kv_heads, PAIRS=tile.pairs, KV_HEADS=kv_heads, HALF=head_dim // 2,
        HALF_PADDED=max(16, next_power_of_2(head_dim // 2)), PAGE_SIZE=page_size, ROWS=tile.rows,
        BITS=keys.bits if isinstance(keys, QuantizedBlocks) else 0, KEY_GROUP=row_group, IS_LISTED=listed is not None,
        KEYS_FIRST=tile.keys_first, IN_HALVES=tile.in_halves, IN_PAIRS=in_pairs, STAGES=tile.stages,
        # The interpreter cannot multiply bf16 matrices, so there the products are taken in fp32.
        UPCAST=not queries.is_cuda, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def page_log_sums_torch(queries: Tensor, keys: Blocks, *, scale: float, listed: Tensor | None = None) -> Tensor:
    """Return what `page_log_sums` returns: the definition, in fp32, some pages at a time."""
    tokens, q_heads, _ = queries.shape
    pages, page_size, kv_heads, _ = keys.shape
    if listed is not None:
        return _log_sums_of_listed(queries, keys, scale, listed)
    out = torch.empty((tokens, q_heads, pages), dtype=torch.float32, device=queries.device)
    grouped = queries.float().unflatten(1, (kv_heads, q_heads // kv_heads))
    for start in range(0, pages, _TORCH_PAGES):
        rows = torch.arange(start * page_size, min(start + _TORCH_PAGES, pages) * page_size, device=queries.device)
        some = keys.rows(rows) if isinstance(keys, QuantizedBlocks) else keys.flatten(0, 1)[rows].float()
        products = torch.einsum("thgd,rhd->thgr", grouped, some) * scale
        out[..., start : start + _TORCH_PAGES] = products.flatten(1, 2).unflatten(2, (-1, page_size)).logsumexp(dim=3)
    return out


def _log_sums_of_listed(queries: Tensor, keys: Blocks, scale: float, listed: Tensor) -> Tensor:
    page_size, kv_heads = keys.shape[1:3]
    grouped = queries.float().unflatten(1, (kv_heads, -1))
    of_heads = []
    for head, pages in enumerate(listed.long().expand(kv_heads, -1)):
        rows = (pages.unsqueeze(1) * page_size + torch.arange(page_size, device=pages.device)).flatten()
        some = keys.rows(rows) if isinstance(keys, QuantizedBlocks) else keys.flatten(0, 1)[rows].float()
        of_heads.append(grouped[:, head] @ some[:, head].T * scale)
    logits: Tensor = torch.cat(of_heads, dim=1).unflatten(2, (-1, page_size)).logsumexp(dim=3)
    return logits


def _check_inputs(queries: Tensor, keys: Blocks, listed: Tensor | None) -> int:
    """Return how many rows share a scale, or are in a page of numbers."""
    if queries.dim() != 3 or (queries.numel() and queries.stride()[1:] != (queries.shape[2], 1)):
        raise KernelInputError(f"queries must be (tokens, heads, head_dim), got {tuple(queries.shape)}")
    q_heads, head_dim = queries.shape[1:]
    if len(keys.shape) != 4 or keys.shape[3] != head_dim or head_dim % 2:
        raise KernelInputError(f"keys must be (pages, page_size, kv_heads, {head_dim}), got {tuple(keys.shape)}")
    if isinstance(keys, Tensor) and not keys.is_contiguous():
        raise KernelInputError("keys must be contiguous")
    if isinstance(keys, QuantizedBlocks) and keys.channel_group != 1:
        raise KernelInputError(f"keys must be quantised channel by channel, got groups of {keys.channel_group}")
    page_size, kv_heads = keys.shape[1:3]
    if kv_heads == 0 or q_heads % kv_heads:
        raise KernelInputError(f"{q_heads} query heads cannot share {kv_heads} key heads")
    if listed is not None:
        fits = listed.dim() == 2 and listed.shape[0] in (1, kv_heads)
        if not fits or listed.dtype != torch.int32 or not listed.is_contiguous():
            raise KernelInputError(
                f"listed must be (1 or {kv_heads}, pages) int32, contiguous, got {tuple(listed.shape)} {listed.dtype}"
            )
    row_group: int = keys.row_group if isinstance(keys, QuantizedBlocks) else page_size
    if page_size & (page_size - 1) or row_group & (row_group - 1) or row_group < 16:
        raise KernelInputError(
            f"pages and groups of rows must be powers of two from 16 rows on, got {page_size} and {row_group}"
        )
    return row_group


# Sizes that differ from call to call are not specialised: no request waits for another compilation.
@launched(do_not_specialize=("packed", "pages", "at_once", "stride_list"))
def _page_log_sums_kernel(
    query_ptr, key_ptr, scale_ptr, zero_ptr, list_ptr, out_ptr, scale_log2, packed, pages, at_once, stride_qt,
    stride_list,
    GROUP: tl.constexpr, PAIRS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr, HALF_PADDED: tl.constexpr,
    PAGE_SIZE: tl.constexpr, ROWS: tl.constexpr, BITS: tl.constexpr, KEY_GROUP: tl.constexpr,
    IS_LISTED: tl.constexpr, KEYS_FIRST: tl.constexpr, IN_HALVES: tl.constexpr, IN_PAIRS: tl.constexpr,
    STAGES: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    # This program takes PAIRS queries (heads within tokens) of one key head through some neighbouring pages.
    NUMBER: tl.constexpr = tl.float16 if IN_HALVES and BITS > 0 else query_ptr.dtype.element_ty
    ALONG: tl.constexpr = 0 if KEYS_FIRST else 1  # the axis of scores along which the rows of a page lie
    kv_head = tl.program_id(1)
    pair = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)
    is_pair = pair < packed
    token, head = (pair // GROUP).to(tl.int64), kv_head * GROUP + pair % GROUP
    half = tl.arange(0, HALF_PADDED)
    query_at = query_ptr + token * stride_qt + head * (2 * HALF)
    query_first = _load_queries(query_at, half, is_pair, HALF, NUMBER, KEYS_FIRST, UPCAST)
    query_second = _load_queries(query_at + HALF, half, is_pair, HALF, NUMBER, KEYS_FIRST, UPCAST)
    out_at = out_ptr + (token * (KV_HEADS * GROUP) + head) * pages

    first_page = tl.program_id(2) * at_once
    for page in tl.range(first_page, tl.minimum(first_page + at_once, pages), num_stages=STAGES):
        block = page
        if IS_LISTED:
            block = tl.load(list_ptr + kv_head * stride_list + page)
        highest = tl.full((PAIRS,), float("-inf"), tl.float32)
        total = tl.zeros((PAIRS,), tl.float32)
        for part in tl.static_range(PAGE_SIZE // ROWS):
            row = part * ROWS + tl.arange(0, ROWS)
            row_at = (block * PAGE_SIZE + row).to(tl.int64) * KV_HEADS + kv_head
            group = (block * (PAGE_SIZE // KEY_GROUP) + part * ROWS // KEY_GROUP) * KV_HEADS + kv_head
            key_first, key_second = _load_keys(
                key_ptr, scale_ptr, zero_ptr, row_at, group, half, HALF, BITS, IN_HALVES, IN_PAIRS, NUMBER, UPCAST
            )
            if KEYS_FIRST:
                scores = tl.dot(key_first, query_first, input_precision="ieee")
                scores = tl.dot(key_second, query_second, acc=scores, input_precision="ieee") * scale_log2
            else:
                scores = tl.dot(query_first, tl.trans(key_first), input_precision="ieee")
                scores = tl.dot(query_second, tl.trans(key_second), acc=scores, input_precision="ieee") * scale_log2
            new_highest = tl.maximum(highest, tl.max(scores, axis=ALONG))
            above = tl.exp2(scores - tl.expand_dims(new_highest, ALONG))
            total = total * tl.exp2(highest - new_highest) + tl.sum(above, axis=ALONG)
            highest = new_highest
        tl.store(out_at + page, (highest + tl.log2(total)) * 0.6931471805599453, mask=is_pair)


@jit
def _load_queries(
    query_at, half, is_pair, HALF: tl.constexpr, NUMBER: tl.constexpr, KEYS_FIRST: tl.constexpr, UPCAST: tl.constexpr
):
    # One half of the channels of queries, (PAIRS, HALF_PADDED) or the other way round.
    if KEYS_FIRST:
        at, mask = query_at[None, :] + half[:, None], is_pair[None, :] & (half < HALF)[:, None]
    else:
        at, mask = query_at[:, None] + half[None, :], is_pair[:, None] & (half < HALF)[None, :]
    query = tl.load(at, mask=mask, other=0.0)
    if tl.float16 == NUMBER and query.dtype != tl.float16:
        query = tl.clamp(query.to(tl.float32), -65504.0, 65504.0)
    query = query.to(NUMBER)
    return query.to(tl.float32) if UPCAST else query


@jit
def _load_keys(
    key_ptr, scale_ptr, zero_ptr, row_at, group_at, half, HALF: tl.constexpr, BITS: tl.constexpr,
    IN_HALVES: tl.constexpr, IN_PAIRS: tl.constexpr, NUMBER: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    # Both halves (ROWS, HALF_PADDED) of one head's keys as NUMBERs.
    if IN_HALVES and BITS > 0:
        is_channel = (half < HALF)[None, :]
        scale_at = scale_ptr + (group_at * (2 * HALF) + half)[None, :]
        zero_at = zero_ptr + (group_at * (2 * HALF) + half)[None, :]
        first_scale = tl.load(scale_at, mask=is_channel, other=0.0)
        first_zero = tl.load(zero_at, mask=is_channel, other=0.0)
        second_scale = tl.load(scale_at + HALF, mask=is_channel, other=0.0)
        second_zero = tl.load(zero_at + HALF, mask=is_channel, other=0.0)
        at = key_ptr + row_at[:, None] * (HALF if BITS == 4 else 2 * HALF) + half[None, :]
        if BITS == 4:
            packed = tl.load(at, mask=is_channel, other=0)
            first, second = halves_of_nibbles(packed, first_scale, first_zero, second_scale, second_zero, IN_PAIRS)
        else:
            first = halves_of_bytes(tl.load(at, mask=is_channel, other=0), first_scale, first_zero, IN_PAIRS)
            second = halves_of_bytes(tl.load(at + HALF, mask=is_channel, other=0), second_scale, second_zero, IN_PAIRS)
    else:
        every = row_at >= 0
        first, second = load_key_halves(
            key_ptr, scale_ptr, zero_ptr, row_at, group_at, every, half, HALF, BITS, BITS > 0
        )
        first, second = first.to(NUMBER), second.to(NUMBER)
    if UPCAST:
        first, second = first.to(tl.float32), second.to(tl.float32)
    return first, second
