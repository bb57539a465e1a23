"""A decoder over fewer token ids than it has, for one that verifies and knows no more.

Models of a family share a tokenizer and pad their vocabularies to different sizes. A draft of an id that the target
does not have could never stand, and has no place in its logits; so the drafter's distribution is taken over the others,
divided by their sum, and drafts are drawn from that. Rejection sampling takes it as any other.
"""

from __future__ import annotations

import dataclasses

from torch import Tensor

from ragkit.errors import ConfigError
from ragkit.generation.decoder import Activations, Decoder


class KnownIdsDecoder(Decoder):
    """A decoder that says nothing of ids from `count` on. Shares the other's weights.

    Args:
        decoder: whose weights.
        count: ids that are left.

    Raises:
        ConfigError: the decoder does not have so many.
    """

    def __init__(self, decoder: Decoder, count: int) -> None:
        if not 1 <= count <= decoder.config.vocab_size:
            raise ConfigError(f"1 to {decoder.config.vocab_size} token ids can be left of a model's, got {count}")
        super().__init__(dataclasses.replace(decoder.config, vocab_size=count), decoder.weights)

    def logits(self, activations: Activations) -> Tensor:
        """Return (tokens, count) logits."""
        return super().logits(activations)[:, : self.config.vocab_size]
