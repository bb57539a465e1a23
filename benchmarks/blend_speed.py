"""How much sooner blended prefill gives the first logits than full prefill, from every place where chunk KV can lie.

On a GPU: the shape of Llama 3 8B in bf16 with random weights, prompts of 16,384 and 32,768 tokens in chunks of 512 and
a question of 60. Full prefill is that of transformers (SDPA) and ours; blends take their chunks from page-locked memory
in several codecs, or from GPU memory.

    python benchmarks/blend_speed.py
    python benchmarks/blend_speed.py --device cpu --tiny    # the same with a tiny model, to try the script
    python benchmarks/blend_speed.py --profile 32768        # what one blend launches and how long the GPU is busy

On a CPU (`--cpu`): the bundled model, a prompt of about 4,096 tokens in chunks of 256, their KV in warm memory.

    python benchmarks/blend_speed.py --cpu

Timed is everything from the chunks' ids to the first logits: finding and loading KV, choosing tokens, recomputing
them. `load` is the time until the last chunk's KV is there, `overlapped` the part of it spent below the other steps.
Sides take turns within each round; figures are medians. Before anything is timed, recomputing every token is compared
with full prefill, and the answers from all places with one another. `private_kv_bytes` of a row is what the request
alone holds of KV: of shared rows, those that it recomputes, and its field.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from prefill_decode import SHAPE_8B, best, ceilings, distance, ours_of, random_models
from report import markdown_table, percentiles, write_result
from torch import Tensor

from ragkit.config import BlendRows
from ragkit.generation.blend_prefill import BlendOptions, BlendPrefill
from ragkit.generation.chunk_prefill import ChunkPrefill
from ragkit.generation.decoder import Decoder
from ragkit.generation.engine import Engine
from ragkit.generation.full_prefill import FullPrefill
from ragkit.generation.rotary_cache import RotaryCache
from ragkit.generation.strategy import PrefillRequest, PrefillResult, PrefillStrategy
from ragkit.kvcache.codecs import make_codec
from ragkit.kvcache.eviction import make_policy
from ragkit.kvcache.kv_key import KVRecipe
from ragkit.kvcache.kv_store import KVStore
from ragkit.kvcache.memory_tier import MemoryTier
from ragkit.kvcache.pool import KVPool
from ragkit.kvcache.pool_tier import PoolTier
from ragkit.kvcache.request_kv import RequestKV
from ragkit.types import Prompt, Segment

PREFIX_TOKENS, QUESTION_TOKENS = 30, 60
ROUNDS = 5
GPU_LENGTHS, GPU_CHUNK, GPU_CHECK = (16384, 32768), 512, 2048
TINY_LENGTHS, TINY_CHUNK, TINY_CHECK = (512, 1024), 64, 256
CPU_TOKENS, CPU_CHUNK = 4096, 256
CPU_RATIOS = (0.15, 0.10)
RATIO, LOW_RATIO = 0.15, 0.05
HOST_CODECS = ("bf16", "int8", "int4", "int4+bf16", "int4+int8")
POOL_CODECS = ("bf16",)
LOW_CODECS = ("int8", "int4+int8")
# At ratio 1 the distance from full prefill may be this many times that of full prefill in two pieces, which sums in
# another order, and this much in any case.
SHAPE_NOISE = 3.0
CLOSE = 1e-4

Steps = dict[str, float]
COLUMNS = {
    "side": "Prefill", "tokens": "Tokens", "total_ms": "First logits, ms", "load_kv_ms": "load", "select_ms": "select",
    "blend_ms": "recompute", "overlapped_ms": "overlapped", "speed_up": "times full",
}  # fmt: skip


@dataclass(frozen=True)
class Side:
    """One row of the table: what gives the first logits of a prompt."""

    name: str
    run: Callable[[Prompt], tuple[Tensor, Steps]]
    is_full: bool = False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="the bundled model on the CPU")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="of the random model")
    parser.add_argument("--tiny", action="store_true", help="a tiny random model and short prompts; nothing is written")
    parser.add_argument("--lengths", type=int, nargs="*", help="tokens of the chunks")
    parser.add_argument("--codec", default="bf16", help="how chunk KV is stored, with --cpu")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--profile", type=int, metavar="TOKENS", help="profile one blend of every place instead")
    arguments = parser.parse_args()
    with torch.inference_mode():
        if arguments.cpu:
            name, result = "blend_speed_cpu", on_cpu(arguments.codec, arguments.lengths, arguments.rounds)
        else:
            bench = RandomBench(torch.device(arguments.device), arguments.tiny, arguments.lengths or [])
            if arguments.profile:
                bench.profile(arguments.profile)
                return
            name, result = "blend_speed_gpu", bench.result(arguments.rounds)
    print(markdown_table(result["rows"], COLUMNS))
    if not arguments.tiny:
        print(f"\nraw numbers: {write_result(name, result)}")


def on_cpu(codec: str, lengths: Sequence[int] | None, rounds: int) -> dict[str, Any]:
    """Return the table of the bundled model, and the settings."""
    tokens = lengths[0] if lengths else CPU_TOKENS
    engine = Engine.load("smollm2-135m-instruct", device="cpu", kv_tokens=2 * tokens)
    bench = Bench(engine.decoder, 2 * tokens)
    blend = bench.blend(codec)
    prompt = bench.prompt(tokens, CPU_CHUNK)
    check = bench.check_ratio_1([blend], prompt)
    sides = [bench.full(), *(bench.side(f"blend {ratio:.0%}", blend, ratio) for ratio in CPU_RATIOS)]
    facts = {"dtype": str(engine.decoder.dtype), "codec": codec, "chunk": CPU_CHUNK, "check": check}
    return facts | {"rows": bench.measure(sides, prompt, rounds)}


class Bench:
    """One model with a pool, and the measurements."""

    def __init__(self, decoder: Decoder, pool_tokens: int) -> None:
        self.decoder = decoder
        self.device = decoder.device
        self.rotary = RotaryCache(decoder)
        self.pool = KVPool(decoder.layout, -(-pool_tokens // 64) + 2, decoder.device)
        self.prefix = self._ids(0, PREFIX_TOKENS)
        self.private_bytes = 0  # that the last request held

    def _ids(self, seed: int, count: int) -> tuple[int, ...]:
        generator = torch.Generator().manual_seed(seed)
        return tuple(torch.randint(0, self.decoder.config.vocab_size, (count,), generator=generator).tolist())

    def prompt(self, tokens: int, chunk: int) -> Prompt:
        """Return a prompt of random tokens: prefix, `tokens` tokens in chunks, question."""
        ids = self._ids(tokens, tokens)
        chunks = [Segment(ids[start : start + chunk], f"chunk-{start}") for start in range(0, tokens, chunk)]
        return Prompt((Segment(self.prefix), *chunks, Segment(self._ids(1, QUESTION_TOKENS))))

    def blend(self, codec: str, pooled_tokens: int = 0) -> BlendPrefill:
        """Return blended prefill with a store of its own, whose chunks lie in memory, or in the pool as well."""
        made = make_codec(codec, self.decoder.layout)
        recipe = KVRecipe("0" * 64, self.decoder.config, "random", self.decoder.dtype, made.codec_id)
        chunks = ChunkPrefill(self.decoder, self.rotary, recipe, self.prefix)
        memory = MemoryTier("ram", 1 << 40, make_policy("cost"), page_locked=self.device.type == "cuda")
        tier = PoolTier(self.pool, pooled_tokens // 64, make_policy("cost")) if pooled_tokens else None
        return BlendPrefill(KVStore(made, memory, pool=tier), chunks, BlendOptions())

    def full(self) -> Side:
        """Return our full prefill."""
        return Side("ragkit full", partial(self.run, FullPrefill(), None), is_full=True)

    def side(self, name: str, blend: BlendPrefill, ratio: float) -> Side:
        """Return blended prefill at a ratio."""
        return Side(name, partial(self.run, blend, ratio))

    def prefill(self, strategy: PrefillStrategy, ratio: float | None, prompt: Prompt) -> tuple[PrefillResult, float]:
        """Return what a strategy gives and its milliseconds, the device idle before and after."""
        gc.collect()
        self.wait()
        started = time.perf_counter()
        with RequestKV(self.pool) as kv:
            rotary = self.rotary.table(len(prompt), len(prompt))
            result = strategy.prefill(self.decoder, PrefillRequest(prompt, kv, rotary, ratio))
            self.wait()
            spent = (time.perf_counter() - started) * 1e3
            self.private_bytes = kv.private_bytes
        assert not result.warnings, result.warnings
        return result, spent

    def run(self, strategy: PrefillStrategy, ratio: float | None, prompt: Prompt) -> tuple[Tensor, Steps]:
        """Return the first logits, and the milliseconds of each step with their `total`."""
        result, spent = self.prefill(strategy, ratio, prompt)
        return result.logits, dict(result.timings_ms) | {"total": spent}

    def check_ratio_1(self, blends: Sequence[BlendPrefill], prompt: Prompt) -> dict[str, float]:
        """Return distances from full prefill's logits: of full prefill in pieces, and of recomputing everything."""
        full, _ = self.run(FullPrefill(), None, prompt)
        pieces, _ = self.run(FullPrefill(piece_tokens=len(prompt) // 2), None, prompt)
        noise = distance(pieces, full)
        gap = max(distance(self.run(blend, 1.0, prompt)[0], full) for blend in blends)
        assert gap <= max(CLOSE, SHAPE_NOISE * noise), f"recomputing all is {gap} from full prefill, noise is {noise}"
        return {"shape_noise": noise, "gap_at_ratio_1": gap}

    def measure(self, sides: Sequence[Side], prompt: Prompt, rounds: int) -> list[dict[str, Any]]:
        """Return a row a side: medians over `rounds` rounds in turns, after one that warms up."""
        samples: dict[str, list[Steps]] = {side.name: [] for side in sides}
        held = dict.fromkeys(samples, 0)
        for turn in range(rounds + 1):
            shift = turn % len(sides)
            for side in [*sides[shift:], *sides[:shift]]:
                self.private_bytes = 0
                _, spent = side.run(prompt)
                held[side.name] = self.private_bytes
                if turn:
                    samples[side.name].append(spent)
        rows = [row_of(name, len(prompt), spent) | {"private_kv_bytes": held[name]} for name, spent in samples.items()]
        fastest = min(row["total_ms"] for row, side in zip(rows, sides, strict=True) if side.is_full)
        return [row | {"speed_up": fastest / row["total_ms"]} for row in rows]

    def wait(self) -> None:
        """Return once the device is idle."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class RandomBench(Bench):
    """A random model, transformers' and ours with equal weights, and every place where chunk KV can lie."""

    def __init__(self, device: torch.device, tiny: bool, lengths: Sequence[int]) -> None:
        self.lengths = tuple(lengths) or (TINY_LENGTHS if tiny else GPU_LENGTHS)
        self.chunk, self.check_tokens = (TINY_CHUNK, TINY_CHECK) if tiny else (GPU_CHUNK, GPU_CHECK)
        self.theirs, ours = tiny_models(device) if tiny else random_models(device)
        # The request's rows, and for each codec in GPU memory those of the chunks.
        pool_tokens = (1 + len(POOL_CODECS)) * (max(self.lengths) + self.chunk) + 64 * (PREFIX_TOKENS + QUESTION_TOKENS)
        super().__init__(ours, pool_tokens)
        self._pooled: list[BlendPrefill] = []
        self.hosted = {codec: self.blend(codec) for codec in dict.fromkeys((*HOST_CODECS, *LOW_CODECS))}

    def result(self, rounds: int) -> dict[str, Any]:
        """Return everything that is measured."""
        on_gpu = self.device.type == "cuda"
        result: dict[str, Any] = {"dtype": str(self.decoder.dtype), "device": str(self.device), "chunk": self.chunk}
        result["check"] = self.check()
        print(result["check"], flush=True)
        if on_gpu:
            result["ceilings"] = ceilings(self.device) | {"host_to_device_gb_per_s": host_rate(self.device)}
            print(result["ceilings"], flush=True)
        result["rows"] = []
        for length in self.lengths:
            rows = self.measure(self.sides(length), self.prompt(length, self.chunk), rounds)
            print(markdown_table(rows, COLUMNS), flush=True)
            result["rows"] += rows
        return result

    def check(self) -> dict[str, Any]:
        """Return how far recomputing everything is from full prefill, and the answers of all places from each other."""
        prompt = self.prompt(self.check_tokens, self.chunk)
        found = self.check_ratio_1([self.hosted["bf16"], self.hosted["int4"]], prompt)
        gaps = {}
        for codec in POOL_CODECS:
            blend = self.pooled(codec, prompt)
            computed = self.run(self.blend(codec), RATIO, prompt)[0]
            hosted, pooled = (self.run(one, RATIO, prompt)[0] for one in (self.hosted[codec], blend))
            gaps[codec] = max(distance(hosted, computed), distance(pooled, computed))
            assert gaps[codec] <= CLOSE, f"{codec}: answers from different places differ by {gaps[codec]}"
            self.check_ratio_1([self.shared(blend)], prompt)
            blend.kv_store.close()
        return found | {"gap_between_places": gaps}

    def sides(self, tokens: int) -> list[Side]:
        """Return the rows of one length."""
        prompt = self.prompt(tokens, self.chunk)
        sides = [Side("transformers SDPA full", self.their_run, is_full=True), self.full()]
        sides += [self.side(f"blend {RATIO:.0%}, {codec} in RAM", self.hosted[codec], RATIO) for codec in HOST_CODECS]
        self._release_pool()
        self._pooled = [self.pooled(codec, prompt) for codec in POOL_CODECS]
        sides += [
            self.side(f"blend {RATIO:.0%}, {codec} in GPU memory", blend, RATIO)
            for codec, blend in zip(POOL_CODECS, self._pooled, strict=True)
        ]
        sides += [
            self.side(f"blend {RATIO:.0%}, {codec} in GPU memory, shared rows", self.shared(blend), RATIO)
            for codec, blend in zip(POOL_CODECS, self._pooled, strict=True)
        ]
        sides += [
            self.side(f"blend {LOW_RATIO:.0%}, {codec} in RAM", self.hosted[codec], LOW_RATIO) for codec in LOW_CODECS
        ]
        return sides

    def pooled(self, codec: str, prompt: Prompt) -> BlendPrefill:
        """Return blended prefill whose store has the chunks of `prompt` in the pool."""
        tokens = sum(len(segment.token_ids) for segment in prompt.segments if segment.chunk_id is not None)
        blend = self.blend(codec, pooled_tokens=tokens)
        result, _ = self.prefill(blend, RATIO, prompt)
        assert result.afterwards is not None
        result.afterwards()
        result, _ = self.prefill(blend, RATIO, prompt)
        assert set(result.kv.bytes_by_tier) == {"gpu"}, f"chunks are not in the pool: {result.kv}"
        return blend

    def shared(self, pooled: BlendPrefill) -> BlendPrefill:
        """Return blended prefill over the same chunks that lists them where they lie."""
        return BlendPrefill(pooled.kv_store, pooled.chunks, replace(pooled.options, rows=BlendRows.SHARED))

    def _release_pool(self) -> None:
        for blend in self._pooled:
            blend.kv_store.close()
        self._pooled = []

    def their_run(self, prompt: Prompt) -> tuple[Tensor, Steps]:
        """Return transformers' first logits, and its milliseconds."""
        gc.collect()
        self.wait()
        started = time.perf_counter()
        tokens = torch.tensor(prompt.token_ids).to(self.device)
        logits: Tensor = self.theirs(tokens.unsqueeze(0), use_cache=True, logits_to_keep=1).logits[0, -1]
        self.wait()
        return logits, {"total": (time.perf_counter() - started) * 1e3}

    def profile(self, tokens: int) -> None:
        """Print what a blend launches: from memory without and with a draft, and from the pool."""
        from torch.profiler import ProfilerActivity, profile

        prompt = self.prompt(tokens, self.chunk)
        blends = {codec: self.hosted[codec] for codec in ("bf16", "int4+bf16")} | {"pool": self.pooled("bf16", prompt)}
        for name, blend in blends.items():
            for _ in range(2):
                self.prefill(blend, RATIO, prompt)
            with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
                result, spent = self.prefill(blend, RATIO, prompt)
            print(f"\n{name}: {spent:.1f} ms, {dict(result.timings_ms)}")
            order = "self_cuda_time_total" if self.device.type == "cuda" else "self_cpu_time_total"
            print(profiled.key_averages().table(sort_by=order, row_limit=30, max_name_column_width=60))


def tiny_models(device: torch.device) -> tuple[Any, Decoder]:
    """Return transformers' Llama with a tiny shape and random weights, and ours with the same."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 1000, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 6,
             "num_attention_heads": 8, "num_key_value_heads": 2}  # fmt: skip
    torch.manual_seed(0)
    theirs = LlamaForCausalLM._from_config(LlamaConfig(**{**SHAPE_8B, **sizes}), attn_implementation="sdpa")
    theirs = theirs.eval().to(device)
    return theirs, ours_of(theirs, torch.float32)


def host_rate(device: torch.device) -> float:
    """Return GB/s of a copy from page-locked memory."""
    source = torch.empty(1 << 30, dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(source, device=device)
    return (1 << 30) / best(lambda: target.copy_(source, non_blocking=True), device) / 1e6


def row_of(name: str, tokens: int, samples: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Return one row: the median of every step."""
    steps = {step: [sample[step] for sample in samples] for step in samples[0]}
    medians = {f"{step}_ms": statistics.median(values) for step, values in steps.items()}
    return {"side": name, "tokens": tokens, **medians, "percentiles": percentiles(steps["total"])}


if __name__ == "__main__":
    main()
