"""One ingest with doubles, as its own process, so that fault tests can kill it: STORE SOURCE... prints the report."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from doubles import HashEmbedder, WordTokenizer

from ragkit import Pipeline
from ragkit.config import ChunkingConfig, IngestConfig, PipelineConfig
from ragkit.errors import RagkitError
from ragkit.jobs import local_executor

CONFIG = PipelineConfig(chunking=ChunkingConfig(max_tokens=40), ingest=IngestConfig(lock_timeout_s=60.0))


def main(store: str, *sources: str) -> int:
    local_executor.COMMIT_CHUNKS = 8  # many small commits: more places to die at
    local_executor.PART_DOCUMENTS = 6
    try:
        with Pipeline.open(store, CONFIG, embedder=HashEmbedder(), tokenizer=WordTokenizer()) as pipeline:
            print(json.dumps(asdict(pipeline.ingest(sources, prune=True))))
    except RagkitError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
