"""The three public question sets in miniature, in their own files."""

from __future__ import annotations

import csv
import json
from pathlib import Path

FROGS = "Frogs now live in ponds. They eat flies. Tadpoles have gills and turn into frogs."
STARS = "Stars shine at night. The Sun is the nearest star. Its light takes eight minutes."


def write_question_folder(folder: Path) -> None:
    """Write `chunking_evaluation`, `xquad` and `code_search` below `folder`."""
    xquad, chunking, code = (folder / name for name in ("xquad", "chunking_evaluation", "code_search"))
    for path in (xquad, chunking / "corpora", code):
        path.mkdir(parents=True)
    _lines(xquad / "docs.jsonl", [{"doc": "Frogs", "text": FROGS}, {"doc": "Stars", "text": STARS}])
    asked = [("Where do frogs live?", "Frogs", "in ponds"), ("Which star is nearest?", "Stars", "The Sun")]
    texts = {"Frogs": FROGS, "Stars": STARS}
    _lines(
        xquad / "questions.jsonl",
        [
            {"doc": doc, "question": question, "start": texts[doc].index(answer), "end": _end(texts[doc], answer)}
            for question, doc, answer in asked
        ],
    )  # fmt: skip
    (chunking / "corpora" / "animals.md").write_text(FROGS + "\n\n" + STARS)
    with (chunking / "questions_df.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["question", "references", "corpus_id"])
        references = [{"content": "", "start_index": 0, "end_index": 20}, {"start_index": 30, "end_index": 40}]
        writer.writerow(["Where do frogs live?", json.dumps(references), "animals"])
    pieces = ["def frog():\n    hop()\n", "def toad():\n    crawl()\n"]
    chunks = [{"original_index": number, "content": text} for number, text in enumerate(pieces)]
    (code / "ctx_codebase_chunks.json").write_text(json.dumps([{"original_uuid": "repo", "chunks": chunks}]))
    _lines(code / "ctx_evaluation_set.jsonl", [{"query": "How do toads move?", "golden_chunk_uuids": [["repo", 1]]}])


def _end(text: str, answer: str) -> int:
    return text.index(answer) + len(answer)


def _lines(path: Path, rows: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
