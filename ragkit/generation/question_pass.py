"""One pass of the question's tokens over KV that is there: how much attention each position receives."""

from __future__ import annotations

import torch
from torch import Tensor

from ragkit.generation.decoder import Decoder
from ragkit.generation.reused_rows import ReusedRows
from ragkit.kernels.question_attention import question_attention
from ragkit.kvcache.rope import RotaryTable

_LOWEST_SCORED = 1 / 3  # attention of the layers below is about the text, not about the question (measured)


def question_mass(
    decoder: Decoder, rotary: RotaryTable, rows: ReusedRows, ending: Tensor, lowest_scored: float = _LOWEST_SCORED
) -> Tensor:
    """Return (positions,) fp32: attention weights that each position receives, over the ending's tokens and heads.

    Layers from `lowest_scored` of the model's depth up are summed. The ending's rows are written into `rows`.

    Args:
        decoder: the model.
        rotary: the request's rotary table.
        rows: the KV of all positions; those of the ending are overwritten.
        ending: (tokens,) int64 ids of the prompt's last tokens.
        lowest_scored: part of the layers that are not summed, from the bottom.
    """
    keys, _ = rows.layers[0]
    first = len(keys) - len(ending)
    positions = torch.arange(first, len(keys), device=decoder.device)
    mass = torch.zeros(len(keys), dtype=torch.float32, device=decoder.device)
    activations = decoder.embed(ending)
    for layer in range(decoder.config.num_layers):
        projected = decoder.project(layer, activations)
        keys, values = rows.layers[layer]
        keys[first:], values[first:] = projected.keys, projected.values
        attended, received = question_attention(
            rotary.rotate(projected.queries, positions), keys, values, rotary.cos, rotary.sin,
            first_position=first, scale=decoder.scale, with_mass=layer >= lowest_scored * decoder.config.num_layers,
        )  # fmt: skip
        if received.numel():
            mass += received
        if layer + 1 < decoder.config.num_layers:  # what the last layer adds changes no attention
            activations = decoder.complete(layer, attended, projected.residual)
    return mass
