"""Two encodings of the same chunk: a low-bit draft that is there sooner, and the one that is used."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ragkit.errors import KVCacheError
from ragkit.kernels.placement_table import ChunkFormat
from ragkit.kvcache.codec import KVCodec, LayerKV


class DraftedCodec:
    """Stores what `full` stores, and before it what `draft` stores.

    Selectors that read all layers need the whole KV before the first token is recomputed, so on a GPU the load stands
    in the way. With a draft only its bytes do (a quarter with 4 bits against bf16): tokens are chosen by the draft,
    and the full encoding arrives while the chosen ones are recomputed, layer by layer. Which tokens are chosen depends
    on the draft alone, wherever the chunk was found, so every source gives the same answer.

    The price is the draft's bytes in every tier. A draft that `full` refines (high bits, then low bits) would save
    them, but then `full` could only be the codec that the draft divides.

    Args:
        draft: decoded for choosing tokens alone.
        full: decoded for everything else.
    """

    def __init__(self, draft: KVCodec, full: KVCodec) -> None:
        if draft.draft is not None or full.draft is not None or draft.layout != full.layout:
            raise KVCacheError("a draft and what it is the draft of are plain codecs of the same layout")
        self.codec_id = f"{draft.codec_id}+{full.codec_id}"
        self.layout = full.layout
        self.draft: KVCodec | None = draft
        self._draft = draft
        self._full = full

    def format(self, layer: int) -> ChunkFormat:
        """Return how kernels read the bytes of a layer."""
        return self._full.format(layer)

    def encode(self, layers: Sequence[LayerKV]) -> list[Tensor]:
        """Return the bytes of each layer, without the draft."""
        return self._full.encode(layers)

    def decode(self, encoded: Sequence[Tensor], tokens: int, first_layer: int = 0) -> list[LayerKV]:
        """Return keys and values of each given layer, none of it from the draft."""
        return self._full.decode(encoded, tokens, first_layer)

    def error_bounds(self, layers: Sequence[LayerKV]) -> list[LayerKV]:
        """Return the bounds of what is used."""
        return self._full.error_bounds(layers)

    def bytes_per_token(self, tokens: int) -> float:
        """Return the bytes a token takes, the draft's included."""
        return self._draft.bytes_per_token(tokens) + self._full.bytes_per_token(tokens)
