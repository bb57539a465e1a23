"""How the stored KV of a prompt's chunks is to be read, where it lies, and where its rows go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ragkit.errors import KernelInputError
from ragkit.kernels.backend import ceil_div
from ragkit.kernels.host_copy import to_device
from ragkit.kernels.rans_tables import CHANNELS_PER_STREAM

SECTION_ALIGNMENT = 16  # bytes; every section of a layer starts at a multiple of it, the widest load of a kernel
Numbers = npt.NDArray[Any]
Section = tuple[torch.dtype, tuple[int, ...]]  # type and shape

TABLE_ROWS = 64  # rows of one entry of the table


@dataclass(frozen=True, slots=True)
class ChunkFormat:
    """How the bytes of one layer of a chunk are to be read.

    Numbers: keys, then values. Codes: codes, scales and zeros of the keys, then of the values (see quantize_kv).
    Streams: for the channels of keys and values a byte of their step, one of their table and predictor, two of their
    mean, and two of the first token's number; for each stream two bytes of its number of words; then the words (see
    entropy_decode_kv). Each section starts at a multiple of `SECTION_ALIGNMENT` from the first.

    Attributes:
        number: type of the stored numbers; None where something else is stored.
        bits: 8 or 4 bits of a code; 0 where streams are stored.
        token_group: tokens of a key that share a scale, a power of two.
        channel_group: channels of a value that share a scale, a power of two.
    """

    number: torch.dtype | None
    bits: int = 0
    token_group: int = 1
    channel_group: int = 1

    @classmethod
    def numbers(cls, number: torch.dtype) -> ChunkFormat:
        """Return the format of plain numbers."""
        return cls(number)

    @classmethod
    def codes(cls, bits: int, token_group: int, channel_group: int) -> ChunkFormat:
        """Return the format of codes with a scale and a zero for each group."""
        return cls(None, bits, token_group, channel_group)

    @classmethod
    def streams(cls) -> ChunkFormat:
        """Return the format of entropy-coded streams."""
        return cls(None)

    def sections(self, tokens: int, heads: int, head_dim: int) -> list[Section]:
        """Return type and shape of the sections of one layer, without the words of streams."""
        if self.number is not None:
            return [(self.number, (tokens, heads, head_dim))] * 2
        if self.bits == 0:
            channels = 2 * heads * head_dim
            byte: Section = (torch.uint8, (channels,))
            lengths: Section = (torch.int16, (channels // CHANNELS_PER_STREAM,))
            number: Section = (torch.float16, (channels,))
            return [byte, byte, number, number, lengths]
        codes: Section = (torch.uint8, (tokens, heads, head_dim * self.bits // 8))
        keys: Section = (torch.float16, (ceil_div(tokens, self.token_group), heads, head_dim))
        values: Section = (torch.float16, (tokens, heads, head_dim // self.channel_group))
        return [codes, keys, keys, codes, values, values]


@dataclass(frozen=True, eq=False)
class PlacementTable:
    """Where the chunks of one request lie in the buffer, and where their rows go; all layers share it.

    Attributes:
        first_rows, tokens: of each chunk, on the host.
        end_row: the first row behind all chunks.
        starts: (layers, chunks) int64, the first byte of each layer of each chunk, a multiple of 16.
        chunks: (chunks, 2) int32: first row and number of tokens.
        tiles: (tiles, 2) int32: a chunk, and the first of up to 64 of its tokens; every row is in one tile.
    """

    first_rows: tuple[int, ...]
    tokens: tuple[int, ...]
    end_row: int
    starts: Tensor
    chunks: Tensor
    tiles: Tensor

    @classmethod
    def build(
        cls, first_rows: Sequence[int], tokens: Sequence[int], starts: Tensor, device: torch.device
    ) -> PlacementTable:
        """Return the table on `device`; all of it goes there in one copy, which does not stop the stream.

        Args:
            first_rows: row where each chunk starts.
            tokens: number of tokens of each chunk.
            starts: (layers, chunks) int64 on the host.
            device: where the kernel runs.

        Raises:
            KernelInputError: the sizes contradict each other, or a start is not a multiple of 16.
        """
        count = len(tokens)
        if starts.dim() != 2 or starts.shape[1] != count or len(first_rows) != count:
            raise KernelInputError(f"{count} chunks need as many first rows and starts, got {tuple(starts.shape)}")
        # By numpy: a GPU waits for this, and torch takes several times as long for as few numbers.
        first_bytes = np.ascontiguousarray(starts.numpy())
        if count and (first_bytes.min() < 0 or (first_bytes % SECTION_ALIGNMENT).any()):
            raise KernelInputError(f"starts must be multiples of {SECTION_ALIGNMENT}")
        sizes, rows = np.array(tokens, dtype=np.int64), np.array(first_rows, dtype=np.int64)
        tiles_of = -(-sizes // TABLE_ROWS)
        chunk = np.repeat(np.arange(count), tiles_of)
        first = (np.arange(len(chunk)) - (np.cumsum(tiles_of) - tiles_of)[chunk]) * TABLE_ROWS
        parts = (
            first_bytes,
            np.stack((rows, sizes), axis=1).astype(np.int32),
            np.stack((chunk, first), axis=1).astype(np.int32),
        )
        padded = [_padded(part) for part in parts]
        # The zeros behind them keep the bytes of no chunk from being an empty array, which cannot be viewed.
        behind = np.zeros(SECTION_ALIGNMENT, dtype=np.uint8)
        whole = to_device(torch.from_numpy(np.concatenate((*padded, behind))), device)
        *pieces, _ = whole.split([len(part) for part in (*padded, behind)])
        return cls(
            tuple(first_rows),
            tuple(tokens),
            int((rows + sizes).max(initial=0)),
            *(
                piece[: part.nbytes].view(dtype).view(part.shape)
                for piece, part, dtype in zip(pieces, parts, (torch.int64, torch.int32, torch.int32), strict=True)
            ),
        )


def _padded(part: Numbers) -> Numbers:
    """Return the bytes of `part` up to a multiple of 16: the next one's place is what kernels are compiled for."""
    flat = part.reshape(-1).view(np.uint8)
    return np.pad(flat, (0, -len(flat) % SECTION_ALIGNMENT))
