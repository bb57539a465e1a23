"""What every KV codec costs in bytes and in answers, with real weights and under blending.

    RAGKIT_DATA=... python benchmarks/codec_quality.py [--model NAME] [--items all|even|odd|N] [--codecs NAME,...]
        [--dtype T] [--device D] [--processes N] [--time-limit SECONDS] [--name RESULT]

MuSiQue questions of ten passages, as benchmarks/blend_quality.py words them. The KV of each passage is computed once
behind the prefix and passes through each codec. Then the question is prefilled in two ways: `reuse`, with nothing
recomputed, and `blend`, with the default selector, propagation and ratio. All follow the same tokens, the 16 of full
prefill's greedy answer. What the codec costs is the KL from the same way with bf16 KV, of the first answer token and
as the mean over the 16; the KL from full prefill stands beside it. Bytes are those of the encoded chunks.

KL grows with the square of the error, and a bit less a number doubles the error: so `int4 / this` compares sizes at
equal KL. The bits a number that this codec needs for int4's KL are its own + log2(KL / int4's KL) / 2; the ratio is
that of int4's bits to them, with the 95% interval of a bootstrap over items, drawn in pairs. The KL for it is the mean
over the 16 tokens. The errors by layer are root mean squares over all items, relative to the spread of the numbers
around each channel's mean.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from blend_quality import Bench, chosen_items
from parts import add_part_options, dealt, measured_rows
from report import data_folder, markdown_table, write_result

from ragkit.bench.answer_distance import AnswerScorer, PrefillOutcome, distance_between
from ragkit.bench.blend_quality import NO_PROPAGATION
from ragkit.bench.musique import musique_items
from ragkit.generation.blend_prefill import BlendOptions, BlendPrefill
from ragkit.generation.chunk_prefill import ChunkPrefill
from ragkit.generation.decoder import Decoder
from ragkit.generation.engine import Engine
from ragkit.generation.full_prefill import FullPrefill
from ragkit.generation.rotary_cache import RotaryCache
from ragkit.kvcache.chunk_kv import ChunkKV, ChunkRef, EncodedKV
from ragkit.kvcache.codec import decode_chunk
from ragkit.kvcache.codecs import make_codec
from ragkit.kvcache.eviction import make_policy
from ragkit.kvcache.kv_key import ContextKind, KVRecipe
from ragkit.kvcache.kv_store import KVStore
from ragkit.kvcache.memory_tier import MemoryTier
from ragkit.kvcache.selectors_static import NoTokens
from ragkit.types import Prompt

CODECS = ("bf16", "int8", "int4", "int4+bf16", "int4+int8", "entropy1", "entropy2", "entropy3")
BASE, REFERENCE = "bf16", "int4"
PATHS = {"reuse": BlendOptions(0.0, NoTokens(), NO_PROPAGATION), "blend": BlendOptions()}
RESAMPLES = 2000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="a name, folder or .gguf file")
    parser.add_argument("--items", default="all", help="all, even, odd, or a number of items")
    parser.add_argument("--codecs", default=",".join(CODECS))
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="auto")
    add_part_options(parser)
    parser.add_argument("--name", default="codec_quality", help="name of the result")
    arguments = parser.parse_args()
    rows = measured_rows(__file__, arguments, measure)
    if rows is None:
        return
    table = summary(rows)
    print(markdown_table(table, list(table[0])))
    limit = arguments.time_limit if math.isfinite(arguments.time_limit) else None
    payload = {
        "settings": vars(arguments) | {"time_limit": limit, "model": Path(arguments.model).name},
        "table": table,
        "errors_by_layer": layer_errors(rows),
        "items": [{key: part for key, part in row.items() if key != "errors"} for row in rows],
    }
    print("raw numbers:", write_result(arguments.name, payload))


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Return one row an item of this process's part."""
    folder = data_folder("musique")
    if folder is None:
        sys.exit("set RAGKIT_DATA to the folder of the benchmark data")
    engine = Engine.load(arguments.model, device=arguments.device, dtype=arguments.dtype, kv_tokens=2 * 9000)
    bench = CodecBench(engine, [BASE, *(name for name in arguments.codecs.split(",") if name != BASE)])
    rows: list[dict[str, Any]] = []
    started = time.perf_counter()
    for item in dealt(chosen_items(musique_items(folder), arguments.items), arguments.part):
        prompt = bench.prompts.prompt(item)
        if len(prompt) + 64 <= engine.max_context:
            rows.append({"index": item.index, **bench.score(prompt)})
            print(f"{len(rows)} items, {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
        if time.perf_counter() - started > arguments.time_limit:
            break
    return rows


class KeptChunks(ChunkPrefill):
    """Chunk KV that was computed once for all codecs."""

    def __init__(self, chunks: Sequence[ChunkKV], setting: tuple[Any, ...]) -> None:
        super().__init__(*setting)
        self._kept = {chunk.token_ids: chunk for chunk in chunks}

    def compute(self, refs: Sequence[ChunkRef]) -> list[ChunkKV]:
        """Return the KV of `refs` as it was computed before."""
        return [replace(self._kept[ref.token_ids], key=ref.key) for ref in refs]


class CodecBench:
    """One model with several codecs, one item at a time."""

    def __init__(self, engine: Engine, codecs: Sequence[str]) -> None:
        self.engine = engine
        self.prompts = Bench(engine, BASE, ContextKind.PREFIX)
        self.scorer = AnswerScorer(engine.decoder, engine.rotary, engine.pool)
        self.codecs = {name: make_codec(name, engine.decoder.layout) for name in codecs}

    @torch.inference_mode()
    def score(self, prompt: Prompt) -> dict[str, Any]:
        """Return an item's tokens, what is found with each codec, and the squares of errors and numbers by layer."""
        computed = ChunkPrefill(*self._setting(BASE))
        chunks = computed.compute(
            [computed.ref(segment) for segment in prompt.segments if segment.chunk_id is not None]
        )
        full = self.scorer.outcome(FullPrefill(), prompt)
        found: dict[str, Any] = {"tokens": sum(chunk.num_tokens for chunk in chunks), "codecs": {}, "errors": {}}
        base: dict[str, PrefillOutcome] = {}
        for name, codec in self.codecs.items():
            kept = KeptChunks(chunks, self._setting(name))
            scores: dict[str, Any] = {}
            with KVStore(codec, MemoryTier("ram", 8 << 30, make_policy("lru"), self.engine.decoder.device)) as store:
                for path, options in PATHS.items():
                    outcome = self.scorer.outcome(BlendPrefill(store, kept, options), prompt, (), full.answer)
                    own = distance_between(outcome, base.setdefault(path, outcome))
                    whole = distance_between(outcome, full)
                    scores[path] = {
                        "kl_first": own.kl_first,
                        "kl_mean": own.kl_mean,
                        "full_kl_first": whole.kl_first,
                        "full_kl_mean": whole.kl_mean,
                        "same_first": whole.same_first,
                    }
                refs = [kept.ref(segment) for segment in prompt.segments if segment.chunk_id is not None]
                with store.fetch(refs, kept.compute) as fetched:
                    encoded = [one for one in fetched.chunks if isinstance(one, EncodedKV)]
                    scores["bytes"] = sum(one.nbytes for one in encoded)
                    decoded = [decode_chunk(codec, one) for one in encoded]
            found["errors"][name] = _squares(chunks, decoded)
            found["codecs"][name] = scores
        found["errors"]["numbers"] = _squares(chunks, None)
        return found

    def _setting(self, codec: str) -> tuple[Decoder, RotaryCache, KVRecipe, Sequence[int], ContextKind]:
        engine = self.engine
        recipe = KVRecipe("0" * 64, engine.decoder.config, "benchmark", engine.decoder.dtype, codec)
        return engine.decoder, engine.rotary, recipe, self.prompts.prefix.token_ids, ContextKind.PREFIX


def summary(items: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return one row a codec and path, with 95% intervals of a bootstrap over items."""
    draws = np.random.default_rng(0).integers(0, len(items), (RESAMPLES, len(items)))
    draws = np.concatenate((np.arange(len(items))[None], draws))  # the items themselves first
    sizes = np.array([item["tokens"] for item in items])[draws].sum(1)
    names = list(items[0]["codecs"])

    def mean(name: str, path: str, key: str) -> np.ndarray:
        return np.array([item["codecs"][name][path][key] for item in items])[draws].mean(1)

    def size(name: str) -> np.ndarray:
        return np.array([item["codecs"][name]["bytes"] for item in items])[draws].sum(1) / sizes

    rows = []
    numbers = size(BASE)[0] / 2  # of one token
    for path in PATHS:
        for name in names:
            cost = mean(name, path, "kl_mean")
            ratio = None
            if REFERENCE in names and name.startswith("entropy"):
                missing = np.log2(cost / mean(REFERENCE, path, "kl_mean")) / 2
                bits, theirs = 8 * size(name) / numbers, 8 * size(REFERENCE) / numbers
                ratio = _interval(theirs / (bits + missing), 2)
            rows.append(
                {
                    "path": path,
                    "codec": name,
                    "items": len(items),
                    "bytes a token": float(size(name)[0]),
                    "bits a number": float(8 * size(name)[0] / numbers),
                    "KL from bf16, first": float(mean(name, path, "kl_first")[0]),
                    "KL from bf16, 16": _interval(cost, 5),
                    "KL from full, first": float(mean(name, path, "full_kl_first")[0]),
                    "KL from full, 16": float(mean(name, path, "full_kl_mean")[0]),
                    "first agrees %": 100 * float(mean(name, path, "same_first")[0]),
                    f"{REFERENCE} / this at equal KL": ratio,
                }
            )
    return rows


def layer_errors(items: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, list[float]]]:
    """Return by codec the relative error of keys and of values in each layer."""
    total = {name: np.sum([item["errors"][name] for item in items], axis=0) for name in items[0]["errors"]}
    numbers = total.pop("numbers")
    return {
        name: {
            kind: [float(f"{error:.4g}") for error in np.sqrt(squares[:, column] / numbers[:, column])]
            for column, kind in enumerate(("keys", "values"))
        }
        for name, squares in total.items()
    }


def _squares(chunks: Sequence[ChunkKV], decoded: Sequence[ChunkKV] | None) -> list[list[float]]:
    """Return by layer the squares of the keys' and the values' errors, or of the numbers where nothing is decoded."""
    total = np.zeros((len(chunks[0].layers), 2))
    for index, chunk in enumerate(chunks):
        for layer, pair in enumerate(chunk.layers):
            for kind, exact in enumerate(pair):
                other = None if decoded is None else decoded[index].layers[layer][kind].float()
                wrong = exact.float() - exact.float().mean(0) if other is None else exact.float() - other
                total[layer, kind] += float(wrong.square().sum())
    squares: list[list[float]] = total.tolist()
    return squares


def _interval(values: np.ndarray, digits: int) -> str:
    low, high = np.percentile(values[1:], [2.5, 97.5])
    return f"{values[0]:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


if __name__ == "__main__":
    main()
