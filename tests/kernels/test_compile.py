import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]


def test_what_is_launched_early_waits_before_it_reads_and_is_called_by_the_kernel_ahead(tmp_path):
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    script = ROOT / "tests" / "support" / "compile_early_launches.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.splitlines()) == {
        "_few_queries_kernel:after:False:ld,st",
        "_few_queries_kernel:at start:True:launch_dependents,wait,ld,st",
        "_few_queries_kernel:at end:False:ld,launch_dependents,st",
        "_paged_decode_attention_kernel:after:False:ld,st",
        "_paged_decode_attention_kernel:at start:False:launch_dependents,ld,st",
        "_paged_decode_attention_kernel:at end:False:ld,launch_dependents,st",
        "_merge_splits_kernel:after:False:ld,st",
        "_merge_splits_kernel:at start:True:wait,ld,st",
        "_merge_splits_kernel:at end:True:wait,ld,st",
    }


def test_codes_that_are_read_in_pairs_are_copied_ahead_and_never_converted_as_integers(tmp_path):
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    script = ROOT / "tests" / "support" / "compile_log_sums.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        f"int{bits}:{pairs}:{warps}:0:True:0" for bits in (8, 4) for pairs, warps in ((8, 1), (32, 1), (128, 8))
    ]


def test_every_kernel_that_is_measured_compiles_for_a_gpu(tmp_path):
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    script = ROOT / "tests" / "support" / "compile_kernels.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment, check=False)
    refused = [line for line in done.stdout.splitlines() if "does not compile" in line]
    assert not refused, refused
    assert done.returncode == 0, done.stderr
    compiled = {line.split(":")[0] for line in done.stdout.splitlines() if line.endswith(" compiles")}
    assert compiled == {path.stem for path in (ROOT / "benchmarks" / "kernels").glob("*.py")}
