"""Asks many documents the same questions in one batch: `python examples/batch_questions.py [NAME...]`.

With the data sets of the benchmarks at hand (RAGKIT_DATA) the documents are quarterly reports, PDFs of up to 70 pages;
names choose among them ("AAPL", "2023"). Without, they are four pages of examples/collection. Run it from the root of
the checkout. Stop it and run it again: it goes on with what is left.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

REPORTS = {
    "sales": "What were the total net sales or revenue in the quarter?",
    "shares": "How many shares of common stock were outstanding?",
    "tax": "What was the effective tax rate?",
}
PAGES = {"about": "What is this page about?", "limit": "Is there a limit, and how large is it?"}

data = Path(os.environ.get("RAGKIT_DATA") or "none", "sec_10q")
collection = Path("examples", "collection")
found = sorted(data.glob("*.pdf")) or [
    collection / f"{name}.html" for name in ("wal", "lockingv3", "isolation", "whentouse")
]
documents = [path for path in found if not sys.argv[1:] or any(name in path.name for name in sys.argv[1:])]
asked = REPORTS if data.exists() else PAGES

questions, answers = Path("questions.jsonl"), Path("answers.jsonl")
rows = [
    {"id": f"{path.stem} {name}", "question": question, "filter": {"uri": f"*/{path.name}"}}
    for path in documents
    for name, question in asked.items()
]
questions.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

ragkit = Path(sys.executable).with_name("ragkit")
store = os.environ.get("RAGKIT_STORE", ".ragkit-batch")
subprocess.run([ragkit, "ingest", *documents, "--store", store], check=True)
command = [ragkit, "batch", questions, "--out", answers, "--store", store, "-k", "4", "--max-new-tokens", "32"]
subprocess.run([*command, "--overwrite"], check=True)

for line in answers.read_text(encoding="utf-8").splitlines():
    row = json.loads(line)
    print(f"{row['id']}: {row['answer']}")
    for citation in row["citations"][:1]:
        page = "" if citation["page"] is None else f", page {citation['page']}"
        print(f"    {Path(citation['uri']).name}{page}: {' '.join(citation['quote'].split())!r}")
