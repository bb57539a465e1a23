"""Tensors of a safetensors file as views of the mapped file: nothing is read until it is used.

The layout is 8 bytes of header length, a JSON header with dtype, shape and offsets of each tensor, then the bytes
(https://huggingface.co/docs/safetensors, "Format"). Mapping keeps a query from reading the rows of the vocabulary
that it does not contain, and needs no torch for bfloat16.
"""

from __future__ import annotations

import json
import math
import mmap
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ragkit.errors import ModelError

_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "U8": "u1", "BF16": "<u2"}
_MAX_HEADER = 100 << 20  # the format's own limit


def map_tensors(path: Path) -> dict[str, NDArray[Any]]:
    """Return read-only views of the tensors in `path` by name; bfloat16 comes as its raw uint16 bits.

    Raises:
        ModelError: the file is missing or no safetensors file.
    """
    try:
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot map the weights {path}: {error}") from error
    try:
        return dict(_views(data))
    except (KeyError, TypeError, ValueError, UnicodeDecodeError) as error:
        raise ModelError(f"{path} is no safetensors file or is damaged ({error}); fetch the model again") from error


def as_float32(tensor: NDArray[Any]) -> NDArray[np.float32]:
    """Return `tensor` as fp32: a view where it is fp32 already; uint16 is read as bfloat16 bits."""
    if tensor.dtype == np.uint16:
        return (tensor.astype(np.uint32) << 16).view(np.float32)
    return tensor.astype(np.float32, copy=False)


def _views(data: mmap.mmap) -> list[tuple[str, NDArray[Any]]]:
    header_bytes = int.from_bytes(data[:8], "little")
    if len(data) < 8 or not 2 <= header_bytes <= min(_MAX_HEADER, len(data) - 8):
        raise ValueError(f"header of {header_bytes} bytes in a file of {len(data)}")
    header = json.loads(data[8 : 8 + header_bytes])
    base = 8 + header_bytes
    views = []
    for name, entry in header.items():
        if name == "__metadata__" or entry["dtype"] not in _DTYPES:
            continue
        dtype, shape = np.dtype(_DTYPES[entry["dtype"]]), tuple(entry["shape"])
        start, stop = entry["data_offsets"]
        count = math.prod(shape)
        if not 0 <= start <= stop <= len(data) - base or stop - start != count * dtype.itemsize:
            raise ValueError(f"tensor {name} spans {start} to {stop}, expected {count * dtype.itemsize} bytes")
        flat = np.frombuffer(data, dtype=dtype, count=count, offset=base + start)
        views.append((name, flat.reshape(shape)))
    return views
