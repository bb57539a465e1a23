"""The side of batch_speed.py with random weights: single requests, batches, sharing on and off, and transformers."""

from __future__ import annotations

import dataclasses
import gc
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from blend_speed import tiny_models
from prefill_decode import ceilings, random_models
from report import markdown_table

from ragkit.config import BatchConfig, BlendRows, ChunkPlacement
from ragkit.generation.batch_engine import BatchEngine
from ragkit.generation.batch_request import BatchRequest, BatchResult
from ragkit.generation.batch_stats import BatchStats
from ragkit.generation.blend_prefill import BlendOptions, BlendPrefill
from ragkit.generation.chunk_prefill import ChunkPrefill
from ragkit.generation.decoder import Decoder
from ragkit.generation.engine import Engine
from ragkit.generation.sampling import SamplingConfig
from ragkit.kvcache.codecs import make_codec
from ragkit.kvcache.eviction import make_policy
from ragkit.kvcache.kv_key import KVRecipe
from ragkit.kvcache.kv_store import KVStore
from ragkit.kvcache.memory_tier import MemoryTier
from ragkit.kvcache.pool_tier import PoolTier
from ragkit.types import Prompt, Segment

PREFIX_TOKENS, QUESTION_TOKENS = 30, 60
HF_BATCHES = (16, 32, 64)
RATIO = 0.15
COLUMNS = {
    "side": "Side", "requests": "Requests", "seconds": "Seconds", "ms_per_request": "ms a request",
    "computed": "Prefill tokens computed", "needed": "needed", "held_gb": "KV held, GB", "listed_gb": "as copies, GB",
    "of_peak": "Share of peak",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Scale:
    """What is run.

    Attributes:
        requests, baseline, full: requests of the batch, of the loop, and of the comparison of sharing.
        warmup: requests of each side of that comparison that are run before and not timed.
        chunks, per_request, chunk_tokens, answer_tokens: what they consist of.
        pool_tokens, tier_tokens: of the KV pool, and those of it that chunks may have.
    """

    requests: int = 1000
    baseline: int = 100
    full: int = 300
    warmup: int = 48
    chunks: int = 2000
    per_request: int = 8
    chunk_tokens: int = 512
    answer_tokens: int = 64
    pool_tokens: int = 320_000
    tier_tokens: int = 196_608


TINY = Scale(24, 6, 12, 4, 40, 4, 48, 8, 16_384, 4096)


class NoText:
    """A tokenizer for random tokens, whose text nobody reads."""

    tokenizer_id = "random"

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return nothing."""
        return ""


def on_random_model(device: torch.device, scale: Scale, tiny: bool, parts: Sequence[str]) -> dict[str, Any]:
    """Return the rows of all parts, and what they are compared with."""
    theirs, decoder = tiny_models(device) if tiny else random_models(device)
    prompts = zipf_prompts(scale, decoder.config.vocab_size)
    result: dict[str, Any] = {"scale": dataclasses.asdict(scale), "device": str(device), "dtype": str(decoder.dtype)}
    result["ceilings"] = ceilings(device) if device.type == "cuda" else {}
    rows: list[dict[str, Any]] = []
    if "transformers" in parts:
        rows += their_rows(theirs, prompts, scale, device)
        show(rows)
    del theirs
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    engine = Engine(
        "random", decoder, NoText(), Path(), kv_tokens=scale.pool_tokens, stamp="random"  # type: ignore[arg-type]
    )  # fmt: skip
    bench = Bench(engine, scale, prompts, result["ceilings"].get("matmul_tflops", 0.0))
    if "blend" in parts:
        rows += bench.blend_rows()
        show(rows)
    if "full" in parts:
        rows += bench.full_rows()
    result["rows"] = rows
    result["ratios"] = ratios(rows)
    show(rows)
    print(result["ratios"])
    return result


def zipf_prompts(scale: Scale, vocab_size: int) -> list[Prompt]:
    """Return prompts whose chunks are drawn by popularity: the second half as often as the first, the tenth a tenth."""
    source = np.random.default_rng(0)
    popularity = 1.0 / np.arange(1, scale.chunks + 1)
    popularity /= popularity.sum()

    def segment(tokens: int, chunk_id: str | None = None) -> Segment:
        return Segment(tuple(source.integers(0, vocab_size, tokens).tolist()), chunk_id)

    chunks = [segment(scale.chunk_tokens, f"chunk-{index}") for index in range(scale.chunks)]
    prefix = segment(PREFIX_TOKENS)
    made = []
    for _ in range(scale.requests):
        drawn = source.choice(scale.chunks, scale.per_request, replace=False, p=popularity)
        made.append(Prompt((prefix, *(chunks[one] for one in drawn), segment(QUESTION_TOKENS))))
    return made


class Bench:
    """One engine, and its runs over the same prompts."""

    def __init__(self, engine: Engine, scale: Scale, prompts: Sequence[Prompt], peak_tflops: float) -> None:
        self.engine = engine
        self.scale = scale
        self.prompts = prompts
        self.peak_tflops = peak_tflops
        self.sampling = SamplingConfig(scale.answer_tokens, ignore_stop_tokens=True)

    def blend_rows(self) -> list[dict[str, Any]]:
        """Return the loop of single requests, the batch, and the batch with shared rows."""
        store, chunks = self._warm_store()
        private = BlendPrefill(store, chunks, BlendOptions(RATIO))
        shared = BlendPrefill(store, chunks, BlendOptions(RATIO, rows=BlendRows.SHARED))
        self._loop(private, self.prompts[:3])  # compiles, captures and opens what is needed
        list(self._batch(private, self.prompts[:8], BatchConfig())[0])
        rows = [self._loop_row(private)]
        rows.append(self._row("blend, batch", private, self.prompts, BatchConfig()))
        some = self.prompts[: self.scale.full]
        # The graphs of shared rows hold a field for each place: 65 MB at the 8B shape.
        few = BatchConfig(max_running=64)
        rows.append(self._row("blend, batch, private rows", private, some, few))
        rows.append(self._row("blend, batch, shared rows", shared, some, few))
        store.close()
        return rows

    def full_rows(self) -> list[dict[str, Any]]:
        """Return full prefill with sharing off, on, and on with a free order of chunks."""
        some = self.prompts[: self.scale.full]
        sides = {
            "full, sharing off": BatchConfig(sharing=False),
            "full, sharing on, chunks by relevance": BatchConfig(),
            "full, sharing on, free chunk order": BatchConfig(chunk_order=ChunkPlacement.FREE),
        }
        for config in sides.values():  # as many at once as will be: each number of them compiles and captures its own
            list(self._batch("full", some[: self.scale.warmup], config)[0])
        return [self._row(side, "full", some, config) for side, config in sides.items()]

    def _warm_store(self) -> tuple[KVStore, ChunkPrefill]:
        engine, decoder = self.engine, self.engine.decoder
        codec = make_codec("int4", decoder.layout)
        recipe = KVRecipe("0" * 64, decoder.config, "random", decoder.dtype, codec.codec_id)
        chunks = ChunkPrefill(decoder, engine.rotary, recipe, self.prompts[0].segments[0].token_ids)
        memory = MemoryTier("ram", 1 << 40, make_policy("cost"), page_locked=decoder.device.type == "cuda")
        tier = PoolTier(engine.pool, self.scale.tier_tokens // 64, make_policy("cost"))
        store = KVStore(codec, memory, pool=tier)
        used = {one.chunk_id: one for prompt in self.prompts for one in prompt.segments if one.chunk_id is not None}
        started = time.perf_counter()
        refs = [chunks.ref(one) for one in used.values()]
        for first in range(0, len(refs), 16):
            with store.fetch(refs[first : first + 16], chunks.compute):
                pass
        print(f"{len(used)} chunks computed and stored in {time.perf_counter() - started:.1f} s", flush=True)
        return store, chunks

    def _loop(self, strategy: Any, prompts: Sequence[Prompt]) -> float:
        started = time.perf_counter()
        for prompt in prompts:
            steps = list(self.engine.generate(prompt, self.sampling, strategy))
            assert len(steps) == self.scale.answer_tokens + 1
        return time.perf_counter() - started

    def _loop_row(self, strategy: Any) -> dict[str, Any]:
        some = self.prompts[: self.scale.baseline]
        seconds = self._loop(strategy, some)
        return timed_row("blend, one by one", len(some), seconds)

    def _batch(
        self, strategy: Any, prompts: Sequence[Prompt], config: BatchConfig
    ) -> tuple[list[BatchResult], BatchStats]:
        batch = BatchEngine(self.engine, config)
        requests = [BatchRequest(str(at), one, self.sampling, strategy) for at, one in enumerate(prompts)]
        results = list(batch.run(requests))
        errors = [one.error for one in results if one.error is not None]
        assert not errors, errors[0]
        assert len(results) == len(prompts)
        return results, batch.stats

    def _row(self, side: str, strategy: Any, prompts: Sequence[Prompt], config: BatchConfig) -> dict[str, Any]:
        started = time.perf_counter()
        results, stats = self._batch(strategy, prompts, config)
        seconds = time.perf_counter() - started
        assert all(one.finished and len(one.finished.token_ids) == self.scale.answer_tokens for one in results)
        assert stats.prefill_tokens_computed == stats.prefill_tokens_needed + stats.prefill_tokens_repeated
        row = timed_row(side, len(prompts), seconds) | {
            "computed": stats.prefill_tokens_computed, "needed": stats.prefill_tokens_needed,
            "held_gb": stats.kv_bytes_peak / 1e9, "listed_gb": stats.kv_bytes_listed_peak / 1e9,
            "stats": dataclasses.asdict(stats),
        }  # fmt: skip
        if self.peak_tflops:
            tokens = stats.prefill_tokens_computed + stats.decode_tokens
            row["of_peak"] = tokens * layer_flops(self.engine.decoder) / seconds / 1e12 / self.peak_tflops
        print(row, flush=True)
        return row


def their_rows(model: Any, prompts: Sequence[Prompt], scale: Scale, device: torch.device) -> list[dict[str, Any]]:
    """Return transformers' `generate` with padded batches, one batch of each size, extrapolated to all requests."""
    rows = []
    for size in HF_BATCHES[: 1 if device.type != "cuda" else None]:
        ids = [list(prompt.token_ids) for prompt in prompts[:size]]
        longest = max(len(one) for one in ids)
        padded = torch.tensor([[0] * (longest - len(one)) + one for one in ids]).to(device)
        mask = torch.tensor([[0] * (longest - len(one)) + [1] * len(one) for one in ids]).to(device)
        seconds = []
        try:
            for tokens in (2, scale.answer_tokens):  # the first warms up
                started = time.perf_counter()
                model.generate(
                    padded, attention_mask=mask, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False,
                    pad_token_id=0,
                )  # fmt: skip
                if device.type == "cuda":
                    torch.cuda.synchronize()
                seconds.append(time.perf_counter() - started)
        except torch.OutOfMemoryError:
            print(f"transformers finds no memory for a batch of {size}", flush=True)
            torch.cuda.empty_cache()
            break
        rows.append(timed_row(f"transformers generate, batches of {size} (one timed)", size, seconds[-1]))
    return rows


def layer_flops(decoder: Decoder) -> float:
    """Return the operations of a token in the matrix products of all layers, attention left out."""
    sizes = decoder.config
    heads = (2 * sizes.num_q_heads + 2 * sizes.num_kv_heads) * sizes.head_dim
    return 2.0 * sizes.num_layers * sizes.hidden_size * (heads + 3 * sizes.intermediate_size)


def timed_row(side: str, requests: int, seconds: float) -> dict[str, Any]:
    return {"side": side, "requests": requests, "seconds": seconds, "ms_per_request": seconds / requests * 1e3}


def ratios(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return how many times sooner a request is done, for the pairs that the goals name."""
    spent = {row["side"]: row["ms_per_request"] for row in rows}
    theirs = min((value for side, value in spent.items() if side.startswith("transformers")), default=None)
    pairs = {
        "batch over one by one, blend": (spent.get("blend, one by one"), spent.get("blend, batch")),
        "batch over transformers": (theirs, spent.get("blend, batch")),
        "full batch over transformers": (theirs, spent.get("full, sharing off")),
        "sharing, chunks by relevance": (
            spent.get("full, sharing off"),
            spent.get("full, sharing on, chunks by relevance"),
        ),
        "sharing, free chunk order": (spent.get("full, sharing off"), spent.get("full, sharing on, free chunk order")),
    }
    found = {name: slow / fast for name, (slow, fast) in pairs.items() if slow and fast}
    held = {row["side"]: row["held_gb"] for row in rows if "held_gb" in row}
    if "blend, batch, shared rows" in held:
        found["KV held, private over shared rows"] = (
            held["blend, batch, private rows"] / held["blend, batch, shared rows"]
        )
    return found


def show(rows: Sequence[dict[str, Any]]) -> None:
    print(markdown_table(rows, COLUMNS), flush=True)
