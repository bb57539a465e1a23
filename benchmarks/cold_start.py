"""How long a command takes from nothing: `ragkit --help`, `import ragkit` and `ragkit search` through both encoders.

    python benchmarks/cold_start.py [--rounds N]

Every round starts each command once as its own process, in turn. With the right to do so (root), a second table drops
the page cache before each command: the first search after switching the machine on.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from report import interleaved_samples, markdown_table, write_result

COLLECTION = Path(__file__).parent.parent / "examples" / "collection"
RAGKIT = str(Path(sysconfig.get_path("scripts")) / "ragkit")
QUESTION = "How does a write-ahead log differ from a rollback journal?"
DROP_CACHES = Path("/proc/sys/vm/drop_caches")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        _run(RAGKIT, "ingest", "--quiet", "--store", str(store), str(COLLECTION))
        commands = _commands(store)
        warm = {name: lambda command=command: _run(*command[0], **command[1]) for name, command in commands.items()}
        rows = _rows(interleaved_samples(warm, rounds), "page cache warm")
        if os.access(DROP_CACHES, os.W_OK):
            cold = {name: lambda run=run: (_drop_caches(), run()) for name, run in warm.items()}
            empty = statistics.median(interleaved_samples({"drop": _drop_caches}, 5)["drop"])
            samples = interleaved_samples(cold, max(3, rounds // 3))
            rows += _rows({name: [s - empty for s in values] for name, values in samples.items()}, "page cache dropped")
    print(markdown_table(rows, ["command", "state", "p50 s", "worst s", "rounds"]))
    print(f"\nwritten to {write_result('cold_start', {'rows': rows})}")


def _commands(store: Path) -> dict[str, tuple[list[str], dict[str, str]]]:
    search = [RAGKIT, "search", "--store", str(store), "--json", QUESTION]
    return {
        "ragkit --help": ([RAGKIT, "--help"], {}),
        "import ragkit": ([sys.executable, "-c", "import ragkit"], {}),
        "ragkit search, thin encoder": (search, {"RAGKIT_EMBEDDING_BACKEND": "encoder"}),
        "ragkit search, sentence-transformers": (search, {"RAGKIT_EMBEDDING_BACKEND": "sentence-transformers"}),
    }


def _run(*command: str, **environ: str) -> None:
    subprocess.run(command, env=os.environ | environ, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def _drop_caches() -> None:
    os.sync()
    DROP_CACHES.write_text("3")


def _rows(samples: dict[str, list[float]], state: str) -> list[dict[str, object]]:
    return [
        {
            "command": name,
            "state": state,
            "p50 s": statistics.median(values),
            "worst s": max(values),
            "rounds": len(values),
        }
        for name, values in samples.items()
    ]


if __name__ == "__main__":
    main()
