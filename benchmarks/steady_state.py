"""Whether reuse lasts: a thousand questions over a corpus that is larger than the cache, every ordering a new one.

    RAGKIT_DATA=... python benchmarks/steady_state.py [--questions N] [--passages K] [--cache-share S] [--policies]

Each question puts K passages of 2WikiMultihopQA's corpus (6,119 passages) before the bundled model, drawn without
repetition from a Zipf distribution over a shuffled corpus and put in random order. Chunk KV is kept in memory only,
with room for the given share of the corpus. Reported per hundred questions: hit rate, time to the first token through
`blend`, and full prefill of the same prompt at every twentieth question. `--policies` compares eviction policies on
ten thousand questions by their hit rates and by the part of the computing time that hits saved, without a model.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from report import data_folder, markdown_table, write_result

from ragkit.generation.blend_prefill import BlendPrefill
from ragkit.generation.chunk_prefill import ChunkPrefill
from ragkit.generation.engine import Engine
from ragkit.generation.sampling import SamplingConfig
from ragkit.generation.steps import Finished
from ragkit.kvcache.codecs import make_codec
from ragkit.kvcache.eviction import EvictionQueue, PolicyName, make_policy
from ragkit.kvcache.kv_key import KVRecipe
from ragkit.kvcache.kv_store import KVStore
from ragkit.kvcache.memory_tier import MemoryTier
from ragkit.types import Prompt, Segment, chunk_id_of

ZIPF = 1.0  # exponent: the fifth most popular passage is asked for a fifth as often as the first
CODEC = "bf16"
PER_ROW = 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--questions", type=int, default=1000)
    parser.add_argument("--passages", type=int, default=10)
    parser.add_argument("--cache-share", type=float, default=0.2, help="of the corpus' KV that the cache holds")
    parser.add_argument("--policies", action="store_true", help="compare eviction policies only")
    arguments = parser.parse_args()
    folder = data_folder("wiki2_corpus")
    if folder is None:
        sys.exit("set RAGKIT_DATA to the folder of the benchmark data")
    corpus = json.loads((folder / "2wikimultihopqa_corpus.json").read_text(encoding="utf-8"))
    engine = Engine.load(arguments.model)
    encode = engine.tokenizer.encode
    segments = [
        Segment(tuple(encode(f"{one['title']}\n{one['text']}\n\n")), chunk_id_of("wiki2", index, index + 1))
        for index, one in enumerate(corpus)
    ]
    if arguments.policies:
        rows = compare_policies(segments, arguments.passages, arguments.cache_share)
        print(markdown_table(rows, list(rows[0])))
        print("raw numbers:", write_result("steady_state_policies", {"settings": vars(arguments), "table": rows}))
        return
    titles = [one["title"] for one in corpus]
    rows = run(engine, segments, titles, arguments.questions, arguments.passages, arguments.cache_share)
    print(markdown_table(rows, list(rows[0])))
    print("raw numbers:", write_result("steady_state", {"settings": vars(arguments), "table": rows}))


def draws(passages: int, per_question: int, questions: int, seed: int = 0) -> Iterator[list[int]]:
    """Yield the passages of each question: distinct, by popularity, in random order."""
    source = np.random.default_rng(seed)
    popularity = 1.0 / np.arange(1, passages + 1) ** ZIPF
    popularity /= popularity.sum()
    place = source.permutation(passages)
    for _ in range(questions):
        yield place[source.choice(passages, per_question, replace=False, p=popularity)].tolist()


def run(
    engine: Engine, segments: Sequence[Segment], titles: Sequence[str], questions: int, passages: int, share: float
) -> list[dict[str, Any]]:
    """Return one row a hundred questions."""
    codec = make_codec(CODEC, engine.decoder.layout)
    corpus_bytes = sum(codec.bytes_per_token(64) * len(segment.token_ids) for segment in segments)
    builder = engine.prompt_builder()
    recipe = KVRecipe("0" * 64, engine.decoder.config, "benchmark", engine.decoder.dtype, CODEC)
    chunks = ChunkPrefill(engine.decoder, engine.rotary, recipe, builder.prefix.token_ids)
    memory = MemoryTier("ram", int(share * corpus_bytes), make_policy("cost"))
    rows: list[dict[str, Any]] = []
    with KVStore(codec, memory) as store:
        engine.add_strategy(BlendPrefill(store, chunks))
        hits = misses = 0
        blend_ms: list[float] = []
        full_ms: list[float] = []
        for number, chosen in enumerate(draws(len(segments), passages, questions), 1):
            prompt = builder.build(f"What is known about {titles[chosen[0]]}?", [], max_new_tokens=1).prompt
            prompt = Prompt((prompt.segments[0], *(segments[index] for index in chosen), prompt.segments[-1]))
            done = first_token(engine, prompt, "blend")
            hits, misses = hits + done.kv.hits, misses + done.kv.misses
            blend_ms.append(done.timings_ms["first_token"])
            if number % 20 == 0:
                full_ms.append(first_token(engine, prompt, "full").timings_ms["first_token"])
            if number % PER_ROW == 0:
                rows.append(
                    {
                        "questions": f"{number - PER_ROW + 1}-{number}",
                        "hit rate %": 100 * hits / (hits + misses),
                        "first token p50 ms": statistics.median(blend_ms),
                        "full prefill p50 ms": statistics.median(full_ms),
                        "times": statistics.median(full_ms) / statistics.median(blend_ms),
                        "cache MB": memory.bytes_used / 1e6,
                        "evictions": memory.evictions,
                    }
                )
                print(rows[-1], file=sys.stderr, flush=True)
                hits = misses = 0
                blend_ms, full_ms = [], []
    return rows


def first_token(engine: Engine, prompt: Prompt, strategy: str) -> Finished:
    """Return what the prefill and the first token took."""
    *_, last = engine.generate(prompt, SamplingConfig(max_new_tokens=1), strategy)
    assert isinstance(last, Finished)
    return last


def compare_policies(
    segments: Sequence[Segment], passages: int, share: float, questions: int = 10_000
) -> list[dict[str, Any]]:
    """Return hit rate and saved share of recomputation of each policy behind the first thousand questions."""
    sizes = [len(segment.token_ids) for segment in segments]
    budget = int(share * sum(sizes))
    rows = []
    for policy in PolicyName:
        queue: EvictionQueue[int] = EvictionQueue(make_policy(policy))
        held: set[int] = set()
        used = hits = asked = saved = wanted = 0
        started = time.perf_counter()
        for number, chosen in enumerate(draws(len(segments), passages, questions)):
            counted = number >= questions // 10
            for one in chosen:
                asked, wanted = asked + counted, wanted + counted * sizes[one]
                if one in held:
                    hits, saved = hits + counted, saved + counted * sizes[one]
                    queue.use(one)
                    continue
                if used + sizes[one] > budget:
                    leaving = queue.make_room(used + sizes[one] - budget, lambda key: True)
                    held.difference_update(leaving)
                    used -= sum(sizes[key] for key in leaving)
                queue.add(one, sizes[one], float(sizes[one]))
                held.add(one)
                used += sizes[one]
        rows.append(
            {
                "policy": str(policy),
                "hit rate %": 100 * hits / asked,
                "tokens not computed %": 100 * saved / wanted,
                "microseconds a use": 1e6 * (time.perf_counter() - started) / (questions * passages),
            }
        )
    return rows


if __name__ == "__main__":
    main()
