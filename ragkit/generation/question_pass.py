"""One pass of the question's tokens over KV that is there: how much attention each position receives."""

from __future__ import annotations

import torch
from torch import Tensor

from ragkit.generation.decoder import Decoder
from ragkit.generation.reused_rows import RowSource
from ragkit.kernels.question_attention import question_attention
from ragkit.kernels.rope_write_kv import rope_write_kv
from ragkit.kvcache.pool import KVPool
from ragkit.kvcache.rope import RotaryTable
from ragkit.kvcache.token_selection import LayerRange


def question_mass(
    decoder: Decoder,
    rotary: RotaryTable,
    rows: RowSource,
    ending: Tensor,
    layers: LayerRange,
    pool: KVPool | None = None,
    slots: Tensor | None = None,
) -> Tensor:
    """Return (positions,) fp32: attention weights that each position receives, over the ending's tokens and heads.

    The ending's rows are written into `rows`, or into the pool if the others lie there.

    Args:
        decoder: the model.
        rotary: the request's rotary table.
        rows: the KV of all positions; those of the ending are overwritten.
        ending: (tokens,) int64 ids of the prompt's last tokens.
        layers: which layers are summed; none above them is asked for.
        pool, slots: where the request's rows will go, as `RowSource.stored` takes it; None for another place.
    """
    first = rows.num_tokens - len(ending)
    positions = torch.arange(first, rows.num_tokens, device=decoder.device)
    slots = positions if slots is None else slots
    places: Tensor | None = None
    own = positions  # where the ending's rows go
    mass = torch.zeros(rows.num_tokens, dtype=torch.float32, device=decoder.device)
    scored = layers.of(decoder.config.num_layers)
    with decoder.dense_steps.of(decoder, len(ending)) as steps:
        queries, own_keys, own_values = steps.first(ending)
        for layer in range(scored.stop):
            keys, values, before = rows.stored(layer, pool, slots)
            if before is not None and places is None:
                own = slots[first:].clone()  # an address that is no multiple of 16 bytes has kernels compiled for it
                places = torch.cat((before, own))
            rope_write_kv(
                queries, own_keys, own_values, positions, own,
                rotary.cos, rotary.sin, keys.unsqueeze(0), values.unsqueeze(0), rotate_keys=False,
            )  # fmt: skip
            attended, received = question_attention(
                queries, keys, values, rotary.cos, rotary.sin,
                first_position=first, scale=decoder.scale, with_mass=layer in scored, places=places,
            )  # fmt: skip
            if received.numel():
                mass += received
            if layer + 1 < scored.stop:  # what the last of them adds changes no attention
                queries, own_keys, own_values = steps.following(layer, attended)
    return mass
