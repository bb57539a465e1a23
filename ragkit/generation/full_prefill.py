"""Exact prefill: every prompt token is computed. The reference that other strategies are compared with."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ragkit.errors import ConfigError
from ragkit.generation.attention import PrefillAttention
from ragkit.generation.decoder import Activations, Decoder
from ragkit.generation.strategy import PrefillRequest, PrefillResult
from ragkit.kvcache.request_kv import RequestKV
from ragkit.kvcache.rope import RotaryTable


@dataclass(frozen=True, slots=True)
class FullPrefill:
    """Computes the whole prompt, in pieces where it is long.

    Attributes:
        piece_tokens: most tokens of one forward pass; it bounds the memory of activations.
    """

    piece_tokens: int = 65_536

    def __post_init__(self) -> None:
        if self.piece_tokens < 1:
            raise ConfigError(f"piece_tokens must be a whole number >= 1, got {self.piece_tokens}")

    @property
    def name(self) -> str:
        """The name that `--strategy` takes."""
        return "full"

    def prefill(self, decoder: Decoder, request: PrefillRequest) -> PrefillResult:
        """Return the logits of the first token; every prompt token counts as recomputed."""
        token_ids = request.token_ids()
        logits = self.extend(decoder, request.kv, request.rotary, token_ids)
        return PrefillResult(logits, reused=0, recomputed=len(token_ids))

    def extend(self, decoder: Decoder, kv: RequestKV, rotary: RotaryTable, token_ids: Tensor) -> Tensor:
        """Return (vocab_size,) logits after `token_ids` (tokens,), computed behind the rows that `kv` holds.

        Raises:
            CacheCapacityError: the pool has too few free blocks.
        """
        kv.reserve(kv.num_tokens + len(token_ids))
        last_layer = decoder.config.num_layers - 1
        activations: Activations | None = None
        for piece in token_ids.split(self.piece_tokens):
            attend = PrefillAttention(
                kv, rotary, kv.num_tokens, len(piece), decoder.scale, last_only_in=last_layer
            )  # fmt: skip
            activations = decoder.run(piece, attend)
            kv.num_tokens += len(piece)
        assert activations is not None, "a prompt has at least one token"
        return decoder.logits(activations.rows(slice(-1, None)))[0]
