"""First logits over chunk KV that lies on a cold disk: loaded, computed anew, or both as the controller decides.

    python benchmarks/cold_disk.py [--tokens 32768] [--rounds 3] [--folder DIR] [--load-threads N]
    python benchmarks/cold_disk.py --device cpu --tiny    # the same with a tiny model, to try the script

The shape of Llama 3 8B in bf16 with random weights, a prompt of 32,768 tokens in chunks of 512 and a question of 60;
blends recompute 15%. The KV of all chunks lies in a store on disk in several codecs. Before every run the files leave
the page cache (posix_fadvise; checked page by page, and by the rate of reading them) and the memory tier is empty.
`all loaded` takes every chunk from the disk; `auto` lets the controller decide, which has learned its rates on earlier
runs of its row. Timed is everything from the chunks' ids to the first logits; sides take turns within each round, and
figures are medians. Whatever the controller decides, the logits are those of loading everything: asserted.

The KV of random weights has no likeness of neighbouring tokens, so the entropy codec's bytes here are more than those
of real text, which docs/blending.md gives. Its encoder runs on the CPU and takes minutes for so much text, so a few
chunks are encoded and stored under the keys of all: equal work for the disk and the decoder, with other numbers.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from blend_speed import CLOSE, RATIO, RandomBench, Steps
from prefill_decode import distance
from report import markdown_table, percentiles, write_result
from torch import Tensor

from ragkit.generation.blend_prefill import BlendOptions, BlendPrefill
from ragkit.generation.chunk_prefill import ChunkPrefill, expected_cost
from ragkit.generation.full_prefill import FullPrefill
from ragkit.kvcache.chunk_kv import ChunkRef, EncodedKV
from ragkit.kvcache.codec import KVCodec, encode_chunk
from ragkit.kvcache.codecs import encoding_seconds, make_codec
from ragkit.kvcache.eviction import make_policy
from ragkit.kvcache.kv_key import KVRecipe
from ragkit.kvcache.kv_segment import FileSource
from ragkit.kvcache.kv_store import KVStore
from ragkit.kvcache.load_controller import COMPUTING, LoadController
from ragkit.kvcache.memory_tier import MemoryTier
from ragkit.kvcache.page_locked import PageLockedMemory
from ragkit.kvcache.segment_tier import SegmentTier
from ragkit.store import IndexedDocument, SourceUpdate, Store
from ragkit.types import Chunk, Document, Prompt, Segment, chunk_id_of

TOKENS, TINY_TOKENS = 32768, 1024
ROUNDS, LEARNING_ROUNDS = 3, 2
PLAIN = ("bf16", "int8", "int4", "int4+bf16")
ENTROPY = ("entropy1", "entropy2", "entropy3")
AUTO = ("bf16", "int8", "int4", "int4+bf16", "entropy1")
ENTROPY_CHUNKS = 2  # that are really encoded
SAVED_TOGETHER = 16
DISK_BYTES, MEMORY_BYTES, TINY_MEMORY_BYTES = 1 << 40, 7 << 30, 1 << 26
DROP_CACHES = Path("/proc/sys/vm/drop_caches")

COLUMNS = {
    "side": "Prefill", "gb_on_disk": "GB on disk", "bytes_per_token": "Bytes a token", "loaded": "Chunks loaded",
    "computed": "computed", "total_ms": "First logits, ms", "load_kv_ms": "waiting for loads",
    "compute_kv_ms": "computing chunks", "select_ms": "select", "blend_ms": "recompute", "speed_up": "times full",
}  # fmt: skip


@dataclass
class OnDisk:
    """One codec's KV of all chunks, and what is shared by the runs over it."""

    codec: KVCodec
    chunks: ChunkPrefill
    refs: list[ChunkRef]
    controller: LoadController
    nbytes: int = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument(
        "--tiny", action="store_true", help="a tiny random model and a short prompt; nothing is written"
    )
    parser.add_argument("--tokens", type=int, help="of the chunks")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--codecs", nargs="+", default=[*PLAIN, *ENTROPY], choices=[*PLAIN, *ENTROPY])
    parser.add_argument("--name", default="cold_disk", help="of the result")
    parser.add_argument("--load-threads", type=int, default=4, help="as the store's")
    parser.add_argument("--folder", type=Path, default=Path.cwd(), help="where a temporary store is made")
    arguments = parser.parse_args()
    tokens = arguments.tokens or (TINY_TOKENS if arguments.tiny else TOKENS)
    with torch.inference_mode(), tempfile.TemporaryDirectory(prefix=".cold-disk-", dir=arguments.folder) as folder:
        device = torch.device(arguments.device)
        bench = ColdBench(device, arguments.tiny, tokens, Path(folder), arguments.load_threads, arguments.codecs)
        result = bench.result(arguments.rounds)
    print(markdown_table(result["rows"], COLUMNS))
    print("\nrates:", result["rates"], "\ncosts:", result["costs"])
    if not arguments.tiny:
        print(f"\nraw numbers: {write_result(arguments.name, result)}")


