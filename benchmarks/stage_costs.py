"""What each stage of an ingest costs: what docs/scaling.md is calculated from (`scaling_table.py`).

    RAGKIT_DATA=... python benchmarks/stage_costs.py --sizes            sizes and counts; nothing is timed
    RAGKIT_DATA=... python benchmarks/stage_costs.py --device cpu       [--catalogue 1000000]
    python benchmarks/stage_costs.py --device cuda                      embedding, chunk KV at the shape of Llama 3 8B

The documents are the quarterly reports (10-Q, PDF) of the benchmark data. `--sizes` counts their pages, tokens and
chunks and what they take: in the catalogue, as vectors, as messages between worker and committer with and without
vectors, and as chunk KV in every codec. `--device cpu` measures, per page, CPU seconds of reading, chunking and
embedding, what sending a group between processes takes, and what a commit takes in catalogues of growing size.
`--device cuda` measures tokens a second of embedding, and of computing, encoding and writing chunk KV.
"""

from __future__ import annotations

import argparse
import pickle
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pages_documents import LARGE, random_decoder
from prefill_decode import SHAPE_8B
from report import data_folder, markdown_table, write_result
from store_speed import DOCUMENT_CHUNKS, Collection

from ragkit import Pipeline
from ragkit.chunking.registry import create_chunker
from ragkit.config import CodecName, Device, PipelineConfig
from ragkit.jobs.executor import PreparedGroup
from ragkit.jobs.plan import Action, PlannedSource
from ragkit.jobs.steps import ChunkedSource, PreparedSource, chunk_source, embed_sources
from ragkit.kvcache.codecs import make_codec
from ragkit.kvcache.layout import KVLayout
from ragkit.models.model_config import model_config
from ragkit.readers import ReaderPool, discover
from ragkit.store import Store
from ragkit.store.base import IndexedDocument

CHUNK_TOKENS = 256
EIGHT_B = KVLayout.of(model_config({"model_type": "llama", "rms_norm_eps": 1e-5, **SHAPE_8B}), torch.bfloat16)


def reports() -> Path:
    """Return the folder of the quarterly reports."""
    folder = data_folder("sec_10q")
    if folder is None:
        raise SystemExit("set RAGKIT_DATA to the benchmark data: this needs its folder sec_10q")
    return folder


def chunked_reports(pipeline: Pipeline) -> tuple[list[PlannedSource], list[ChunkedSource], float, float]:
    """Return the reports with their chunks, and the CPU seconds of reading (parser children too) and of chunking."""
    sources = list(discover([reports()], include=["*.pdf"]))
    chunker = create_chunker(pipeline.config.chunking, pipeline.tokenizer, pipeline.parts)
    before = _cpu_with_children()
    with ReaderPool() as pool:
        results = list(pool.map(sources))
    read = _cpu_with_children() - before
    before = time.process_time()
    chunked = [
        chunk_source(result, chunker, pipeline.config.chunking.max_tokens, lambda _: False) for result in results
    ]
    seconds = time.process_time() - before
    whole = [source for source in chunked if isinstance(source, ChunkedSource)]
    return [PlannedSource(source, Action.ADD, "") for source in sources], whole, read, seconds


class SizedEmbedder:
    """Gives vectors of the right size and no meaning, at once: for counting."""

    embedder_id, dim, max_tokens = "sizes@384", 384, 256

    def encode(self, texts: Sequence[str], on_tokens: Callable[[int], None] | None = None) -> Any:
        """Return equal vectors, (texts, dim)."""
        return np.full((len(texts), self.dim), self.dim**-0.5, np.float32)

    def encode_queries(self, texts: Sequence[str]) -> Any:
        """Return what `encode` returns."""
        return self.encode(texts)


