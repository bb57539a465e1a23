"""How much sooner questions about one long document are answered together than one by one.

On a CPU: the bundled model over a document of made text with a needle for each question. On a GPU: the shape of Llama
3 8B in bf16 with random weights over random tokens; every document is really read into pages.

    python benchmarks/pages_batch_speed.py                                  # the bundled model
    python benchmarks/pages_batch_speed.py --shape 8b --tokens 131072 --questions 1,4,16,64
    python benchmarks/pages_batch_speed.py --shape tiny --tokens 2048 --questions 2,3   # to try the script

All answers have all of their tokens. Both ways take turns over the same pages (`interleaved`), and what is shown are
medians. `decode` is a way's time without that of reading the questions, which are read one after another in both.
The floor of a step is what its memory takes at the rate of a copy: the weights once, and the rows that each question
attends to. Before anything is timed both ways answer, and the answers are compared: in fp32 they must be equal token
for token; in bf16 passes of other sizes add up in another order, so it is said how many are.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from batch_random_model import NoText
from pages_documents import LARGE, TINY, random_decoder
from report import interleaved_samples, markdown_table, write_result

from ragkit.bench.long_items import Material
from ragkit.bench.needle import NeedleTask
from ragkit.config import Device, PagesConfig
from ragkit.generation.engine import Engine
from ragkit.generation.page_batch import PageBatch
from ragkit.generation.page_options import PageOptions
from ragkit.generation.page_request import PageRequest
from ragkit.generation.paged_answer import PagedAnswer
from ragkit.generation.paged_prefill import PagedPrefill
from ragkit.generation.placement import resolve_device
from ragkit.generation.sampling import SamplingConfig
from ragkit.generation.steps import Finished
from ragkit.generation.weight_bytes import weight_bytes
from ragkit.kvcache.chunk_kv import ChunkRef
from ragkit.kvcache.kv_key import KVKey
from ragkit.kvcache.kv_pages import KVPages
from ragkit.kvcache.page_cache import PageCache
from ragkit.kvcache.page_codec import PageCodec
from ragkit.kvcache.page_memory import PageMemory
from ragkit.kvcache.page_records import PageRecords
from ragkit.kvcache.resident_pages import ResidentPages

QUESTION_TOKENS = 48  # of random ones
COPIED_BYTES = {"cuda": 2 << 30, "cpu": 256 << 20}  # to measure how fast memory is
COLUMNS = {
    "questions": "Questions", "alone_s": "One by one, s", "together_s": "together, s", "ratio": "times",
    "alone_token_ms": "decode one by one, ms a token", "together_token_ms": "together, ms a token",
    "decode_ratio": "times (decode)", "step_ms": "ms a step", "floor_ms": "floor, ms", "of_floor": "floor of it",
    "equal": "equal answers",
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="a model with real weights")
    parser.add_argument("--shape", choices=["8b", "tiny"], help="random weights of this shape instead of a model")
    parser.add_argument("--device", default="auto", choices=["auto", "cuda", "cpu"])
    parser.add_argument("--dtype", default="auto", help="of a model with real weights")
    parser.add_argument("--tokens", type=int, default=16384, help="of the document")
    parser.add_argument("--questions", default="1,2,4,8,16", help="how many are asked at a time")
    parser.add_argument("--answer-tokens", type=int, default=64)
    parser.add_argument("--selector", help="[default: pages.selector]")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--name", default="pages_batch_speed", help="of the raw file")
    arguments = parser.parse_args()
    counts = [int(count) for count in arguments.questions.split(",")]
    world = random_world(arguments, max(counts)) if arguments.shape else real_world(arguments, max(counts))
    with torch.inference_mode():
        result: dict[str, Any] = world.described() | {"answer_tokens": arguments.answer_tokens, "rows": []}
        for count in counts:
            result["rows"].append(world.compared(count, arguments.answer_tokens, arguments.rounds))
            print(markdown_table(result["rows"][-1:], COLUMNS), flush=True)
            if arguments.shape != "tiny":
                print(f"raw numbers: {write_result(arguments.name, result)}", flush=True)
    print(f"\n{markdown_table(result['rows'], COLUMNS)}")


@dataclass
class World:
    """A model, a document that it reads when this is made, and questions about it."""

    engine: Engine
    config: PagesConfig
    document: Sequence[int]
    questions: Sequence[Sequence[int]]
    read_s: float = 0.0
    copy_gb_per_s: float = 0.0
    prefill: PagedPrefill = field(init=False)
    pages: KVPages = field(init=False)

    def __post_init__(self) -> None:
        device = self.engine.decoder.device
        self.copy_gb_per_s = copy_rate(device)
        self.prefill = PagedPrefill(self.engine.decoder, self.engine.rotary, PageOptions.of(self.config))
        self.pages = pages_of(self.engine, self.config, self.document)
        started = time.perf_counter()
        self.prefill.read(self.pages)
        synchronise(device)
        self.read_s = time.perf_counter() - started

    def described(self) -> dict[str, Any]:
        """Return what is measured over."""
        decoder = self.engine.decoder
        return {
            "model": self.engine.model_name, "device": str(decoder.device), "dtype": str(decoder.dtype),
            "document_tokens": self.pages.total_tokens, "read_s": self.read_s, "copy_gb_per_s": self.copy_gb_per_s,
            "weight_bytes": weight_bytes(decoder), "threads": torch.get_num_threads(),
            "pages": {name: str(getattr(self.config, name)) for name in self.config.__dataclass_fields__},
        }  # fmt: skip

    def compared(self, count: int, answer_tokens: int, rounds: int) -> dict[str, Any]:
        """Return both ways over the first `count` questions."""
        sampling = SamplingConfig(answer_tokens, ignore_stop_tokens=True)
        asked = [PageRequest(at, tuple(ids), sampling) for at, ids in enumerate(self.questions[:count])]
        equal = sum(one.token_ids == other.token_ids for one, other in zip(*(
            way(asked) for way in (self.alone, self.together)
        ), strict=True))  # fmt: skip
        if self.engine.decoder.dtype == torch.float32 and equal < count:
            raise SystemExit(f"{count - equal} of {count} answers differ from those of questions asked alone")
        reading: dict[str, list[float]] = {"alone": [], "together": []}

        def timed(name: str, way: Callable[[Sequence[PageRequest]], list[Finished]]) -> Callable[[], None]:
            def run() -> None:
                answers = way(asked)
                synchronise(self.engine.decoder.device)
                reading[name].append(sum(one.timings_ms["prefill"] for one in answers) / 1e3)

            return run

        samples = interleaved_samples(
            {"alone": timed("alone", self.alone), "together": timed("together", self.together)}, rounds, warmup=1
        )
        return self.row(count, answer_tokens, samples, reading) | {"equal": equal}

    def row(
        self, count: int, answer_tokens: int, samples: dict[str, list[float]], reading: dict[str, list[float]]
    ) -> dict[str, Any]:
        """Return the figures of one number of questions."""
        whole = {name: statistics.median(values) for name, values in samples.items()}
        decode = {
            name: statistics.median(
                one - read for one, read in zip(values, reading[name][-len(values) :], strict=True)
            )
            for name, values in samples.items()
        }  # fmt: skip
        tokens = count * (answer_tokens - 1)  # the first one of each follows from its question
        step_ms = 1e3 * decode["together"] / (answer_tokens - 1)
        decoder = self.engine.decoder
        rows = self.prefill.options.pages_at_once(self.pages.num_pages) * self.config.page_tokens
        read_bytes = weight_bytes(decoder) + count * rows * decoder.layout.bytes_per_token
        floor_ms = read_bytes / self.copy_gb_per_s / 1e6
        return {
            "questions": count, "alone_s": whole["alone"], "together_s": whole["together"],
            "ratio": whole["alone"] / whole["together"], "decode_ratio": decode["alone"] / decode["together"],
            "alone_token_ms": 1e3 * decode["alone"] / tokens, "together_token_ms": 1e3 * decode["together"] / tokens,
            "step_ms": step_ms, "floor_ms": floor_ms, "of_floor": floor_ms / step_ms,
            "samples": samples, "reading_s": reading,
        }  # fmt: skip

    def alone(self, asked: Sequence[PageRequest]) -> list[Finished]:
        """Return the answers, one question after another."""
        answers = []
        for one in asked:
            *_, finished = PagedAnswer(self.engine, self.prefill, self.pages, one.token_ids, one.sampling).steps()
            assert isinstance(finished, Finished), "the last step"
            answers.append(finished)
        return answers

    def together(self, asked: Sequence[PageRequest]) -> list[Finished]:
        """Return the answers of one batch."""
        batch = PageBatch(self.engine, self.prefill, self.pages, asked, max_running=len(asked))
        found = {}
        for result in batch.run():
            if result.finished is None:
                raise SystemExit(f"question {result.name}: {result.error}")
            found[result.name] = result.finished
        return [found[one.name] for one in asked]


def random_world(arguments: argparse.Namespace, count: int) -> World:
    """Return a model of random weights over random tokens."""
    sizes = TINY if arguments.shape == "tiny" else LARGE
    decoder = random_decoder(sizes, resolve_device(Device(arguments.device)))
    engine = Engine(
        f"random {arguments.shape}", decoder, NoText(), Path(), kv_tokens=64, stamp="random"  # type: ignore[arg-type]
    )  # fmt: skip
    drawn = torch.Generator().manual_seed(0)
    vocab = decoder.config.vocab_size
    document = torch.randint(3, vocab, (arguments.tokens,), generator=drawn).tolist()
    questions = torch.randint(3, vocab, (count, QUESTION_TOKENS), generator=drawn).tolist()
    return World(engine, configured(sizes.config, arguments), document, questions)


def real_world(arguments: argparse.Namespace, count: int) -> World:
    """Return a model with its weights over a document with a needle for each question."""
    engine = Engine.load(arguments.model, arguments.device, arguments.dtype, kv_tokens=64)
    task = NeedleTask(tuple((at + 0.5) / count for at in range(count)), together=True)
    item = task.make(Material(engine.tokenizer), arguments.tokens, 0)
    builder = engine.prompt_builder()
    document = (*builder.prefix.token_ids, *engine.tokenizer.encode(item.document), *builder.chunk_end)
    questions = [builder.ending(one.text).token_ids for one in item.questions]
    return World(engine, configured(PagesConfig(), arguments), document, questions)


def configured(config: PagesConfig, arguments: argparse.Namespace) -> PagesConfig:
    """Return the settings with what the command line changes."""
    return replace(config, selector=arguments.selector) if arguments.selector else config


def pages_of(engine: Engine, config: PagesConfig, token_ids: Sequence[int]) -> KVPages:
    """Return a document of which nothing was read; on a GPU all of its pages will lie there, else in memory."""
    decoder, size = engine.decoder, config.page_tokens
    codec = PageCodec(config.codec, decoder.layout, size)
    windows = [token_ids[at : at + config.window_tokens] for at in range(0, len(token_ids), config.window_tokens)]
    refs = [ChunkRef(KVKey(f"{index:064x}"), tuple(ids), "") for index, ids in enumerate(windows)]
    num_pages = -(-len(token_ids) // size)
    on_gpu = decoder.device.type == "cuda"
    resident = ResidentPages(codec, num_pages, decoder.device) if on_gpu else None
    decoded = min(num_pages, (config.cache_mb << 20) // (decoder.layout.bytes_per_token * size))
    cache = PageCache(decoder.layout, size, 1 if on_gpu else decoded, 0, decoder.device)
    records = PageRecords(None, codec.codec_id, decoder.config.num_layers)
    return KVPages(codec, refs, config.window_tokens, cache, PageMemory(1 << 40), records, resident)


def copy_rate(device: torch.device) -> float:
    """Return GB/s of a copy, counting both ways, at best."""
    source = torch.ones(COPIED_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    took = []
    for _ in range(10):
        synchronise(device)
        started = time.perf_counter()
        target.copy_(source)
        synchronise(device)
        took.append(time.perf_counter() - started)
    return 2 * len(source) / min(took) / 1e9


def synchronise(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