class ColdBench(RandomBench):
    """A random model, and the KV of one prompt's chunks in a store on disk, once in each codec."""

    def __init__(
        self, device: torch.device, tiny: bool, tokens: int, folder: Path, load_threads: int, codecs: Sequence[str]
    ) -> None:
        self._started = time.perf_counter()
        super().__init__(device, tiny, [tokens])
        self._folder = folder
        self._load_threads = load_threads
        count = tokens // self.chunk
        self._store, chunk_ids = store_of(folder / "store", count)
        plain = self.prompt(count * self.chunk, self.chunk)
        middle = [Segment(one.token_ids, name) for one, name in zip(plain.segments[1:-1], chunk_ids, strict=True)]
        self.asked = Prompt((plain.segments[0], *middle, plain.segments[-1]))
        self._memory = PageLockedMemory(MEMORY_BYTES) if device.type == "cuda" else False
        self._budget = TINY_MEMORY_BYTES if tiny else MEMORY_BYTES
        self._kept = {name: self._on_disk(name) for name in codecs}
        self._plain, self._entropy, self._auto = (
            [name for name in names if name in codecs] for names in (PLAIN, ENTROPY, AUTO)
        )

    def result(self, rounds: int) -> dict[str, Any]:
        """Return everything that is measured."""
        result: dict[str, Any] = {"dtype": str(self.decoder.dtype), "device": str(self.device), "chunk": self.chunk}
        result |= {"tokens": len(self.asked), "load_threads": self._load_threads, "encoder": self._fill_disk()}
        result["rates"] = self._disk_rates()
        self._say(f"KV of all codecs is on the disk: {result['encoder']} {result['rates']}")
        result["gap_between_decisions"] = self._check()
        result["computing_alone_ms"] = {name: self._computing_alone_ms(name) for name in self._plain}
        self._say(f"loading and computing agree; a chunk is computed alone in {result['computing_alone_ms']} ms")
        for name in self._auto:
            for _ in range(LEARNING_ROUNDS):
                self._cold_run(name, is_auto=True)
        self._say("controllers have learned their rates")
        result["rows"] = self._measure_all(rounds)
        costs = {name: self._kept[name].controller.costs() for name in self._auto}
        result["costs"] = {
            name: {
                place: {"ms_a_piece": cost.per_piece * 1e3, "units_per_s": 1 / max(cost.per_unit, 1e-12)}
                for place, cost in known.items()
            }
            for name, known in costs.items()
        }
        result["unit"] = f"tokens for {COMPUTING!r}, else bytes"
        return result

    def _say(self, what: str) -> None:
        print(f"{time.perf_counter() - self._started:.0f} s: {what}", flush=True)

    def _on_disk(self, name: str) -> OnDisk:
        codec = make_codec(name, self.decoder.layout)
        recipe = KVRecipe("0" * 64, self.decoder.config, "random", self.decoder.dtype, codec.codec_id)
        chunks = ChunkPrefill(self.decoder, self.rotary, recipe, self.prefix)
        refs = [chunks.ref(segment) for segment in self.asked.segments[1:-1]]
        prior = expected_cost(self.decoder, encoding_seconds(name))
        return OnDisk(codec, chunks, refs, LoadController(prior))

    def _fill_disk(self) -> dict[str, float]:
        """Write the KV of every codec, and return what the entropy codec's encoder takes."""
        tier = SegmentTier(self._store, DISK_BYTES, make_policy("cost"))
        for name in self._plain:
            kept = self._kept[name]
            for start in range(0, len(kept.refs), SAVED_TOGETHER):
                refs = kept.refs[start : start + SAVED_TOGETHER]
                computed = kept.chunks.compute(refs)
                encoded = [
                    on_host(encode_chunk(kept.codec, *pair)) for pair in zip(computed, ids_of(refs), strict=True)
                ]
                assert tier.save(encoded) == len(encoded)
        rates = self._fill_with_few() if self._entropy else {}
        for kept in self._kept.values():
            entries = self._store.kv_entries([ref.key.digest for ref in kept.refs])
            kept.nbytes = sum(entry.bytes for _, entry in entries.values())
        return rates

    def _fill_with_few(self) -> dict[str, float]:
        """Write the KV of the entropy codec, of a few chunks under the keys of all, and return its encoder's rate."""
        tier = SegmentTier(self._store, DISK_BYTES, make_policy("cost"))
        jobs = [(name, index) for name in self._entropy for index in range(ENTROPY_CHUNKS)]
        started = time.perf_counter()
        with ThreadPoolExecutor(min(len(jobs), os.cpu_count() or 1)) as pool:
            encoded_by = dict(zip(jobs, pool.map(self._encoded, *zip(*jobs, strict=True)), strict=True))
        spent = time.perf_counter() - started
        layout = self.decoder.layout
        numbers = len(jobs) * self.chunk * layout.bytes_per_token / layout.dtype.itemsize
        for name in self._entropy:
            refs = self._kept[name].refs
            copies = [replace(encoded_by[name, index % ENTROPY_CHUNKS], ref=ref) for index, ref in enumerate(refs)]
            assert tier.save(copies) == len(copies)
        return {"entropy_encoded_mb_per_s": 2 * numbers / spent / 1e6, "threads": os.cpu_count() or 1}

    def _encoded(self, name: str, index: int) -> EncodedKV:
        kept = self._kept[name]
        with torch.inference_mode():
            (chunk,) = kept.chunks.compute(kept.refs[index : index + 1])
            return on_host(encode_chunk(kept.codec, chunk, kept.refs[index].chunk_id))

    def _disk_rates(self) -> dict[str, float]:
        """Return GB/s of reading files that are not in the page cache, and that are."""
        paths = sorted(path for path, _ in self._store.kv_listing())[:16]
        self._drop_page_cache()
        rates = {}
        for name in ("cold_gb_per_s", "cached_gb_per_s"):
            started = time.perf_counter()
            with ThreadPoolExecutor(self._load_threads) as pool:
                read = sum(pool.map(read_all, paths))
            rates[name] = read / (time.perf_counter() - started) / 1e9
        return rates

    def _check(self) -> dict[str, float]:
        """Return how far the logits with everything loaded are from those with everything computed."""
        gaps = {}
        for name in self._plain:
            loaded, _ = self._cold_run(name)
            kept = self._kept[name]
            memory = MemoryTier("ram", self._budget, make_policy("cost"), page_locked=self._memory)
            with KVStore(kept.codec, memory) as store:
                computed, _ = self.run(BlendPrefill(store, kept.chunks, BlendOptions()), RATIO, self.asked)
            gaps[name] = distance(computed, loaded)
            assert gaps[name] <= CLOSE, f"{name}: loading and computing differ by {gaps[name]}"
        for name in self._entropy:  # compiles its kernels
            self._cold_run(name)
        return gaps

    def _computing_alone_ms(self, name: str) -> float:
        """Return the milliseconds of computing a chunk with nothing beside it, encoding and the way to RAM included."""
        kept, spent = self._kept[name], []
        for ref in kept.refs[:8]:
            memory = MemoryTier("ram", self._budget, make_policy("cost"), page_locked=self._memory)
            with KVStore(kept.codec, memory) as store:
                started = time.perf_counter()
                with store.fetch([ref], kept.chunks.compute):
                    spent.append((time.perf_counter() - started) * 1e3)
        return statistics.median(spent)

    def _cold_run(self, name: str, *, is_auto: bool = False) -> tuple[Tensor, Steps]:
        """Return the logits and steps of one blend with nothing in memory and nothing in the page cache."""
        kept = self._kept[name]
        tier = SegmentTier(self._store, DISK_BYTES, make_policy("cost"))
        memory = MemoryTier("ram", self._budget, make_policy("cost"), page_locked=self._memory)
        controller = kept.controller if is_auto else None
        gc.collect()
        self._drop_page_cache()
        with KVStore(kept.codec, memory, [tier], controller=controller, load_threads=self._load_threads) as store:
            result, spent = self.prefill(BlendPrefill(store, kept.chunks, BlendOptions()), RATIO, self.asked)
            use = result.kv
            assert use.misses == 0, f"{name}: {use.misses} chunks are not on disk"
            assert is_auto or use.hits == len(kept.refs)
        counts = {"loaded": float(use.hits), "computed": float(use.recomputed)}
        return result.logits, dict(result.timings_ms) | {"total": spent} | counts

    def _drop_page_cache(self) -> None:
        paths = {path for path, _ in self._store.kv_listing()}
        for path in paths:
            drop(path)
        if not any(is_cached(path) for path in paths):
            return
        if os.access(DROP_CACHES, os.W_OK):
            DROP_CACHES.write_text("1")
        if any(is_cached(path) for path in paths):
            sys.exit(f"{self._folder} keeps its files in memory: give --folder on a disk")

    def _measure_all(self, rounds: int) -> list[dict[str, Any]]:
        """Return a row a side: medians over `rounds` rounds in turns."""
        sides: dict[str, Any] = {
            "transformers SDPA full": lambda: self.their_run(self.asked),
            "ragkit full": lambda: self.run(FullPrefill(), None, self.asked),
        }
        codec_of = {}
        for name, is_auto in [*((name, False) for name in self._kept), *((name, True) for name in self._auto)]:
            side = f"blend {RATIO:.0%}, {name}, {'auto' if is_auto else 'all loaded'}"
            codec_of[side] = name
            sides[side] = lambda name=name, is_auto=is_auto: self._cold_run(name, is_auto=is_auto)
        for side in list(sides)[:2]:
            sides[side]()  # warms up; the blends have run already
        samples: dict[str, list[Steps]] = {side: [] for side in sides}
        names = list(sides)
        for turn in range(rounds):
            for side in [*names[turn % len(names) :], *names[: turn % len(names)]]:
                samples[side].append(sides[side]()[1])
            self._say(f"round {turn + 1} of {rounds}")
        rows = [self._row(side, codec_of.get(side), samples[side]) for side in names]
        fastest = min(row["total_ms"] for row in rows if row["side"] not in codec_of)
        return [row | {"speed_up": fastest / row["total_ms"]} for row in rows]

    def _row(self, side: str, codec: str | None, samples: Sequence[Steps]) -> dict[str, Any]:
        medians = {step: statistics.median(sample[step] for sample in samples) for step in samples[0]}
        row: dict[str, Any] = {"side": side} | {f"{step}_ms": medians[step] for step in medians}
        row["percentiles"] = percentiles([sample["total"] for sample in samples])
        if codec is not None:
            row |= {name: int(medians[name]) for name in ("loaded", "computed")}
            del row["loaded_ms"], row["computed_ms"]
            nbytes = self._kept[codec].nbytes
            row |= {
                "gb_on_disk": nbytes / 1e9,
                "bytes_per_token": round(nbytes / self.chunk / len(self._kept[codec].refs)),
            }
        return row


