"""How many bytes of weights a decoding step reads: what it costs where memory is what it waits for."""

from __future__ import annotations

from ragkit.generation.decoder import Decoder
from ragkit.generation.int4_projection import GROUP, Int4Projection
from ragkit.generation.projection import Linear


def weight_bytes(decoder: Decoder) -> int:
    """Return the bytes that a step reads: all matrices as they are kept. Of the embedding it reads one row."""
    config, weights = decoder.config, decoder.weights
    hidden, inner = config.hidden_size, config.intermediate_size
    queries, keys = config.num_q_heads * config.head_dim, config.num_kv_heads * config.head_dim

    def of(linear: Linear, numbers: int) -> int:
        return linear.nbytes if isinstance(linear, Int4Projection) else numbers * decoder.dtype.itemsize

    layers = sum(
        of(layer.qkv, hidden * (queries + 2 * keys))
        + of(layer.output, hidden * queries)
        + of(layer.gate_up, 2 * hidden * inner)
        + of(layer.down, hidden * inner)
        for layer in weights.layers
    )
    return layers + of(weights.head, hidden * config.vocab_size)


def int4_copy_bytes(decoder: Decoder) -> int:
    """Return what a step would read of the decoder's copy with weights of 4 bits, which need not be made for that."""
    config = decoder.config
    head = config.hidden_size * config.vocab_size * decoder.dtype.itemsize
    numbers = (weight_bytes(decoder) - head) // decoder.dtype.itemsize
    return round(numbers * (0.5 + 4 / GROUP)) + head
