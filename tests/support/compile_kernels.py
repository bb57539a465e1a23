"""Compile the kernels of `benchmarks/kernels` for an H100 on a machine that has none.

The interpreter takes what the compiler refuses, a variable that changes its shape in a loop for one. Prints a line a
case; ends with 1 if one does not compile.
"""

import importlib.util
import os
import sys
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)  # read when a kernel is imported

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


class NoDevice:
    """What Triton asks of a driver until a kernel is compiled."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def compile_only():
    """Have every launch compile its kernel and end there."""
    driver.set_active(NoDevice())
    launch = JITFunction.run

    def compiled(self, *arguments, grid, warmup, **constants):
        return launch(self, *arguments, grid=grid, warmup=True, **constants)

    JITFunction.run = compiled


def cases(path):
    """Return the small cases of one file."""
    spec = importlib.util.spec_from_file_location(f"kernel_cases_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    # Kernels are imported by now; from here on a tensor on the CPU is as good as one on a GPU.
    os.environ["TRITON_INTERPRET"] = "1"
    return module.cases(torch.device("cpu"))


def main(stems):
    sys.path.insert(0, str(BENCHMARKS))
    compile_only()
    failed = 0
    with torch.inference_mode():
        for path in sorted((BENCHMARKS / "kernels").glob("*.py")):
            if stems and path.stem not in stems:
                continue
            os.environ.pop("TRITON_INTERPRET", None)
            for case in cases(path):
                try:
                    case.run()
                    print(f"{path.stem}: {case.name} compiles", flush=True)
                except Exception as error:
                    failed += 1
                    print(f"{path.stem}: {case.name} does not compile: {error}", flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main(sys.argv[1:])
