"""How much sooner a batch is answered than its requests one by one, and what sharing saves.

On a GPU: the shape of Llama 3 8B in bf16 with random weights; 1,000 requests of 8 chunks of 512 tokens, drawn like
Zipf (s = 1) from 2,000 chunks, 64 tokens of answer each. Chunk KV lies in page-locked memory as int4 (34 GB; in bf16 it
would be 134 GB), and in the KV pool as far as the tier there has room.

    python benchmarks/batch_speed.py                            # all of (a): blend, full, transformers
    python benchmarks/batch_speed.py --parts blend              # or blend, full, transformers alone
    python benchmarks/batch_speed.py --tiny --device cpu        # the same with a tiny model, to try the script

`blend` compares the batch with `Engine.generate` in a loop over the first 100 requests, and private with shared rows.
`full` compares sharing off, on, and on with a free order of chunks, on the first 300 requests. `transformers` is
`generate` with left-padded batches of several sizes, each timed on one batch and extrapolated to all requests.

On a CPU: the bundled model answers 60 questions over examples/collection, 64 tokens forced, by `Pipeline.query` in a
loop and by `Pipeline.query_many`; where tokens differ, the two best logits there are compared with the noise of shapes.

    python benchmarks/batch_speed.py --cpu
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from blend_speed import tiny_models
from prefill_decode import ceilings, random_models
from report import markdown_table, write_result

from ragkit import Pipeline, PipelineConfig
from ragkit.config import AnswerConfig, BatchConfig, BlendRows, ChunkPlacement, GenerationConfig
from ragkit.generation.batch_engine import BatchEngine
from ragkit.generation.batch_request import BatchRequest, BatchResult
from ragkit.generation.batch_stats import BatchStats
from ragkit.generation.blend_prefill import BlendOptions, BlendPrefill
from ragkit.generation.chunk_prefill import ChunkPrefill
from ragkit.generation.decoder import Decoder
from ragkit.generation.engine import Engine
from ragkit.generation.sampling import SamplingConfig
from ragkit.generation.steps import Finished
from ragkit.kvcache.codecs import make_codec
from ragkit.kvcache.eviction import make_policy
from ragkit.kvcache.kv_key import KVRecipe
from ragkit.kvcache.kv_store import KVStore
from ragkit.kvcache.memory_tier import MemoryTier
from ragkit.kvcache.pool_tier import PoolTier
from ragkit.types import Prompt, Segment

PREFIX_TOKENS, QUESTION_TOKENS = 30, 60
HF_BATCHES = (8, 16, 32)
RATIO = 0.15
QUESTIONS = Path(__file__).with_name("collection_questions.txt")
COLLECTION = Path(__file__).resolve().parent.parent / "examples" / "collection"
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
        chunks, per_request, chunk_tokens, answer_tokens: what they consist of.
        pool_tokens, tier_tokens: of the KV pool, and those of it that chunks may have.
    """

    requests: int = 1000
    baseline: int = 100
    full: int = 300
    chunks: int = 2000
    per_request: int = 8
    chunk_tokens: int = 512
    answer_tokens: int = 64
    pool_tokens: int = 320_000
    tier_tokens: int = 196_608


TINY = Scale(24, 6, 12, 40, 4, 48, 8, 16_384, 4096)


