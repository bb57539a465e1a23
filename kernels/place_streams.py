# ruff: noqa: ANN001, ANN202 (Triton reads the annotations of kernels, and pointers have none)
# mypy: disable-error-code="no-untyped-def"
"""Decode the entropy-coded streams of all chunks of a prompt straight into packed rows, one layer at a launch.

    row(c) + t  <-  (level_ct + mean) * step      with the levels of entropy_decode_kv; for t = 0 the stored number

A program finds where its streams start by adding up the lengths of those before them, so nothing is prepared on the
host. The part of `place_chunks` for this format.

Source: range ANS, arXiv 1311.2540, section 2.3; neighbour deltas and coding by channel: CacheGen, arXiv 2310.07240.
Cost: latency of dependent table look-ups, hidden by having thousands of streams a layer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ragkit.errors import KernelInputError
from ragkit.kernels.backend import ceil_div, next_power_of_2, tl
from ragkit.kernels.entropy_decode_kv import EntropyStreams, device_tables, entropy_decode_kv_torch, next_levels
from ragkit.kernels.launched import launched
from ragkit.kernels.placement_table import SECTION_ALIGNMENT, ChunkFormat, PlacementTable
from ragkit.kernels.rans_tables import CHANNELS_PER_STREAM

_STREAMS_PER_PROGRAM = 32  # one warp: lanes that wait for a look-up hold up nobody else


def launch_place_streams(
    stored: Tensor, table: PlacementTable, layer: int, keys: Tensor, values: Tensor, slots: Tensor | None
) -> None:
    """Do what `place_chunks` does for streams, by the kernel; nothing is checked."""
    width = keys.shape[1] * keys.shape[2]
    streams = 2 * width // CHANNELS_PER_STREAM
    slot_table, steps = device_tables(keys.device)
    words = stored.view(torch.int16)
    _place_streams_kernel[(ceil_div(streams, _STREAMS_PER_PROGRAM), len(table.tokens))](
        stored, words, table.starts, table.chunks, slot_table, steps, keys, values, keys if slots is None else slots,
        layer, len(table.tokens), len(words),
        WIDTH=width, ALL_STREAMS=streams, ALL_STREAMS_PADDED=next_power_of_2(streams), STREAMS=_STREAMS_PER_PROGRAM,
        CHANNEL_BYTES=_aligned(2 * width), MEAN_BYTES=_aligned(4 * width), LENGTH_BYTES=_aligned(2 * streams),
        HAS_SLOTS=slots is not None, num_warps=1,
    )  # fmt: skip


def place_streams_torch(
    stored: Tensor, table: PlacementTable, layer: int, keys: Tensor, values: Tensor, slots: Tensor | None
) -> None:
    """Do what `place_chunks` does for streams: the definition, chunk by chunk, on the CPU."""
    heads, head_dim = keys.shape[1:]
    starts = table.starts[layer].tolist()
    for start, first, tokens in zip(starts, table.first_rows, table.tokens, strict=True):
        sections, at = [], start
        for dtype, shape in ChunkFormat.streams().sections(tokens, heads, head_dim):
            sections.append(stored[at : at + shape[0] * dtype.itemsize].view(dtype))
            at += _aligned(shape[0] * dtype.itemsize)
        steps, tables, means, firsts, lengths = sections
        counts = lengths.to(torch.int64) & 0xFFFF
        words = stored[at : at + 2 * int(counts.sum())].view(torch.int16)
        if 2 * int(counts.sum()) > stored.numel() - at:
            raise KernelInputError("the words of a chunk's streams end behind what is stored")
        shaped = [part.view(-1, CHANNELS_PER_STREAM) for part in (tables, means, steps, firsts)]
        streams = EntropyStreams(words, counts.cumsum(0) - counts, *shaped)
        decoded = entropy_decode_kv_torch(streams, tokens, heads * head_dim, keys.dtype).view(
            2, tokens, heads, head_dim
        )
        for out, numbers in zip((keys, values), decoded, strict=True):
            if slots is None:
                out[first : first + tokens] = numbers
            else:
                out[slots[first : first + tokens]] = numbers


def _aligned(count: int) -> int:
    return ceil_div(count, SECTION_ALIGNMENT) * SECTION_ALIGNMENT


# Sizes that differ from call to call are not specialised: no request waits for another compilation.
@launched(do_not_specialize=("layer", "num_chunks", "num_words"))
def _place_streams_kernel(
    byte_ptr, word_ptr, start_ptr, chunk_ptr, slots_ptr, steps_ptr, key_ptr, value_ptr, row_ptr,
    layer, num_chunks, num_words,
    WIDTH: tl.constexpr, ALL_STREAMS: tl.constexpr, ALL_STREAMS_PADDED: tl.constexpr, STREAMS: tl.constexpr,
    CHANNEL_BYTES: tl.constexpr, MEAN_BYTES: tl.constexpr, LENGTH_BYTES: tl.constexpr, HAS_SLOTS: tl.constexpr,
):  # fmt: skip
    # This program decodes STREAMS streams of one chunk, one in each lane, token after token.
    first_stream, chunk = tl.program_id(0) * STREAMS, tl.program_id(1)
    first_row, tokens = tl.load(chunk_ptr + 2 * chunk), tl.load(chunk_ptr + 2 * chunk + 1)
    start = tl.load(start_ptr + layer * num_chunks + chunk)
    mean_at = (start + 2 * CHANNEL_BYTES) // 2
    first_at = mean_at + MEAN_BYTES // 2
    length_at = first_at + MEAN_BYTES // 2
    stream = first_stream + tl.arange(0, STREAMS)
    real = stream < ALL_STREAMS
    others = tl.arange(0, ALL_STREAMS_PADDED)
    before = tl.load(word_ptr + length_at + others, mask=others < tl.minimum(first_stream, ALL_STREAMS), other=0)
    own = tl.load(word_ptr + length_at + stream, mask=real, other=0).to(tl.int32) & 0xFFFF
    at = length_at + LENGTH_BYTES // 2 + tl.sum(before.to(tl.int32) & 0xFFFF, axis=0) + tl.cumsum(own, axis=0) - own

    high = tl.load(word_ptr + at, mask=real, other=1).to(tl.uint32) & 0xFFFF
    low = tl.load(word_ptr + at + 1, mask=real, other=0).to(tl.uint32) & 0xFFFF
    state = (high << 16) | low
    at += 2
    channel = tl.arange(0, 4)
    cell = stream[:, None] * 4 + channel[None, :]
    step = tl.load(byte_ptr + start + cell, mask=real[:, None], other=0).to(tl.int32)
    step = tl.load(steps_ptr + step, mask=real[:, None], other=0.0)
    both = tl.load(byte_ptr + start + CHANNEL_BYTES + cell, mask=real[:, None], other=0).to(tl.int32)
    table, predictor = (both & 63) * 4096, both >> 6
    mean = tl.load(word_ptr + mean_at + cell, mask=real[:, None], other=0).to(tl.float16, bitcast=True).to(tl.float32)

    is_value = stream >= ALL_STREAMS // 2
    column = (stream - tl.where(is_value, ALL_STREAMS // 2, 0)) * 4
    to_keys, to_values = (real & (stream < ALL_STREAMS // 2))[:, None], (real & is_value)[:, None]
    level = tl.zeros((STREAMS, 4), dtype=tl.int32)
    first = tl.load(word_ptr + first_at + cell, mask=real[:, None], other=0).to(tl.float16, bitcast=True)
    numbers = first.to(tl.float32).to(key_ptr.dtype.element_ty)
    for token in range(tokens):
        row = (first_row + token).to(tl.int64)
        if HAS_SLOTS:
            row = tl.load(row_ptr + row)
        place = (row * WIDTH + column)[:, None] + channel[None, :]
        tl.store(key_ptr + place, numbers, mask=to_keys)
        tl.store(value_ptr + place, numbers, mask=to_values)
        # Of the next token; behind the last one nobody looks at them, and no load leaves the buffer.
        level, state, at = next_levels(level, state, at, table, predictor, real, word_ptr, num_words, slots_ptr)
        numbers = ((level.to(tl.float32) + mean) * step).to(key_ptr.dtype.element_ty)