def store_of(folder: Path, count: int) -> tuple[Store, list[str]]:
    """Return a store with `count` chunks of some text, whose KV can then be kept in it, and their ids."""
    text = "".join(f"chunk {number:05d}\n" for number in range(count))
    document = Document.from_text(text, "a.txt")
    spans = [(12 * number, 12 * number + 12) for number in range(count)]
    chunks = [
        Chunk(chunk_id_of(document.doc_id, *span), document.doc_id, index, text[slice(*span)], *span, 3)
        for index, span in enumerate(spans)
    ]
    store = Store.create(folder)
    with store.writer() as writer:
        writer.configure(embedder_id="none", dim=2, chunker="none", chunker_fingerprint="none", tokenizer_id="none")
        indexed = IndexedDocument(document, chunks, np.zeros((count, 2), np.float32))
        writer.commit([SourceUpdate("a.txt", "0" * 64, len(text), 1, documents=(indexed,))])
    return store, [chunk.chunk_id for chunk in chunks]


def ids_of(refs: Sequence[ChunkRef]) -> Iterator[str]:
    return (ref.chunk_id for ref in refs)


def on_host(encoded: EncodedKV) -> EncodedKV:
    """Return a chunk with its bytes in host memory."""
    return replace(encoded, data=encoded.data.cpu())


def drop(path: Path) -> None:
    """Ask the system to let go of a file's pages; they must have been written before."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def is_cached(path: Path) -> bool:
    with FileSource(path, 0, path.stat().st_size) as source:
        return source.is_cached()


def read_all(path: Path) -> int:
    """Read a file as the store does, and return its bytes."""
    size = path.stat().st_size
    with FileSource(path, 0, size) as source:
        return source.read_into(0, memoryview(bytearray(size)))


if __name__ == "__main__":
    main()
