"""Forty questions about ten quarterly reports, with the chunks that ragkit finds for each.

    RAGKIT_DATA=... python benchmarks/filing_questions.py OUT.json [--tokens 6200] [--max-tokens 512]

The reports (`sec_10q`: five companies, two quarters each, PDF) are read, cut and searched by BM25 as ragkit does it.
The file has the form of MuSiQue's, a list of objects with `question`, `answers` and `ctxs`, each with a `text` and
with the texts `before` it in its report; the best chunk stands last, as in ragkit's prompts. Answers are figures as
the reports print them; a question whose figure stands in none of its chunks has none. Tables of numbers and legal
prose make other prompts than MuSiQue's encyclopedia passages do: settings that were chosen there are tried here.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from report import data_folder

from ragkit.config import ChunkingConfig, PipelineConfig, RetrievalConfig, SearchMode
from ragkit.pipeline import Pipeline
from ragkit.retrieval.base import FloatMatrix

HITS = 40  # looked at for a question; more than fit
BEFORE = 2  # chunks before a chunk that are written with it

# Question and answer by company: net sales, operating income, research and development, diluted earnings a share, cash,
# segments, legal proceedings, and debt or risk. The quarters are named as the reports name them.
QUESTIONS: Sequence[tuple[str, str]] = (
    ("What were Apple's total net sales in the quarter that ended on June 25, 2022, in millions of dollars?", "82,959"),
    ("How much operating income did Apple report for the three months ended December 31, 2022?", "36,016"),
    ("What did Apple spend on research and development in the third quarter of fiscal 2022?", "6,797"),
    ("What were Apple's diluted earnings per share for the quarter ended December 31, 2022?", "1.88"),
    ("How large were Apple's cash and cash equivalents on its balance sheet of June 25, 2022?", "27,502"),
    ("Which net sales did Apple's Greater China segment have in the third quarter of 2022?", "14,604"),
    ("What is Apple's lawsuit with Epic Games about, and which court ruled on it?", ""),
    ("How much commercial paper and term debt did Apple have outstanding as of December 31, 2022?", ""),
    ("State Amazon's total net sales for the three months ended March 31, 2023.", "127,358"),
    ("What was Amazon's operating income in the third quarter of 2022?", "2,525"),
    ("How much did Amazon spend on technology and content in the quarter ended March 31, 2023?", "20,450"),
    ("What diluted earnings per share did Amazon report for the three months ended September 30, 2022?", "0.28"),
    ("What cash and cash equivalents did Amazon hold on March 31, 2023, in millions?", "49,343"),
    ("What were the net sales of the AWS segment of Amazon in the third quarter of 2022?", "20,538"),
    ("Which patent infringement complaints against Amazon Web Services are described as of March 31, 2023?", ""),
    ("What is the total face value of Amazon's long-term debt at September 30, 2022?", "63,541"),
    ("What net revenue did Intel earn in the third quarter of 2022, ended October 1, 2022?", "15,338"),
    ("How big was Intel's operating loss in the first quarter of 2023?", "1,468"),
    ("By how much did Intel's R&D expense grow in Q3 2022 against Q3 2021, and why?", "499 million"),
    ("What was Intel's loss per share, diluted, in the quarter ended April 1, 2023?", "0.66"),
    ("Intel's cash and cash equivalents at October 1, 2022: how many millions?", "4,529"),
    ("Which operating segments does Intel manage its business through in fiscal 2023?", ""),
    ("Which charge did Intel accrue for the VLSI patent litigation?", "2.2 billion"),
    ("Which senior notes did Intel issue in the first quarter of 2023, and what is its debt?", ""),
    ("What was Microsoft's total revenue for the three months ended September 30, 2022?", "50,122"),
    ("Give Microsoft's operating income for the quarter ended December 31, 2022.", "20,399"),
    ("How much research and development expense did Microsoft have in the quarter ended September 30, 2022?", "6,628"),
    ("What were diluted earnings per share at Microsoft in the three months ended December 31, 2022?", "2.20"),
    ("Cash and cash equivalents of Microsoft at September 30, 2022, in millions of dollars?", "22,884"),
    ("How much operating income did Microsoft's Intelligent Cloud segment earn in the December 2022 quarter?", "8,904"),
    ("Which claims about cell phones is Microsoft Mobile defending itself against in court?", ""),
    ("What does Microsoft say about cyberattacks and security threats as a risk to its business in 2022?", ""),
    ("What was NVIDIA's revenue for the first quarter of fiscal year 2024, ended April 30, 2023?", "7,192"),
    ("What income from operations did NVIDIA report for the quarter that ended October 30, 2022?", "601"),
    ("What did NVIDIA spend on research and development in the three months ended April 30, 2023?", "1,875"),
    ("How much net income per diluted share did NVIDIA earn in the quarter ended October 30, 2022?", "0.27"),
    ("At April 30, 2023, what were NVIDIA's cash and cash equivalents?", "5,079"),
    ("What revenue did NVIDIA's Compute & Networking segment have in the quarter ended October 30, 2022?", "3,816"),
    ("What do the plaintiffs in the securities class action and derivative lawsuits against NVIDIA allege?", ""),
    ("How do export controls on A100 and H100 chips to China threaten NVIDIA's data center business?", ""),
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokens", type=int, default=6200, help="the best chunks up to so many tokens a question")
    parser.add_argument("--max-tokens", type=int, default=512, help="most tokens of a chunk")
    arguments = parser.parse_args()
    folder = data_folder("sec_10q")
    if folder is None:
        sys.exit("set RAGKIT_DATA to the folder of the benchmark data")
    items = filing_items(folder, arguments.tokens, arguments.max_tokens)
    arguments.out.write_text(json.dumps(items, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    answered = sum(bool(item["answers"]) for item in items)
    print(f"{len(items)} questions, {answered} with the answer in their chunks: {arguments.out}")


def filing_items(folder: Path, tokens: int, max_tokens: int) -> list[dict[str, Any]]:
    """Return the questions over the PDFs of `folder` in MuSiQue's form."""
    config = PipelineConfig(
        chunking=ChunkingConfig(max_tokens=max_tokens),
        retrieval=RetrievalConfig(mode=SearchMode.BM25, k=HITS),
    )
    with (
        tempfile.TemporaryDirectory() as store,
        Pipeline.open(store, config, embedder=NoEmbedder()) as rag,
    ):
        report = rag.ingest(sorted(folder.glob("*.pdf")))
        if report.failed:
            sys.exit(f"could not be read: {report.failed}")
        return [_item(question, answer, _found(rag, question, tokens)) for question, answer in QUESTIONS]


