"""Copies to a device that neither the host nor the stream waits for."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(on_host: Tensor, device: torch.device) -> Tensor:
    """Return `on_host` on `device`, in the order of the current stream.

    A GPU copies from memory of its own driver only; from any other the host would wait until the stream comes to the
    copy. So the bytes go through page-locked memory, of which torch keeps a stock.
    """
    if device.type != "cuda":
        return on_host.to(device)
    return on_host.pin_memory().to(device, non_blocking=True)
