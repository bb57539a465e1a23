"""Where a model runs, in which type, and how much KV fits beside it."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from ragkit.config import Device
from ragkit.errors import ConfigError, GenerationError
from ragkit.generation.decoder import Decoder

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_CPU_WINDOWS = 8  # the system backs a CPU pool's rows when they are first written
_POOL_SHARE = 0.5  # of the memory that is free once the weights are in place; the rest is for activations


def resolve_device(device: Device) -> torch.device:
    """Return the torch device; `auto` is CUDA where there is a GPU.

    Raises:
        ConfigError: CUDA was asked for and is not there.
    """
    if device is Device.CPU or (device is Device.AUTO and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("device is cuda, but torch sees no CUDA device here: take cpu or auto")
    return torch.device("cuda", torch.cuda.current_device())


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """Return the torch dtype; `auto` is bfloat16 where `device` multiplies it natively, else float32.

    Raises:
        ConfigError: the name is none of `DTYPES`.
    """
    if dtype == "auto":
        if device.type == "cuda":
            return torch.bfloat16
        return torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() and _has_native_bf16() else torch.float32
    if dtype not in DTYPES:
        raise ConfigError(f"dtype must be auto, {', '.join(DTYPES)}, got {dtype!r}")
    return DTYPES[dtype]


def kv_tokens_that_fit(decoder: Decoder) -> int:
    """Return the size of the pool in tokens: the model's window, or what half of the free memory holds if less.

    On a CPU it is some windows, for requests that run together: rows that are never used take no memory there.

    Raises:
        GenerationError: not even one block fits.
    """
    free = free_memory(decoder.device)
    fitting = int(free * _POOL_SHARE) // decoder.layout.bytes_per_token
    if fitting < 64:
        raise GenerationError(f"{free / 1e6:.0f} MB of memory are free on {decoder.device}, too few for a KV pool")
    windows = _CPU_WINDOWS if decoder.device.type == "cpu" else 1
    return min(windows * decoder.config.max_context, fitting)


def free_memory(device: torch.device) -> int:
    """Return the bytes that are free on a GPU, or in the host's memory without swapping."""
    return int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else _available_memory()


def _available_memory() -> int:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # not Linux
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def _has_native_bf16() -> bool:
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
