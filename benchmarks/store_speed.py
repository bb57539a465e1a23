"""What the store costs: a commit group, a cold and a warm query's reads, listing, verifying.

    python benchmarks/store_speed.py [--chunks N] [--rounds N]

The collection is generated: words drawn by Zipf's law from a vocabulary of 60,000, 110 words a chunk, 200 chunks a
document, 384 numbers a vector, 40,000 chunks a commit group (61 MB of vectors). Times are medians over `rounds`; the
commit's are those of single groups, with the share of CPU time that full-text indexing takes measured apart, by
inserting the same text into an index of its own.
"""

from __future__ import annotations

import argparse
import random
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from report import markdown_table, write_result

from ragkit.store import IndexedDocument, SourceUpdate, Store
from ragkit.types import Chunk, Document, chunk_id_of

DIM = 384
GROUP_CHUNKS = 40_000
DOCUMENT_CHUNKS = 200
VOCABULARY = 60_000
RANKS = {"rare": (300, 2_000, 9_000, 25_000), "common": (0, 5, 40, 300, 2_000)}
COLD = """
import time
begin = time.perf_counter()
from ragkit.store import Store
import sys
with Store.open(sys.argv[1]) as store:
    store.counts()
    print(1e3 * (time.perf_counter() - begin))
"""


class Collection:
    """Generates documents; the same seed gives the same ones."""

    def __init__(self) -> None:
        letters = random.Random(1)
        self.words = [
            "".join(letters.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(letters.randint(2, 10)))
            for _ in range(VOCABULARY)
        ]
        weights = 1 / np.arange(1, VOCABULARY + 1)
        self._weights = weights / weights.sum()
        self._numbers = np.random.default_rng(0)

    def source(self, number: int) -> SourceUpdate:
        """Return one document ready to be committed."""
        drawn = self._numbers.choice(VOCABULARY, size=(DOCUMENT_CHUNKS, 110), p=self._weights)
        texts = [" ".join(self.words[place] for place in row) + " " for row in drawn]
        document = Document.from_text("".join(texts), f"{number}.txt", metadata={"number": number})
        chunks, start = [], 0
        for index, text in enumerate(texts):
            stop = start + len(text)
            chunk_id = chunk_id_of(document.doc_id, start, stop)
            chunks.append(Chunk(chunk_id, document.doc_id, index, text, start, stop, 200))
            start = stop
        vectors = self._numbers.standard_normal((DOCUMENT_CHUNKS, DIM), dtype=np.float32)
        indexed = IndexedDocument(document, chunks, vectors)
        return SourceUpdate(f"{number}.txt", f"{number:064d}", start, 1, recipe="r", documents=(indexed,))

    def query(self, ranks: Sequence[int]) -> str:
        """Return a full-text query of the words with these frequency ranks."""
        return " OR ".join(f'"{self.words[rank]}"' for rank in ranks)


def milliseconds(work: Callable[[], object], rounds: int) -> float:
    """Return the median time of `work`, after one run that does not count."""
    work()
    samples = []
    for _ in range(rounds):
        begin = time.perf_counter()
        work()
        samples.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(samples)


def full_text_seconds(group: Sequence[SourceUpdate]) -> float:
    """Return the CPU seconds that indexing a group's text takes by itself."""
    memory = sqlite3.connect(":memory:", isolation_level=None)
    memory.execute(
        "CREATE VIRTUAL TABLE t USING fts5(text, content='', tokenize='porter unicode61 remove_diacritics 2')"
    )
    memory.execute("INSERT INTO t (t, rank) VALUES ('hashsize', 16777216)")
    texts = [chunk.text for update in group for item in update.documents for chunk in getattr(item, "chunks", ())]
    begin = time.process_time()
    memory.execute("BEGIN")
    memory.executemany("INSERT INTO t (rowid, text) VALUES (?, ?)", enumerate(texts, 1))
    memory.execute("COMMIT")
    memory.close()
    return time.process_time() - begin


