"""One window of a document: the rows that reading it gives, and the error that says it cannot be read back."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ragkit.errors import KVCacheError
from ragkit.kvcache.kv_segment import KVMissError


@dataclass(frozen=True, slots=True, eq=False)
class WindowRows:
    """What reading a window gives for one layer.

    Attributes:
        keys, values: (tokens, kv_heads, head_dim), keys before RoPE.
        received: (tokens, kv_heads) fp32, attention that the rows received, where the codec stores it.
    """

    keys: Tensor
    values: Tensor
    received: Tensor | None = None


class DamagedWindowError(KVCacheError):
    """A window cannot be read.

    Attributes:
        window: its number.
        cause: what is wrong.
    """

    def __init__(self, window: int, cause: KVMissError) -> None:
        super().__init__(str(cause))
        self.window = window
        self.cause = cause