class NoText:
    """A tokenizer for random tokens, whose text nobody reads."""

    tokenizer_id = "random"

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return nothing."""
        return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="the bundled model over the collection of the examples")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="of the random model")
    parser.add_argument("--tiny", action="store_true", help="a tiny random model; nothing is written")
    parser.add_argument("--parts", nargs="*", default=["transformers", "blend", "full"], help="of the random model")
    parser.add_argument("--requests", type=int, help="of the batch")
    parser.add_argument("--full-requests", type=int, help="of the comparison of sharing")
    parser.add_argument("--questions", type=int, default=60, help="with --cpu")
    parser.add_argument("--rounds", type=int, default=1, help="with --cpu")
    arguments = parser.parse_args()
    if arguments.cpu:
        result = on_collection(arguments.questions, arguments.rounds)
        print(f"\nraw numbers: {write_result('batch_speed_cpu', result)}")
        return
    scale = TINY if arguments.tiny else Scale()
    scale = dataclasses.replace(
        scale, requests=arguments.requests or scale.requests, full=arguments.full_requests or scale.full
    )
    with torch.inference_mode():
        result = on_random_model(torch.device(arguments.device), scale, arguments.tiny, arguments.parts)
    if not arguments.tiny:
        print(f"\nraw numbers: {write_result('batch_speed_' + '_'.join(sorted(arguments.parts)), result)}")


# ------------------------------------------------------------------------------------------------ random model


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
        list(self._batch("full", some[:4], BatchConfig())[0])
        free = BatchConfig(chunk_order=ChunkPlacement.FREE)
        return [
            self._row("full, sharing off", "full", some, BatchConfig(sharing=False)),
            self._row("full, sharing on, chunks by relevance", "full", some, BatchConfig()),
            self._row("full, sharing on, free chunk order", "full", some, free),
        ]

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


# ------------------------------------------------------------------------------------------------ collection


def on_collection(count: int, rounds: int) -> dict[str, Any]:
    """Return both ways over the collection, in turns, and whether their tokens agree."""
    questions = QUESTIONS.read_text(encoding="utf-8").splitlines()[:count]
    config = PipelineConfig(generation=GenerationConfig(max_new_tokens=64), answers=AnswerConfig(found_threshold=0.0))
    with tempfile.TemporaryDirectory() as folder, Pipeline.open(Path(folder) / "store", config) as pipeline:
        pipeline.ingest([COLLECTION])
        engine = pipeline.parts.engine
        # Every answer has all of its tokens, whatever the model says.
        engine.decoder.config = dataclasses.replace(engine.decoder.config, stop_token_ids=())
        pipeline.query(questions[0])
        list(pipeline.query_many(questions[:2]))
        spent: dict[str, list[float]] = {"loop": [], "batch": []}
        for _ in range(rounds):
            started = time.perf_counter()
            loop = [pipeline.query(question) for question in questions]
            spent["loop"].append(time.perf_counter() - started)
            started = time.perf_counter()
            batch = list(pipeline.query_many(questions))
            spent["batch"].append(time.perf_counter() - started)
            print({side: f"{values[-1]:.1f} s" for side, values in spent.items()}, flush=True)
        answers = [one.answer for one in batch]
        assert all(one is not None and one.tokens.generated == 64 for one in [*answers, *loop])
        equal = sum(one is not None and one.text == other.text for one, other in zip(answers, loop, strict=True))
        rows = [
            {"side": "Pipeline.query in a loop", **mean_times(spent["loop"], len(questions))},
            {"side": "Pipeline.query_many", **mean_times(spent["batch"], len(questions))},
        ]
        agreement = token_agreement(pipeline, questions)
    speed_up = min(spent["loop"]) / min(spent["batch"])
    print(markdown_table(rows, {"side": "Side", "seconds": "Seconds", "ms_per_question": "ms a question"}))
    print(f"{speed_up:.2f} times, {equal} of {len(questions)} answers equal, {agreement}")
    return {
        "questions": len(questions), "rows": rows, "samples": spent, "speed_up": speed_up, "equal_answers": equal,
        "agreement": agreement,
    }  # fmt: skip


def mean_times(seconds: Sequence[float], questions: int) -> dict[str, float]:
    return {"seconds": min(seconds), "ms_per_question": min(seconds) / questions * 1e3}


@torch.inference_mode()
def token_agreement(pipeline: Pipeline, questions: Sequence[str]) -> dict[str, Any]:
    """Return how many answers have equal tokens, and for the others the gap of the two best logits where they part.

    The noise of shapes is how far logits of one prompt move when it is computed in two pieces instead of one.
    """
    engine, builder = pipeline.parts.engine, pipeline.parts.engine.prompt_builder()
    sampling = SamplingConfig(64, ignore_stop_tokens=True)
    prompts = []
    for question in questions:
        found = pipeline.parts.retriever.retrieve(question, 8)
        chunks = [one.stored.chunk for one in found.chunks]
        prompts.append(builder.build(question, chunks, max_new_tokens=64).prompt)
    requests = [BatchRequest(str(at), prompt, sampling) for at, prompt in enumerate(prompts)]
    results = {int(one.request_id): one for one in BatchEngine(engine).run(requests)}
    noise, gaps = [], []
    for at, prompt in enumerate(prompts):
        alone = list(engine.generate(prompt, sampling))[-1]
        finished = results[at].finished
        assert isinstance(alone, Finished)
        assert finished is not None
        if alone.token_ids == finished.token_ids:
            continue
        same = next(i for i, (a, b) in enumerate(zip(alone.token_ids, finished.token_ids, strict=True)) if a != b)
        ids = [*prompt.token_ids, *alone.token_ids[:same]]
        whole = engine.forward(ids).logits.float()
        half = len(ids) // 2
        pieces = engine.forward(ids[half:], engine.forward(ids[:half]).kv).logits.float()
        noise.append(float((whole - pieces).abs().max()))
        best = whole.topk(2).values
        gaps.append(float(best[0] - best[1]))
    within = sum(gap <= 2 * one for gap, one in zip(gaps, noise, strict=True))
    return {
        "requests": len(prompts), "equal": len(prompts) - len(gaps), "gaps": gaps, "shape_noise": noise,
        "differing_within_noise": within,
    }  # fmt: skip


if __name__ == "__main__":
    main()
