"""How long the prompts are that prefills are timed with."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ragkit.errors import GenerationError, UsageError
from ragkit.generation.decoder import Decoder
from ragkit.generation.placement import free_memory

CPU_LENGTHS = (1024, 2048, 4096)
GPU_LENGTHS = (4096, 8192, 16384, 32768)

_SHARE = 0.5  # of the free memory; the rest is for activations
_COPIES = 2  # of each token's KV: as it is stored, and in the request's blocks


def choose_lengths(
    asked: Sequence[int], on_gpu: bool, window: int, fitting: int
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Return the ascending lengths in tokens, and a line for each default length that is left out.

    Args:
        asked: what the user wants; empty for the device's defaults.
        on_gpu: which defaults.
        window: most tokens that the model takes.
        fitting: most tokens that fit into memory.

    Raises:
        UsageError: a length that was asked for is beyond the window, or below 1.
        GenerationError: a length that was asked for does not fit into memory.
    """
    if asked:
        if min(asked) < 1 or max(asked) > window:
            wrong = min(asked) if min(asked) < 1 else max(asked)
            raise UsageError(f"a length of {wrong:,} tokens is impossible: the model takes 1 to {window:,}")
        if max(asked) > fitting:
            raise GenerationError(
                f"the KV of {max(asked):,} tokens does not fit into the free memory: take at most {fitting:,}"
            )
        return tuple(sorted(set(asked))), ()
    notes = []
    kept = []
    for length in GPU_LENGTHS if on_gpu else CPU_LENGTHS:
        if length > window:
            notes.append(f"prompts of {length:,} tokens are left out: the model's window is {window:,}")
        elif length > fitting:
            notes.append(f"prompts of {length:,} tokens are left out: free memory holds the KV of {fitting:,}")
        else:
            kept.append(length)
    return tuple(kept) or (min(window, fitting),), tuple(notes)


def tokens_that_fit(decoder: Decoder) -> int:
    """Return how many tokens of KV half of the free memory holds, of the device and of the host, each token twice."""
    places = {decoder.device, torch.device("cpu")}
    free = min(free_memory(place) for place in places)
    return int(free * _SHARE) // (_COPIES * decoder.layout.bytes_per_token)
