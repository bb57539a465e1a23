# ruff: noqa: ANN001, ANN202 (Triton reads the annotations of kernels, and pointers have none)
# mypy: disable-error-code="no-untyped-def"
"""One step of K-means over keys: the nearest centroid of each, and what the keys of each centroid sum to.

    label_t = argmax_c k_t . c  (or k_t . c / |c|, the cosine, in which the key's own length does not matter)
    sum_c = sum of k_t (or k_t / |k_t|) over the tokens of label c,   count_c = how many there are

Every key head has centroids of its own. The products of tokens and centroids are never stored: a program holds some
tokens, goes through all centroids with the best of each column so far, and compares the columns at the end. Of equal
centroids the lower one is taken. Sums are added up as integers of 2^-32, so their order does not matter: the same bits
in every run, whatever program comes first.

Source: clusters of keys with centroids as their summaries: Squeezed Attention, arXiv 2411.09688, section 3.1; spherical
K-means: Dhillon and Modha, "Concept decompositions for large sparse text data using clustering", 2001.
Cost: 2 * head_dim operations a head, token and centroid; compute bound.
"""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple

import torch
from torch import Tensor

from ragkit.errors import KernelInputError
from ragkit.kernels.backend import Backend, ceil_div, next_power_of_2, resolve_backend, tl
from ragkit.kernels.launched import launched

LEAST_NORM = 1e-12
_ONE = 1 << 32  # what stands for 1 in a sum: keys sum to less than 2^31 in each channel
_TORCH_SCORES = 1 << 24  # products that the torch definition holds at a time: 64 MB


class Nearness(StrEnum):
    """Which centroid of a key is the nearest."""

    DOT = "dot"
    COSINE = "cosine"


class KMeansStep(NamedTuple):
    """What one step found.

    Attributes:
        labels: (tokens, kv_heads) int32, the nearest centroid.
        sums: (centroids, kv_heads, head_dim) fp32, of the centroid's keys; zeros where it has none.
        counts: (centroids, kv_heads) int32.
    """

    labels: Tensor
    sums: Tensor
    counts: Tensor


def kmeans_assign(
    keys: Tensor, centroids: Tensor, *, nearness: Nearness, unit_sums: bool = False, backend: Backend | None = None
) -> KMeansStep:
    """Return labels of the keys, and the sums and counts of which the next centroids are made.

    Args:
        keys: (tokens, kv_heads, head_dim), finite; heads of a token contiguous, tokens at any stride.
        centroids: (centroids, kv_heads, head_dim), at least one, of any float type; multiplied in the keys' type.
        nearness: by the product, or by the cosine; a centroid of zeros has cosine 0.
        unit_sums: sum the keys brought to length one, as spherical K-means does.
        backend: an implementation to insist on.

    Raises:
        KernelInputError: shapes do not fit.
    """
    _check_inputs(keys, centroids)
    if resolve_backend(keys, backend) is Backend.TORCH:
        return kmeans_assign_torch(keys, centroids, nearness=nearness, unit_sums=unit_sums)
    tokens, kv_heads, head_dim = keys.shape
    compared = _compared(centroids, nearness).to(keys.dtype).contiguous()
    labels = torch.empty((tokens, kv_heads), dtype=torch.int32, device=keys.device)
    sums = torch.zeros(centroids.shape, dtype=torch.int64, device=keys.device)
    counts = torch.zeros(centroids.shape[:2], dtype=torch.int32, device=keys.device)
    if labels.numel():
        in_tile, columns, warps = _tile_sizes(keys)
        _kmeans_assign_kernel[(ceil_div(tokens, in_tile), kv_heads)](
            keys, compared, labels, sums, counts, tokens, len(centroids), keys.stride(0), LEAST_NORM, float(_ONE),
            KV_HEADS=kv_heads, HEAD_DIM=head_dim, DIM_PADDED=max(16, next_power_of_2(head_dim)), TOKENS=in_tile,
            COLUMNS=columns, UNIT_SUMS=unit_sums,
            # The interpreter cannot multiply bf16 matrices, so there the products are taken in fp32.
            UPCAST=not keys.is_cuda, num_warps=warps, num_stages=3 if keys.is_cuda else 1,
        )  # fmt: skip
    return KMeansStep(labels, (sums.double() / _ONE).float(), counts)


