"""How much sooner blended prefill gives the first logits than full prefill, from every place where chunk KV can lie.

On a CPU (`--cpu`): the bundled model, a prompt of about 4,096 tokens in chunks of 256, their KV in warm memory.

    python benchmarks/blend_speed.py --cpu

Timed is everything from the chunks' ids to the first logits: finding and loading KV, choosing tokens, recomputing
them. Sides take turns within each round; figures are medians. Before anything is timed, recomputing every token is
compared with full prefill.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from prefill_decode import distance
from report import markdown_table, percentiles, write_result
from torch import Tensor

from ragkit.generation.blend_prefill import BlendOptions, BlendPrefill
from ragkit.generation.chunk_prefill import ChunkPrefill
from ragkit.generation.decoder import Decoder
from ragkit.generation.engine import Engine
from ragkit.generation.full_prefill import FullPrefill
from ragkit.generation.rotary_cache import RotaryCache
from ragkit.generation.strategy import PrefillRequest, PrefillStrategy
from ragkit.kvcache.codecs import make_codec
from ragkit.kvcache.eviction import make_policy
from ragkit.kvcache.kv_key import KVRecipe
from ragkit.kvcache.kv_store import KVStore
from ragkit.kvcache.memory_tier import MemoryTier
from ragkit.kvcache.pool import KVPool
from ragkit.kvcache.request_kv import RequestKV
from ragkit.types import Prompt, Segment

PREFIX_TOKENS, QUESTION_TOKENS = 30, 60
ROUNDS = 5
CPU_TOKENS, CPU_CHUNK = 4096, 256
CPU_RATIOS = (0.15, 0.10)
# At ratio 1 the distance from full prefill may be this many times that of full prefill in two pieces, which sums in
# another order, and this much in any case.
SHAPE_NOISE = 3.0
CLOSE = 1e-4


@dataclass(frozen=True)
class Side:
    """One row of the table: a strategy at a ratio."""

    name: str
    strategy: PrefillStrategy
    ratio: float | None = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="the bundled model on the CPU")
    parser.add_argument("--codec", default="bf16", help="how chunk KV is stored, on the CPU")
    parser.add_argument("--tokens", type=int, default=CPU_TOKENS, help="tokens of the chunks, on the CPU")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    arguments = parser.parse_args()
    with torch.inference_mode():
        rows, facts = on_cpu(arguments.codec, arguments.tokens, arguments.rounds)
    path = write_result("blend_speed_cpu", facts | {"rows": rows})
    print(markdown_table(rows, COLUMNS))
    print(f"\nraw numbers: {path}")


COLUMNS = {
    "side": "Prefill", "tokens": "Tokens", "total_ms": "First logits, ms", "load_kv_ms": "load", "select_ms": "select",
    "blend_ms": "recompute", "overlapped_ms": "overlapped", "speed_up": "times full",
}  # fmt: skip


def on_cpu(codec: str, tokens: int, rounds: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return the table of the bundled model, and the settings."""
    engine = Engine.load("smollm2-135m-instruct", device="cpu", kv_tokens=2 * tokens)
    bench = Bench(engine.decoder, 2 * tokens)
    blend = bench.blend(codec)
    prompt = bench.prompt(tokens, CPU_CHUNK)
    check = bench.check([blend], prompt)
    sides = [Side("full", FullPrefill()), *(Side(f"blend {ratio:.0%}", blend, ratio) for ratio in CPU_RATIOS)]
    rows = with_speed_up(bench.measure(sides, prompt, rounds), ("full",))
    facts = {"dtype": str(engine.decoder.dtype), "codec": codec, "chunk": CPU_CHUNK} | check
    return rows, facts


