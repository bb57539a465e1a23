"""Compile the kernels that may be launched early for an H100, on a machine that has none.

Prints a line a kernel: its name, when the merge was wanted, whether it is launched early, and the instructions that
count in the order in which they stand: those of dependent launches, the first load and the first store.
"""

import os
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from compile_kernels import compile_only

os.environ.pop("TRITON_INTERPRET", None)  # read when a kernel is imported

import torch
from triton.runtime.jit import JITFunction

from ragkit.kernels import merge_splits, selected_pages_attention
from ragkit.kernels.gather_pages import PageLists
from ragkit.kernels.merge_splits import MergeLaunch
from ragkit.kernels.page_tile import PageTile
from ragkit.kernels.paged_decode_attention import DecodeTile, launch_paged_decode_attention

INSTRUCTION = re.compile(r"griddepcontrol\.(\w+)|\b(ld|st)\.global")


def int32(*numbers):
    return torch.tensor(numbers, dtype=torch.int32)


def cases():
    """Yield when the merge is wanted, and what launches a kernel and its merge."""
    queries = torch.zeros(1, 8, 64, dtype=torch.bfloat16)
    pools = [torch.zeros(4, 64, 2, 64, dtype=torch.bfloat16) for _ in range(2)]
    angles = torch.zeros(1, 32), torch.zeros(1, 32)
    blocks = int32(0, 1, 2, 3)[None]
    lists = PageLists(blocks, torch.full_like(blocks, -1))
    for merge in MergeLaunch:
        tile = PageTile(64, 4, 3, 2, False, merge, looks_ahead=True, starts_early=merge is MergeLaunch.AT_START)
        yield (
            merge,
            lambda tile=tile: selected_pages_attention.launch_few_queries(
                queries, *pools, lists, int32(200), *angles, scale=0.1, tile=tile
            ),
        )
        decode_tile = DecodeTile(1, 32, 4, 2, merge=merge, merges_by_warp=True)
        yield merge, lambda tile=decode_tile: launch_paged_decode_attention(
            queries, *pools, blocks, blocks[..., None].repeat(1, 1, 64), int32(4), torch.tensor([3]), *angles,
            scale=0.1, tile=tile,
        )  # fmt: skip


def main():
    compile_only()
    compiled = []
    compile_one = JITFunction.run

    def noted(self, *arguments, **constants):
        kernel = compile_one(self, *arguments, **constants)
        compiled.append((self.fn.__name__, kernel))
        return kernel

    JITFunction.run = noted
    os.environ["TRITON_INTERPRET"] = "1"  # from here on a tensor on the CPU is as good as one on a GPU
    for module in (merge_splits, selected_pages_attention):
        module.can_launch_early = lambda device: True
    for merge, launch in cases():
        compiled.clear()
        launch()
        for name, kernel in compiled:
            found = [before or after for before, after in INSTRUCTION.findall(kernel.asm["ptx"])]
            order = ",".join(dict.fromkeys(found))
            print(f"{name}:{merge}:{kernel.metadata.launch_pdl}:{order}", flush=True)


if __name__ == "__main__":
    main()
