"""Memory of one huge document: a text file of 300 MB ingested through `Pipeline`, with a stand-in for the embedder.

    python benchmarks/ingest_memory.py [--megabytes N]

Everything but the embedding model is real: reading in the child process, chunking with the generator's tokenizer,
full-text index, segments, the transaction. The stand-in returns a fixed unit vector a text, so that the figure is the
pipeline's own and the run takes minutes instead of a day. Two files are tried, because Python keeps a text with
characters beyond Latin-1 at two bytes each: one in ASCII, one with typographic punctuation. The peak is that of
the process and its parser child together.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from peak_memory import PeakMemory
from report import ROOT, markdown_table, write_result


class ConstantEmbedder:
    """An `Embedder` that costs nothing: row i is a unit vector along dimension i modulo `dim`."""

    embedder_id = "constant@0"
    dim = 384
    max_tokens = 256
    backend = "stand-in"

    def encode(self, texts: Sequence[str], on_tokens: Callable[[int], None] | None = None) -> NDArray[np.float32]:
        """Return (texts, dim) rows of unit length."""
        vectors = np.zeros((len(texts), self.dim), dtype=np.float32)
        vectors[np.arange(len(texts)), np.arange(len(texts)) % self.dim] = 1
        if on_tokens is not None:
            on_tokens(sum(map(len, texts)) // 4)
        return vectors


def write_text(path: Path, megabytes: int, *, ascii_only: bool) -> None:
    """Write a text of `megabytes` (10^6 bytes): the words of the demo collection's pages, in numbered paragraphs."""
    sentences = list(_sentences(ascii_only))
    size, number, limit = 0, 0, megabytes * 1_000_000
    with path.open("w", encoding="utf-8") as file:
        while size < limit:
            paragraph = (
                f"{number}. {sentences[number * 7 % len(sentences)]} {sentences[number * 11 % len(sentences)]}\n\n"
            )
            size += len(paragraph.encode())
            number += 1
            file.write(paragraph)


def _sentences(ascii_only: bool) -> Iterator[str]:
    from lxml import html

    for page in sorted((ROOT / "examples" / "collection").glob("*.html")):
        for paragraph in html.fromstring(page.read_bytes().decode("utf-8")).iter("p"):
            text = " ".join(paragraph.text_content().split()).encode("ascii", "replace").decode()
            if len(text) > 80:
                yield text if ascii_only else text.replace("'", "\N{RIGHT SINGLE QUOTATION MARK}") + " \N{EM DASH}"


def ingest(path: str, store: str) -> dict[str, Any]:
    """Ingest one file into a new store and return counts, seconds and the peak."""
    from ragkit import Pipeline, PipelineConfig

    with PeakMemory() as memory, Pipeline.open(store, PipelineConfig(), embedder=ConstantEmbedder()) as rag:
        started = time.perf_counter()
        report = rag.ingest([path])
        seconds = time.perf_counter() - started
    if report.failed or report.added != 1:
        raise SystemExit(f"the file was not ingested: {report.failed}")
    return {
        "chunks": report.chunks,
        "tokens": report.tokens,
        "seconds": seconds,
        "stages_s": dict(report.timings_s),
        "peak_mb": memory.peak_mb,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=300)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name, ascii_only in (("ASCII", True), ("typographic punctuation", False)):
        with tempfile.TemporaryDirectory(prefix="ragkit-memory-") as scratch:
            path = Path(scratch) / "large.txt"
            write_text(path, options.megabytes, ascii_only=ascii_only)
            size = path.stat().st_size / 1e6
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                result = pool.submit(ingest, str(path), str(Path(scratch) / "store")).result()
            rows.append({"text": name, "file_mb": size, **result, "times_file": result["peak_mb"] / size})
    columns = {
        "text": "Text",
        "file_mb": "File, MB",
        "chunks": "Chunks",
        "tokens": "Tokens",
        "seconds": "Seconds",
        "peak_mb": "Peak memory, MB",
        "times_file": "Times the file",
    }
    print(markdown_table(rows, columns))
    print(f"\nraw numbers: {write_result('ingest_memory', {'files': rows})}")


if __name__ == "__main__":
    main()
