"""One blended question in a process of its own, so that fault tests can kill it: STORE MODEL QUESTION."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from blended_pipeline import open_blended

from ragkit.generation.engine import Engine


def main(store: str, model: str, question: str) -> None:
    engine = Engine.load(model, device="cpu", dtype="float32")
    with open_blended(Path(store), engine) as pipeline:
        print(pipeline.query(question).text)


if __name__ == "__main__":
    main(*sys.argv[1:])
