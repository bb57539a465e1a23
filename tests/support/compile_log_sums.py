"""Compile the tiles of `page_log_sums` that read codes in pairs of halves for an H100, on a machine that has none.

`compile_kernels.py` compiles what a CPU would launch, which has no such instructions. Prints for each tile: its
queries, warps, how many bytes of stack it takes, whether the tile of codes is copied asynchronously, and how many
integers become floats.
"""

import os
import re
import sys

os.environ.pop("TRITON_INTERPRET", None)  # read when a kernel is imported

import torch
from compile_kernels import NoDevice
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from ragkit.kernels.backend import Backend
from ragkit.kernels.log_sums_tile import log_sums_tile
from ragkit.kernels.page_log_sums import page_log_sums
from ragkit.kernels.quantized_blocks import QuantizedBlocks

ROW_GROUPS = {8: 64, 4: 32}


def compile_for_device(compiled):
    """Have every launch compile its kernel as a GPU would run it, and keep it in `compiled`."""
    driver.set_active(NoDevice())
    launch = JITFunction.run

    def run(self, *arguments, grid, warmup, **constants):
        constants |= {"IN_PAIRS": True, "UPCAST": False}
        compiled.append(launch(self, *arguments, grid=grid, warmup=True, **constants))

    JITFunction.run = run
    os.environ["TRITON_INTERPRET"] = "1"  # from here on a tensor on the CPU is as good as one on a GPU


def main():
    compiled = []
    compile_for_device(compiled)
    for bits, row_group in ROW_GROUPS.items():
        for tokens in (1, 8, 64):
            queries = torch.zeros(tokens, 32, 128, dtype=torch.bfloat16)
            keys = QuantizedBlocks.empty((16, 64, 8, 128), bits, row_group, 1, queries.device)
            tile = log_sums_tile(queries, keys)
            page_log_sums(queries, keys, scale=0.1, backend=Backend.TRITON)
            code = compiled[-1].asm["ptx"]
            stack = sum(int(size) for size in re.findall(r"__local_depot\d+\[(\d+)\]", code))
            copied = "cp.async.cg.shared.global" in code
            turned = len(re.findall(r"cvt\.rn\.f32\.[us](?:8|16)\b", code))
            print(f"int{bits}:{tile.pairs}:{tile.warps}:{stack}:{copied}:{turned}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