def fill(store: Store, collection: Collection, chunks: int) -> list[dict[str, float]]:
    """Commit the collection group by group and return what each group cost."""
    costs = []
    for first in range(0, chunks, GROUP_CHUNKS):
        numbers = range(first // DOCUMENT_CHUNKS, min(first + GROUP_CHUNKS, chunks) // DOCUMENT_CHUNKS)
        group = [collection.source(number) for number in numbers]
        wall, cpu = time.perf_counter(), time.process_time()
        with store.writer() as writer:
            writer.configure(embedder_id="e@1", dim=DIM, chunker="c", chunker_fingerprint="f", tokenizer_id="t")
            writer.commit(group)
        cost = {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}
        text_mb = sum(update.size for update in group) / 1e6
        costs.append(
            {**cost, "chunks": len(group) * DOCUMENT_CHUNKS, "text_mb": text_mb, "fts_cpu_s": full_text_seconds(group)}
        )
    return costs


def read_times(store: Store, collection: Collection, rounds: int) -> dict[str, float]:
    """Return the milliseconds of every kind of read."""
    rows = store.row_ids()
    numbers = np.random.default_rng(2)
    allowed = store.rows_where({"uri": "1*.txt"})
    document = store.source_documents("7.txt")[0].doc_id
    work: dict[str, Callable[[], object]] = {
        "20 chunks by row": lambda: store.chunks(numbers.choice(rows, 20)),
        "match, 4 rare words": lambda: store.match(collection.query(RANKS["rare"]), 100),
        "match, 5 words with the commonest": lambda: store.match(collection.query(RANKS["common"]), 100),
        "the same within a filter": lambda: store.match(collection.query(RANKS["common"]), 100, allowed),
        "filter by metadata": lambda: store.rows_where({"number": 7}),
        "filter by URI glob": lambda: store.rows_where({"uri": "1*.txt"}),
        "vectors, verified already": store.vectors,
        "counts": store.counts,
        "all sources": store.sources,
        "one document of 200 chunks": lambda: store.document(document),
        "all row ids": store.row_ids,
    }
    return {name: milliseconds(step, rounds) for name, step in work.items()}


def cold_times(folder: Path, rounds: int) -> dict[str, float]:
    """Return the milliseconds of what a fresh process or a fresh generation pays once."""
    command = [sys.executable, "-c", COLD, str(folder)]
    starts = [float(subprocess.run(command, capture_output=True, check=True, text=True).stdout) for _ in range(rounds)]
    with Store.open(folder) as store:
        begin = time.perf_counter()
        store.vectors()
        first_vectors = 1e3 * (time.perf_counter() - begin)
        begin = time.perf_counter()
        report = store.verify()
        assert not report.problems
        verify = 1e3 * (time.perf_counter() - begin)
    return {
        "import, open and counts in a fresh process": statistics.median(starts),
        "vectors with checksums, first time": first_vectors,
        "verify everything": verify,
    }


def main() -> None:
    """Fill a store, time it, print the table and keep the numbers."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--chunks", type=int, default=100_000)
    arguments.add_argument("--rounds", type=int, default=21)
    asked = arguments.parse_args()
    collection = Collection()
    with tempfile.TemporaryDirectory(prefix="ragkit-store-") as scratch:
        folder = Path(scratch) / "store"
        with Store.create(folder) as store:
            commits = fill(store, collection, asked.chunks)
        cold = cold_times(folder, min(asked.rounds, 5))
        with Store.open(folder) as store:
            reads = read_times(store, collection, asked.rounds)
            size_mb = store.counts().bytes_on_disk / 1e6
    result: dict[str, Any] = {
        "chunks": asked.chunks,
        "disk_mb": size_mb,
        "commits": commits,
        "cold_ms": cold,
        "read_ms": reads,
    }
    rows = [
        {
            "step": f"commit of {cost['chunks']:,.0f} chunks ({cost['text_mb']:.0f} MB of text)",
            "ms": 1e3 * cost["wall_s"],
            "CPU ms": 1e3 * cost["cpu_s"],
            "full text alone, CPU ms": 1e3 * cost["fts_cpu_s"],
        }
        for cost in commits
    ]
    rows += [{"step": name, "ms": value} for name, value in {**cold, **reads}.items()]
    print(markdown_table(rows, ("step", "ms", "CPU ms", "full text alone, CPU ms")))
    print(f"\n{asked.chunks:,} chunks take {size_mb:,.0f} MB on disk.")
    print(f"Results: {write_result('store_speed', result)}")


if __name__ == "__main__":
    main()
