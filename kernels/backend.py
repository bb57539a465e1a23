"""Which implementation runs, and Triton where it is installed (CPU builds of torch come without it)."""

from __future__ import annotations

import functools
import os
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import torch

from ragkit.errors import KernelUnavailableError

if TYPE_CHECKING:
    from torch import Tensor

try:
    import triton
    import triton.language

    jit: Any = triton.jit
    tl: Any = triton.language
    TRITON_INSTALLED = True
except ImportError:
    TRITON_INSTALLED = False
    tl = None

    def jit(function: Any = None, *, do_not_specialize: tuple[str, ...] = ()) -> Any:
        """Return `function` itself: it is never launched without Triton."""
        return function or jit


class Backend(StrEnum):
    """An implementation of a kernel."""

    TRITON = "triton"
    TORCH = "torch"


def resolve_backend(tensor: Tensor, backend: Backend | None = None) -> Backend:
    """Return the backend to run: what was asked for, else Triton on CUDA and torch on CPU.

    Raises:
        KernelUnavailableError: Triton cannot run here; there is no silent change to torch.
    """
    chosen = backend or (Backend.TRITON if tensor.is_cuda else Backend.TORCH)
    if chosen is Backend.TRITON:
        if not TRITON_INSTALLED:
            raise KernelUnavailableError(
                "this kernel needs Triton, which is not installed: install triton>=3.6, or ask for backend='torch'"
            )
        if not tensor.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
            raise KernelUnavailableError(
                f"Triton kernels run on CUDA, the tensor is on {tensor.device}: ask for backend='torch', "
                "or set TRITON_INTERPRET=1 before the start to interpret them"
            )
    return chosen


@functools.cache
def num_processors(device: torch.device) -> int:
    """Return how many multiprocessors a GPU has."""
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def can_launch_early(device: torch.device) -> bool:
    """Return whether a kernel can be launched on a device before the one ahead of it has ended.

    This is programmatic dependent launch, which NVIDIA's GPUs have from compute capability 9.0 on. Such a kernel waits
    itself until what the one ahead has written is there (`griddepcontrol.wait`); the one ahead says when it may come
    (`griddepcontrol.launch_dependents`). CUDA graphs keep it, as an edge of the graph.
    """
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)


def next_power_of_2(number: int) -> int:
    """Return the smallest power of two that is at least `number`, 1 for 0."""
    return 1 << max(number - 1, 0).bit_length()


def ceil_div(number: int, divisor: int) -> int:
    """Return `number / divisor` rounded up."""
    return -(-number // divisor)


def tiles_of_rows(heads: Tensor, rows: int, dim_padded: int) -> Any:
    """Return a descriptor from which a kernel loads (rows, 1, dim_padded) tiles of `heads`, zero beyond its end.

    Args:
        heads: (tokens, heads, head_dim), contiguous, a head and its place in memory multiples of 16 bytes.
        rows, dim_padded: size of a tile; powers of two, `dim_padded` at least the head_dim.
    """
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(heads, [rows, 1, dim_padded])
