"""Milliseconds of a warm search over 10^5 chunks, leg by leg, and seconds of a cold `ragkit search` over them.

    python benchmarks/retrieval_latency.py [--chunks 100000] [--store FOLDER] [--cold-rounds 5]

The chunks are made of the sentences of PostgreSQL's manual (Debian package postgresql-doc-15), drawn anew until there
are enough: real words with real frequencies. A chunk's vector is that of a real chunk with noise, since exact search
takes the same time whatever the vectors say. Questions are twenty typed ones and openings of sentences.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from ingest_speed import postgres_folder
from report import interleaved_samples, markdown_table, percentiles, write_result

from ragkit.config import EmbeddingConfig, RetrievalConfig
from ragkit.readers import read_documents
from ragkit.retrieval.embedders import load_embedder
from ragkit.retrieval.retriever import Retriever
from ragkit.store.base import IndexedDocument, SourceUpdate
from ragkit.store.store import Store
from ragkit.types import Chunk, Document, chunk_id_of

CHUNK_CHARACTERS = 1000
CHUNKS_A_DOCUMENT = 50
EMBEDDED = 400
QUESTIONS = (
    "How do I find out which queries are slow?",
    "What is the difference between VACUUM and VACUUM FULL?",
    "how to create an index without locking the table",
    "What does the wal_level parameter do?",
    "Can I change the type of a column in place?",
    "How are transaction isolation levels implemented?",
    "What is the maximum size of a table?",
    "how to restore a database from a dump made with pg_dump",
    "Which lock does ALTER TABLE take?",
    "How do I write a trigger function in PL/pgSQL?",
    "What happens when two transactions update the same row?",
    "Is there a way to list all the functions in a schema?",
    "how does the query planner choose between a hash join and a merge join",
    "What is TOAST?",
    "How do I set up streaming replication with a hot standby?",
    "can a view be updated",
    "What is the use of the to_tsvector function in text search?",
    "How is the shared buffer cache sized?",
    "How do I grant a user the right to read all of the tables in the database?",
    "What is the order of the columns in a multicolumn index good for?",
)


def sentences(folder: Path, pages: int = 250) -> list[str]:
    """Return the sentences of some pages of the manual."""
    names = sorted(folder.glob("*.html"))
    found = []
    for name in random.Random(0).sample(names, min(pages, len(names))):
        for document in read_documents(name):
            found += [part for part in re.split(r"(?<=[.:!?])\s+|\n+", document.text) if len(part) > 20]
    return found


def documents(pool: list[str], chunks: int) -> Iterator[tuple[Document, list[Chunk]]]:
    """Yield documents of fifty chunks of about a thousand characters, with different text each."""
    chance = random.Random(1)
    for number in range(-(-chunks // CHUNKS_A_DOCUMENT)):
        texts = []
        for _ in range(min(CHUNKS_A_DOCUMENT, chunks - number * CHUNKS_A_DOCUMENT)):
            text = ""
            while len(text) < CHUNK_CHARACTERS:
                text += chance.choice(pool) + " "
            texts.append(text)
        document = Document.from_text("".join(texts), uri=f"document-{number}", metadata={"part": number % 10})
        start, cuts = 0, []
        for index, text in enumerate(texts):
            stop = start + len(text)
            cuts.append(
                Chunk(
                    chunk_id_of(document.doc_id, start, stop), document.doc_id, index, text, start, stop, len(text) // 4
                )
            )
            start = stop
        yield document, cuts


def build(folder: Path, pool: list[str], chunks: int, embedder: Any) -> None:
    """Make the store."""
    made = list(documents(pool, chunks))
    some = [chunk.text for _, cuts in made for chunk in cuts][:EMBEDDED]
    real = embedder.encode(some)
    generator = np.random.default_rng(2)
    with Store.create(folder) as store, store.writer() as writer:
        writer.configure(
            embedder_id=embedder.embedder_id, dim=embedder.dim, chunker="benchmark", chunker_fingerprint="",
            tokenizer_id="",
        )  # fmt: skip
        for start in range(0, len(made), 100):
            group = []
            for document, cuts in made[start : start + 100]:
                vectors = real[generator.integers(0, len(real), len(cuts))]
                vectors = vectors + 0.02 * generator.standard_normal(vectors.shape, dtype=np.float32)
                vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
                group.append(
                    SourceUpdate(document.uri, document.doc_id, len(document.text), 1,
                                 documents=(IndexedDocument(document, cuts, vectors),))
                )  # fmt: skip
            writer.commit(group)


def warm(store: Store, embedder: Any, questions: list[str]) -> list[dict[str, Any]]:
    """Return one row a way of searching, with p50 and p95 of every step."""
    ways: dict[str, tuple[RetrievalConfig, dict[str, Any] | None]] = {
        "hybrid": (RetrievalConfig(), None),
        "hybrid, a tenth of the documents": (RetrievalConfig(), {"part": 3}),
        "hybrid, no words left out": (RetrievalConfig(common_share=1.0), None),
    }
    rows = []
    for name, (config, filters) in ways.items():
        retriever = Retriever(store, embedder, config)
        for question in questions[:5]:
            retriever.retrieve(question, filter=filters)
        laps: dict[str, list[float]] = {}
        for question in questions:
            for step, milliseconds in retriever.retrieve(question, filter=filters).timings_ms.items():
                laps.setdefault(step, []).append(milliseconds)
        row: dict[str, Any] = {"search": name}
        for step in ("embed", "dense", "bm25", "fuse", "chunks", "retrieve"):
            points = percentiles(laps[step], at=(50, 95))
            row[f"{step} p50"], row[f"{step} p95"] = points["p50"], points["p95"]
        rows.append(row)
    return rows


def cold(folder: Path, rounds: int) -> list[dict[str, Any]]:
    """Return seconds of `ragkit search` in a new process, for both embedding backends, page cache warm."""
    command = [str(Path(sysconfig.get_path("scripts")) / "ragkit"), "search", "--store", str(folder), "--json"]

    def search(backend: str) -> None:
        environ = os.environ | {"RAGKIT_EMBEDDING_BACKEND": backend}
        subprocess.run([*command, QUESTIONS[0]], env=environ, check=True, stdout=subprocess.DEVNULL)

    samples = interleaved_samples(
        {backend: lambda backend=backend: search(backend) for backend in ("encoder", "sentence-transformers")}, rounds
    )
    return [
        {"cold ragkit search": backend, "p50 s": float(np.median(values)), "slowest s": max(values), "rounds": rounds}
        for backend, values in samples.items()
    ]


def main() -> None:
    """Build the store where it is not there, then measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chunks", type=int, default=100_000)
    parser.add_argument("--store", type=Path, help="keep the store here, or use the one that is here")
    parser.add_argument("--cold-rounds", type=int, default=5)
    arguments = parser.parse_args()
    manual = postgres_folder()
    if manual is None:
        sys.exit("skipped: the Debian package postgresql-doc-15 is not installed")
    pool = sentences(manual)
    chance = random.Random(3)
    openings = [" ".join(sentence.split()[:12]) for sentence in chance.sample(pool, 180)]
    embedder = load_embedder(EmbeddingConfig(), device="cpu")
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.store or Path(temporary) / "store"
        if not Store.exists(folder):
            started = time.perf_counter()
            build(folder, pool, arguments.chunks, embedder)
            print(f"built {arguments.chunks} chunks in {time.perf_counter() - started:.0f} s", file=sys.stderr)
        with Store.open(folder) as store:
            chunks = len(store.row_ids())
            rows = warm(store, embedder, [*QUESTIONS, *openings])
        colds = cold(folder, arguments.cold_rounds) if arguments.cold_rounds else []
    print(f"{chunks} chunks, milliseconds, {len(QUESTIONS) + len(openings)} questions\n")
    print(markdown_table(rows, list(rows[0])))
    if colds:
        print("\n" + markdown_table(colds, list(colds[0])))
    write_result("retrieval_latency", {"chunks": chunks, "warm": rows, "cold": colds})


if __name__ == "__main__":
    main()