def kmeans_assign_torch(keys: Tensor, centroids: Tensor, *, nearness: Nearness, unit_sums: bool = False) -> KMeansStep:
    """Return what `kmeans_assign` returns: the definition, in fp32, some tokens at a time."""
    tokens, kv_heads, head_dim = keys.shape
    compared = _compared(centroids, nearness).permute(1, 2, 0)  # (kv_heads, head_dim, centroids)
    labels = torch.empty((tokens, kv_heads), dtype=torch.int64, device=keys.device)
    at_once = max(1, _TORCH_SCORES // (kv_heads * len(centroids)))
    for start in range(0, tokens, at_once):
        part = keys[start : start + at_once].transpose(0, 1).float()
        labels[start : start + at_once] = torch.bmm(part, compared).argmax(dim=2).T
    summed = keys.double()
    if unit_sums:
        summed = summed / summed.norm(dim=2, keepdim=True).clamp(min=LEAST_NORM)
    row = (labels * kv_heads + torch.arange(kv_heads, device=keys.device)).flatten()
    sums = torch.zeros(centroids.shape, dtype=torch.float64, device=keys.device)
    sums.view(-1, head_dim).index_add_(0, row, summed.reshape(-1, head_dim))
    counts = torch.bincount(row, minlength=len(centroids) * kv_heads).int().view(len(centroids), kv_heads)
    return KMeansStep(labels.int(), sums.float(), counts)


def _compared(centroids: Tensor, nearness: Nearness) -> Tensor:
    """Return what a key is multiplied with, fp32."""
    wide = centroids.float()
    if nearness is Nearness.DOT:
        return wide
    unit: Tensor = wide / wide.norm(dim=2, keepdim=True).clamp(min=LEAST_NORM)
    return unit


def _tile_sizes(keys: Tensor) -> tuple[int, int, int]:
    """Return how many tokens and how many centroids a program holds, and its warps."""
    if not keys.is_cuda:
        return 16, 16, 4  # interpreted: small inputs have several tiles
    if keys.dtype == torch.float32:
        return 32, 32, 4
    return (128 if keys.shape[2] <= 128 else 64), 64, 8


def _check_inputs(keys: Tensor, centroids: Tensor) -> None:
    if keys.dim() != 3 or not keys.is_floating_point():
        raise KernelInputError(f"keys must be (tokens, kv_heads, head_dim), got {tuple(keys.shape)} {keys.dtype}")
    if keys.numel() and keys.stride()[1:] != (keys.shape[2], 1):
        raise KernelInputError(f"the heads of one token of keys must be contiguous, got strides {keys.stride()}")
    if centroids.dim() != 3 or centroids.shape[1:] != keys.shape[1:] or len(centroids) == 0:
        raise KernelInputError(
            f"centroids must be (one or more, {', '.join(map(str, keys.shape[1:]))}), got {tuple(centroids.shape)}"
        )
    if centroids.device != keys.device:
        raise KernelInputError(f"centroids must be on {keys.device} like keys, got {centroids.device}")


# Sizes that differ from call to call are not specialised: no request waits for another compilation.
@launched(do_not_specialize=("tokens", "centroids"))
def _kmeans_assign_kernel(
    key_ptr, centroid_ptr, label_ptr, sum_ptr, count_ptr, tokens, centroids, stride_kt, least_norm, one,
    KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM_PADDED: tl.constexpr, TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr, UNIT_SUMS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    # This program finds the nearest centroids of some tokens' keys of one head.
    head = tl.program_id(1)
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    is_token = token < tokens
    dim, column = tl.arange(0, DIM_PADDED), tl.arange(0, COLUMNS)
    mask = is_token[:, None] & (dim < HEAD_DIM)[None, :]
    key = tl.load(key_ptr + (token * stride_kt + head * HEAD_DIM)[:, None] + dim[None, :], mask=mask, other=0.0)
    if UPCAST:
        key = key.to(tl.float32)

    # Of each column the best product so far and where it was: the columns are compared once, at the end.
    best = tl.full((TOKENS, COLUMNS), float("-inf"), tl.float32)
    found = tl.zeros((TOKENS, COLUMNS), tl.int32)
    for start in range(0, centroids, COLUMNS):
        centroid = start + column
        centroid_at = (centroid.to(tl.int64) * KV_HEADS + head)[:, None] * HEAD_DIM + dim[None, :]
        in_centroid = (centroid < centroids)[:, None] & (dim < HEAD_DIM)[None, :]
        other = tl.load(centroid_ptr + centroid_at, mask=in_centroid, other=0.0)
        if UPCAST:
            other = other.to(tl.float32)
        products = tl.dot(key, tl.trans(other), input_precision="ieee")
        is_better = (products > best) & (centroid < centroids)[None, :]
        best = tl.where(is_better, products, best)
        found = tl.where(is_better, start, found)
    highest = tl.max(best, axis=1)
    label = tl.min(tl.where(best == highest[:, None], found + column[None, :], centroids - 1), axis=1)
    tl.store(label_ptr + token * KV_HEADS + head, label, mask=is_token)

    summed = key.to(tl.float32)
    if UNIT_SUMS:
        norm = tl.sqrt(tl.sum(summed * summed, axis=1))
        summed = summed / tl.maximum(norm, least_norm)[:, None]
    place = label.to(tl.int64) * KV_HEADS + head
    sum_at = sum_ptr + place[:, None] * HEAD_DIM + dim[None, :]
    tl.atomic_add(sum_at, (summed * one).to(tl.int64), mask=mask, sem="relaxed")
    tl.atomic_add(count_ptr + place, tl.full((TOKENS,), 1, tl.int32), mask=is_token, sem="relaxed")