class NoEmbedder:
    """The same vector for everything: BM25 alone searches, and embedding the reports would take minutes."""

    embedder_id = "none@0"
    dim = 2
    max_tokens = 512

    def encode(self, texts: Sequence[str], on_tokens: Callable[[int], None] | None = None) -> FloatMatrix:
        """Return (texts, 2) unit vectors."""
        del on_tokens
        return np.tile(np.array([[1.0, 0.0]], dtype=np.float32), (len(texts), 1))

    def encode_queries(self, texts: Sequence[str]) -> FloatMatrix:
        """Return what `encode` returns."""
        return self.encode(texts)


def _found(rag: Pipeline, question: str, tokens: int) -> list[dict[str, Any]]:
    """Return the best chunks that fit beside the better ones, the best last."""
    kept: list[dict[str, Any]] = []
    for hit in rag.search(question).hits:
        held = len(rag.tokenizer.encode(hit.text))
        if held <= tokens:
            kept.append({"text": hit.text, "before": _before(rag, hit.chunk_id)})
            tokens -= held
    return kept[::-1]


def _before(rag: Pipeline, chunk_id: str) -> list[str]:
    """Return the texts of the chunks before a chunk, in reading order."""
    (stored,) = rag.store.chunks_by_id([chunk_id])
    chunk = stored.chunk
    found = (rag.store.chunk_at(chunk.doc_id, index) for index in range(max(chunk.index - BEFORE, 0), chunk.index))
    return [one.chunk.text for one in found if one is not None]


def _item(question: str, answer: str, found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    number = re.compile(rf"(?<![\d.,]){re.escape(answer)}(?![.,]?\d)")  # and not a part of a longer one
    stands = bool(answer) and any(number.search(one["text"]) for one in found)
    return {"question": question, "answers": [answer] if stands else [], "ctxs": list(found)}


if __name__ == "__main__":
    main()
