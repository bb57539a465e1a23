"""Asks one question with full prefill, then twice with reused chunk KV, and shows when each first token came.

Run from the root of the checkout after `make demo`, or give another store. KV is kept in memory only here, so the
first of the blended answers always starts cold.
"""

import sys

from ragkit import Pipeline, PipelineConfig
from ragkit.config import KVConfig

QUESTION = "Do readers block writers in WAL mode?"
RUNS = (("full prefill", "full"), ("blend, cold: KV computed", "blend"), ("blend, warm: KV reused", "blend"))

store = sys.argv[1] if len(sys.argv) > 1 else "examples/.ragkit"
with Pipeline.open(store, PipelineConfig(kv=KVConfig(disk_mb=0)), create=False) as rag:
    rag.query(QUESTION, k=16, strategy="full", max_new_tokens=1)  # loads the models and warms everything up
    print(f"{QUESTION} 16 chunks, first token after")
    for label, strategy in RUNS:
        answer = rag.query(QUESTION, k=16, strategy=strategy, max_new_tokens=32)
        print(f"{answer.timings_ms['first_token']:9,.0f} ms  {label:26}{answer.text}")