def sizes() -> dict[str, Any]:
    """Return counts and bytes; nothing here depends on how busy the machine is."""
    with tempfile.TemporaryDirectory() as folder:
        config = PipelineConfig(device=Device.CPU)
        with Pipeline.open(Path(folder) / "store", config, embedder=SizedEmbedder()) as pipeline:
            items, chunked, _, _ = chunked_reports(pipeline)
            prepared = embed_sources(chunked, pipeline.parts.chunk_embedder)
            pipeline.ingest([reports()])
            pipeline.gc()
        catalogue = (Path(folder) / "store" / "ragkit.db").stat().st_size
    documents = [document for source in chunked for document, _ in source.documents]
    chunks = [chunk for source in chunked for _, cut in source.documents for chunk in cut or ()]
    with_vectors = len(pickle.dumps(PreparedGroup(list(zip(items, prepared, strict=True))), protocol=5))
    return {
        "documents": len(documents),
        "pages": sum(len(document.pages) for document in documents),
        "characters": sum(len(document.text) for document in documents),
        "tokens": sum(chunk.token_count for chunk in chunks),
        "chunks": len(chunks),
        "catalogue_bytes": catalogue,
        "vector_bytes": 4 * SizedEmbedder.dim * len(chunks),
        "message_bytes": with_vectors,
        "message_bytes_without_vectors": with_vectors - 4 * SizedEmbedder.dim * len(chunks),
        "kv_bytes_per_token": {
            name.value: make_codec(name, EIGHT_B).bytes_per_token(CHUNK_TOKENS) for name in CodecName
        },
    }  # fmt: skip


def on_cpu(catalogue: int) -> dict[str, Any]:
    """Return CPU seconds a page of each stage, and of a commit by the size of the catalogue."""
    with tempfile.TemporaryDirectory() as folder:
        with Pipeline.open(Path(folder) / "store", PipelineConfig(device=Device.CPU)) as pipeline:
            pipeline.embedder.encode(["warm " * 200])
            torch.set_num_threads(1)
            items, chunked, read, chunk = chunked_reports(pipeline)
            before = time.process_time()
            prepared = embed_sources(chunked, pipeline.parts.chunk_embedder)
            embed = time.process_time() - before
        commits = commit_costs(Path(folder) / "grown", catalogue)
    pages = sum(len(document.pages) for source in chunked for document, _ in source.documents)
    group = PreparedGroup(list(zip(items, prepared, strict=True)))
    packed = pickle.dumps(group, protocol=5)  # as Ray sends it between processes; nothing is ever loaded here
    return {
        "threads": 1,
        "read_cpu_s_per_page": read / pages,
        "chunk_cpu_s_per_page": chunk / pages,
        "embed_cpu_s_per_page": embed / pages,
        "send_mb_per_s": len(packed) / 1e6 / seconds_of(lambda: pickle.dumps(group, protocol=5)),
        "vector_share_of_message": _vector_bytes(prepared) / len(packed),
        "commits": commits,
    }


def commit_costs(folder: Path, catalogue: int) -> list[dict[str, float]]:
    """Return what committing a chunk, in groups of 600, takes while a catalogue grows to so many."""
    collection, number = Collection(), 0
    costs = []
    steps = sorted({10**power for power in range(4, 10) if 10**power <= catalogue} | {catalogue})
    with Store.create(folder) as store, store.writer() as writer:
        writer.configure(embedder_id="e@1", dim=384, chunker="c", chunker_fingerprint="f", tokenizer_id="t")
        for size in steps:
            while number * DOCUMENT_CHUNKS < size:
                group = [collection.source(one) for one in range(number, number + 50)]
                writer.commit(group)
                number += 50
            samples = []
            for _ in range(9):
                group = [collection.source(one) for one in range(number, number + 3)]
                began = time.perf_counter()
                writer.commit(group)
                samples.append((time.perf_counter() - began) / (3 * DOCUMENT_CHUNKS))
                number += 3
            per_chunk = statistics.median(samples)
            costs.append({"catalogue_chunks": number * DOCUMENT_CHUNKS, "s_per_chunk": per_chunk})
            print(costs[-1], file=sys.stderr)
    return costs


