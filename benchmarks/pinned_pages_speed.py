"""How fast a GPU reads listed pages that lie in page-locked memory of the host, by the kernels that choose and gather.

    python benchmarks/pinned_pages_speed.py [--pages 4096] [--bits 8]

The kernels get the host's tensors as they are: a GPU reads page-locked memory over the bus, and which pages are read
only the device knows. Results are compared with those of the same pages on the GPU, bit by bit, before they are timed.
`copy` is one of torch's from page-locked memory, the ceiling of the bus.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from kernel_inputs import BLOCK_SIZE, kv_rows, model_shape, normal, quantized, rotary_tables
from kernel_speed import Clock
from report import markdown_table, write_result

from ragkit.kernels.backend import Backend
from ragkit.kernels.gather_pages import PageLists, gather_pages
from ragkit.kernels.page_log_sums import page_log_sums
from ragkit.kernels.quantized_blocks import QuantizedBlocks

FOUND, ATTENDED, CHANGED = 114, 50, 12  # pages whose keys are read, that are attended to, and of them new ones
COPIED = 1 << 26


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pages", type=int, default=4096, help="of the document, 64 tokens each")
    parser.add_argument("--bits", type=int, default=8, choices=[8, 4])
    parser.add_argument("--device", default="cuda", help="cpu, with TRITON_INTERPRET=1 and 128 pages, tries the script")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    with torch.inference_mode():
        rows = _measured(arguments.pages, arguments.bits, Clock(device, tiny=device.type == "cpu"))
    print(markdown_table(rows, list(rows[0])))
    if device.type == "cuda":
        print(f"raw numbers: {write_result('pinned_pages_speed', {'rows': rows, **vars(arguments)})}")


def _measured(pages: int, bits: int, clock: Clock) -> list[dict[str, Any]]:
    """Return microseconds and GB/s of each kernel over pages of both places."""
    shape, device = model_shape(clock.device), clock.device
    plain = [kv_rows(pages * BLOCK_SIZE, shape, device).unflatten(0, (pages, BLOCK_SIZE)) for _ in range(2)]
    on_gpu = quantized(plain[0], plain[1], bits)
    on_host = tuple(_locked(blocks) for blocks in on_gpu)
    queries = normal(1, shape.q_heads, shape.head_dim, shape=shape, device=device)
    tables = rotary_tables(FOUND * BLOCK_SIZE, shape, device)
    page_bytes = sum(blocks.nbytes for blocks in on_gpu) / pages

    def listed(count: int) -> torch.Tensor:
        return torch.randperm(pages, device=device)[:count].sort().values.int().unsqueeze(0)

    def gathers(blocks: tuple[QuantizedBlocks, ...], lists: PageLists) -> Callable[[], tuple[torch.Tensor, ...]]:
        return lambda: gather_pages(blocks[0], blocks[1], lists, *tables, dtype=shape.dtype, backend=Backend.TRITON)

    def scores(blocks: tuple[QuantizedBlocks, ...], found: torch.Tensor) -> Callable[[], tuple[torch.Tensor, ...]]:
        return lambda: (page_log_sums(queries, blocks[0], scale=0.1, listed=found, backend=Backend.TRITON),)

    rows: list[dict[str, Any]] = []
    found = listed(FOUND)
    cases = [("page_log_sums", FOUND, page_bytes / 2, scores(on_gpu, found), scores(on_host, found))]
    for count in (ATTENDED, CHANGED):
        starts = torch.arange(0, count * BLOCK_SIZE, BLOCK_SIZE, dtype=torch.int32, device=device).unsqueeze(0)
        lists = PageLists(listed(count), starts)
        cases.append(("gather_pages", count, page_bytes, gathers(on_gpu, lists), gathers(on_host, lists)))
    for name, count, nbytes, near, far in cases:
        for mine, reference in zip(far(), near(), strict=True):
            assert torch.equal(mine, reference), f"{name} reads other numbers from the host"
        for place, run in (("GPU", near), ("host", far)):
            spent = 1e3 * clock.median(run)
            rows.append(
                {"kernel": name, "pages": count, "from": place, "us": spent, "gb_per_s": count * nbytes / spent / 1e3}
            )
    source = torch.empty(1 << 12 if clock.tiny else COPIED, dtype=torch.uint8, pin_memory=device.type == "cuda")
    target = torch.empty_like(source, device=device)
    spent = 1e3 * clock.median(lambda: target.copy_(source, non_blocking=True))
    rows.append({"kernel": "copy", "from": "host", "us": spent, "gb_per_s": source.nbytes / spent / 1e3})
    return rows


def _locked(blocks: QuantizedBlocks) -> QuantizedBlocks:
    """Return the same blocks in page-locked memory of the host."""
    parts = [part.cpu() for part in (blocks.codes, blocks.scales, blocks.zeros)]
    if blocks.codes.is_cuda:
        parts = [part.pin_memory() for part in parts]
    return QuantizedBlocks(*parts, blocks.bits)


if __name__ == "__main__":
    main()
