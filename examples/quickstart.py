"""Ingests a folder and asks it a question; run from the root of the checkout."""

from ragkit import Pipeline

with Pipeline.open("examples/.ragkit") as rag:
    report = rag.ingest(["examples/collection"])
    print(report.added, "documents added,", report.unchanged, "unchanged")
    answer = rag.query("Do readers block writers in WAL mode?")
    print(answer.text)
    for citation in answer.citations:
        print(f"  {citation.uri}: {citation.quote!r}")