def on_cuda() -> dict[str, Any]:
    """Return tokens a second of embedding and of chunk KV on the GPU."""
    device = torch.device("cuda")
    words = Collection().words
    texts = [" ".join(words[start : start + 110]) for start in range(0, 11_000, 11)]
    with tempfile.TemporaryDirectory() as folder, Pipeline.open(folder, PipelineConfig(device=Device.CUDA)) as pipeline:
        embedder = pipeline.embedder
        tokens = sum(len(ids) for ids in embedder.token_ids(texts)) if hasattr(embedder, "token_ids") else 0
        embedder.encode(texts[:500])
        embed = tokens / seconds_of(lambda: embedder.encode(texts))
    decoder = random_decoder(LARGE, device)
    with tempfile.TemporaryDirectory() as folder:
        rows = [chunk_kv(decoder, codec, Path(folder)) for codec in (CodecName.BF16, CodecName.INT8, CodecName.INT4)]
    return {"embed_tokens_per_s": embed, "chunk_kv": rows}


def chunk_kv(decoder: Any, name: CodecName, folder: Path) -> dict[str, Any]:
    """Return tokens a second of computing and encoding chunks of 256 tokens, and MB/s of writing them as a segment."""
    from ragkit.generation.chunk_prefill import ChunkPrefill
    from ragkit.generation.rotary_cache import RotaryCache
    from ragkit.kvcache.codec import encode_chunk
    from ragkit.kvcache.kv_key import KVRecipe
    from ragkit.kvcache.kv_segment import segment_parts
    from ragkit.store.derived import write_kv
    from ragkit.types import Segment

    codec = make_codec(name, decoder.layout)
    recipe = KVRecipe("0" * 64, decoder.config, "random", decoder.dtype, codec.codec_id)
    prefill = ChunkPrefill(decoder, RotaryCache(decoder), recipe, tuple(range(100, 132)))
    refs = [
        prefill.ref(Segment(tuple(range(1000 + number, 1000 + number + CHUNK_TOKENS)), str(number)))
        for number in range(16)
    ]

    def compute() -> list[Any]:
        encoded = [encode_chunk(codec, one, ref.chunk_id) for one, ref in zip(prefill.compute(refs), refs, strict=True)]
        torch.cuda.synchronize()
        return encoded

    encoded = compute()
    compute_s = seconds_of(compute)

    def write() -> None:
        parts, entries = segment_parts(encoded)
        write_kv(folder, parts, entries)

    write_s = seconds_of(write)
    tokens, nbytes = len(refs) * CHUNK_TOKENS, sum(one.nbytes for one in encoded)
    return {
        "codec": name.value,
        "chunk_tokens": CHUNK_TOKENS,
        "compute_tokens_per_s": tokens / compute_s,
        "write_mb_per_s": nbytes / 1e6 / write_s,
        "bytes_per_token": nbytes / tokens,
    }


def seconds_of(run: Callable[[], object], rounds: int = 5) -> float:
    """Return the median seconds of `run`, after one run that does not count."""
    run()
    samples = []
    for _ in range(rounds):
        began = time.perf_counter()
        run()
        samples.append(time.perf_counter() - began)
    return statistics.median(samples)


def _vector_bytes(prepared: Any) -> int:
    sources = (one for one in prepared if isinstance(one, PreparedSource))
    return sum(one.vectors.nbytes for source in sources for one in source.documents if isinstance(one, IndexedDocument))


def _cpu_with_children() -> float:
    import resource

    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", action="store_true", help="count, and time nothing")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--catalogue", type=int, default=1_000_000, help="chunks of the largest catalogue (cpu)")
    options = parser.parse_args()
    if options.sizes:
        name, result = "stage_sizes", sizes()
    elif options.device == "cpu":
        name, result = "stage_costs_cpu", on_cpu(options.catalogue)
    else:
        name, result = "stage_costs_cuda", on_cuda()
    rows = [{"what": key, "value": value} for key, value in result.items() if isinstance(value, (int, float))]
    print(markdown_table(rows, {"what": "What", "value": "Value"}))
    print(f"\nraw numbers: {write_result(name, result)}", file=sys.stderr)


if __name__ == "__main__":
    main()
