"""Token ids on their way to a device that is not waited for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def put_ids(token_ids: Sequence[int], target: Tensor) -> Tensor:
    """Write token ids into `target` (tokens,) int64, and return it.

    On their way to a GPU they pass page-locked memory: a copy from other memory waits for the device.
    """
    ids = torch.tensor(token_ids, dtype=torch.int64)
    return target.copy_(ids.pin_memory() if target.is_cuda else ids, non_blocking=target.is_cuda)
