"""What reading a store may cost: no heavy imports, and a size of store that real collections have."""

import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from store_samples import configure, contents, update

from ragkit.store import IndexedDocument, SourceUpdate, Store
from ragkit.types import Chunk, Document, chunk_id_of

READ_EVERYTHING = """
import sys
from ragkit.store import Store
light = sys.modules.keys() & {"numpy", "pyarrow", "torch", "faiss"}
with Store.open(sys.argv[1]) as store:
    store.counts(), store.sources(), store.meta
    early = sys.modules.keys() & {"numpy", "pyarrow", "torch", "faiss"}
    assert len(store.chunks(store.match('"fox"', 5)[0])) == 1
    assert store.vectors().row_ids.size == 2
    print(sorted(light), sorted(early), sorted(sys.modules.keys() & {"pyarrow", "torch", "faiss"}))
"""


def test_a_status_query_imports_no_numpy_and_a_search_no_pyarrow(store):
    with store.writer() as writer:
        configure(writer)
        writer.commit([update("a.txt", "a quick fox", "a lazy dog")])
    done = subprocess.run(
        [sys.executable, "-c", READ_EVERYTHING, str(store.folder)], capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "[] [] []\n", done.stderr


def test_reads_of_many_threads_agree(store):
    with store.writer() as writer:
        configure(writer)
        writer.commit([update(f"{n}.txt", f"text {n} of many threads") for n in range(20)])
    expected, seen = contents(store), []
    threads = [threading.Thread(target=lambda: seen.extend(contents(store) for _ in range(3))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [expected] * 24


@pytest.mark.slow
def test_a_hundred_thousand_chunks_are_stored_and_found(tmp_path):
    words = [f"w{number}" for number in range(5000)]
    numbers = np.random.default_rng(0)

    def source(name):
        texts = [f"id{name}x{row} " + " ".join(words[n] for n in numbers.integers(0, 5000, 60)) for row in range(500)]
        document = Document.from_text("".join(texts), f"{name}.txt")
        chunks, start = [], 0
        for index, text in enumerate(texts):
            stop = start + len(text)
            chunk_id = chunk_id_of(document.doc_id, start, stop)
            chunks.append(Chunk(chunk_id, document.doc_id, index, text, start, stop, 60))
            start = stop
        vectors = numbers.standard_normal((500, 64), dtype=np.float32)
        return SourceUpdate(
            f"{name}.txt", f"{name:064d}", start, 1, documents=(IndexedDocument(document, chunks, vectors),)
        )

    with Store.create(tmp_path / "s") as store:
        with store.writer() as writer:
            configure(writer, dim=64)
            for group in range(5):
                writer.commit([source(group * 40 + part) for part in range(40)])
        assert store.counts().chunks == len(store.row_ids()) == len(store.vectors().row_ids) == 100_000
        row_ids, _ = store.match('"id77x123"', 10)
        (hit,) = store.chunks(row_ids)
        assert (hit.uri, hit.chunk.index) == ("77.txt", 123)
        started = time.perf_counter()
        for _ in range(50):
            store.chunks(numbers.integers(1, 100_000, 20))
        assert (time.perf_counter() - started) / 50 < 0.02  # under 1 ms on a quiet machine
        assert store.verify().problems == ()