class Bench:
    """One model with a pool, and the measurements."""

    def __init__(self, decoder: Decoder, pool_tokens: int) -> None:
        self.decoder = decoder
        self.device = decoder.device
        self.rotary = RotaryCache(decoder)
        self.pool = KVPool(decoder.layout, -(-pool_tokens // 64) + 2, decoder.device)
        self.prefix = self._ids(0, PREFIX_TOKENS)

    def _ids(self, seed: int, count: int) -> tuple[int, ...]:
        generator = torch.Generator().manual_seed(seed)
        return tuple(torch.randint(0, self.decoder.config.vocab_size, (count,), generator=generator).tolist())

    def prompt(self, tokens: int, chunk: int) -> Prompt:
        """Return a prompt of random tokens: prefix, `tokens` tokens in chunks, question."""
        ids = self._ids(tokens, tokens)
        chunks = [Segment(ids[start : start + chunk], f"chunk-{start}") for start in range(0, tokens, chunk)]
        return Prompt((Segment(self.prefix), *chunks, Segment(self._ids(1, QUESTION_TOKENS))))

    def blend(self, codec: str) -> BlendPrefill:
        """Return blended prefill with a store of its own whose chunks `codec` stores in memory."""
        made = make_codec(codec, self.decoder.layout)
        recipe = KVRecipe("0" * 64, self.decoder.config, "random", self.decoder.dtype, made.codec_id)
        chunks = ChunkPrefill(self.decoder, self.rotary, recipe, self.prefix)
        memory = MemoryTier("ram", 1 << 40, make_policy("cost"), page_locked=self.device.type == "cuda")
        return BlendPrefill(KVStore(made, memory), chunks, BlendOptions())

    def run(self, side: Side, prompt: Prompt) -> tuple[Tensor, dict[str, float]]:
        """Return the first logits, and the milliseconds of each step with their `total`."""
        gc.collect()
        self._wait()
        started = time.perf_counter()
        with RequestKV(self.pool) as kv:
            rotary = self.rotary.table(len(prompt), len(prompt))
            result = side.strategy.prefill(self.decoder, PrefillRequest(prompt, kv, rotary, side.ratio))
            self._wait()
            total = (time.perf_counter() - started) * 1e3
        return result.logits, dict(result.timings_ms) | {"total": total}

    def check(self, blends: Sequence[BlendPrefill], prompt: Prompt) -> dict[str, float]:
        """Return distances from full prefill's logits: of full prefill in pieces, and of recomputing everything."""
        full, _ = self.run(Side("full", FullPrefill()), prompt)
        pieces, _ = self.run(Side("pieces", FullPrefill(piece_tokens=len(prompt) // 2)), prompt)
        noise = distance(pieces, full)
        gap = max(distance(self.run(Side("blend", blend, 1.0), prompt)[0], full) for blend in blends)
        assert gap <= max(CLOSE, SHAPE_NOISE * noise), (
            f"recomputing everything is {gap} from full prefill, {noise} is noise"
        )
        return {"shape_noise": noise, "gap_at_ratio_1": gap}

    def measure(self, sides: Sequence[Side], prompt: Prompt, rounds: int) -> list[dict[str, Any]]:
        """Return a row a side: medians over `rounds` rounds in turns, after one that warms up."""
        samples: dict[str, list[dict[str, float]]] = {side.name: [] for side in sides}
        for turn in range(rounds + 1):
            shift = turn % len(sides)
            for side in [*sides[shift:], *sides[:shift]]:
                _, spent = self.run(side, prompt)
                if turn:
                    samples[side.name].append(spent)
        return [row_of(name, len(prompt), spent) for name, spent in samples.items()]

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def row_of(name: str, tokens: int, samples: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Return one row: the median of every step."""
    steps = {step: [sample[step] for sample in samples] for step in samples[0]}
    medians = {f"{step}_ms": statistics.median(values) for step, values in steps.items()}
    return {"side": name, "tokens": tokens, **medians, "percentiles": percentiles(steps["total"])}


def with_speed_up(rows: list[dict[str, Any]], full: Sequence[str]) -> list[dict[str, Any]]:
    """Return `rows` with how many times sooner each is than the fastest of the sides `full`."""
    reference = min(row["total_ms"] for row in rows if row["side"] in full)
    return [row | {"speed_up": reference / row["total_ms"]} for row in rows]


if __name__ == "__main__":
    main()
