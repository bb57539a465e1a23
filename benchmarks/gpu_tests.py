"""The tests of kernels and engine on a GPU: how many pass, and which do not.

    python benchmarks/gpu_tests.py [--processes 8] [PATH ...]

The same tests run in Triton's interpreter on every machine; here they compile. Those that need a GPU are among them.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

from report import write_result

PATHS = ("tests/kernels", "tests/generation", "tests/kvcache/test_selectors.py", "tests/kvcache/test_quantized_pool.py")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", default=list(PATHS))
    parser.add_argument("--processes", type=int, default=8)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        command = ["pytest", "-q", "-n", str(arguments.processes), "-m", "not slow", *arguments.paths]
        options = ["-p", "no:cacheprovider", "--import-mode=importlib", f"--junitxml={report}"]
        subprocess.run([sys.executable, "-m", *command, *options], check=False)
        result = counts(report) | {"command": "pytest " + " ".join(arguments.paths)}
    print({key: value for key, value in result.items() if key != "failures"})
    print(f"raw numbers: {write_result('gpu_tests', result)}")
    sys.exit(1 if result["failed"] else 0)


def counts(report: Path) -> dict[str, Any]:
    """Return what a JUnit report counts, and the first line of each failure by test."""
    suite = ElementTree.parse(report).getroot().find("testsuite")
    assert suite is not None, "pytest wrote no test suite"
    failures = {
        f"{case.get('classname')}::{case.get('name')}": (problem.get("message") or "").splitlines()[:1]
        for case in suite
        for problem in case
        if problem.tag in ("failure", "error")
    }
    tests, skipped = int(suite.get("tests", 0)), int(suite.get("skipped", 0))
    return {
        "passed": tests - skipped - len(failures),
        "failed": len(failures),
        "skipped": skipped,
        "seconds": float(suite.get("time", 0)),
        "failures": failures,
    }


if __name__ == "__main__":
    main()
