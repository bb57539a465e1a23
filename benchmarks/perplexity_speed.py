"""Seconds of perplexity chunking: tokenising, the model, and the rest apart, and the model's share of matmul peak.

    python benchmarks/perplexity_speed.py --model qwen2.5-coder-0.5b-instruct.gguf [--tokens 1000000] [--rounds 3]
        [--device cuda] [--dtype bfloat16] [--cap 256] [--batch N] [--text FILE] [--record NAME]
    python benchmarks/perplexity_speed.py --device cpu --tokens 4096

One document of `--tokens` tokens of the model, as one stream with a sliding window, in chunks of at most `--cap`. The
text is FILE, or what chunking_speed.py takes: the King James Bible where Debian's packages brought it, else the corpora
of chunking_evaluation in `RAGKIT_DATA`. A text that is too short is repeated, and the record says how often.

Work is counted, not guessed: 2 FLOPs for each weight that a token is multiplied with, the vocabulary's too and the
embedding's lookup not, and for attention 4 for each element of a query and each key it sees in its segment and window.
Peak is the fastest product of two large matrices in the same run (on a GPU that of prefill_decode.py).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from chunking_speed import whole_text
from prefill_decode import best, ceilings
from report import markdown_table, percentiles, write_result

from ragkit.chunking.decoder_losses import DecoderLosses, Losses
from ragkit.chunking.perplexity import PerplexityOptions, PerplexityScorer, perplexity_chunker
from ragkit.config import ChunkingConfig
from ragkit.generation.engine import Engine
from ragkit.models.tokenizer import ModelTokenizer
from ragkit.types import Document

TARGET_SECONDS = 8.0  # for a million tokens with the 0.5B on an H100, tokenising apart
WARM_UP_TOKENS = 80_000
LARGEST_TEXT = 1 << 30
CHECK_LENGTHS = (2048, 5000, 100, 3, 700, 2049, 9000)  # of texts; the first is a segment
CLOSE = {"torch.float32": 1e-4, "torch.bfloat16": 0.05, "torch.float16": 0.005}  # nats, of rounding in other orders
CPU_CHECKED = 200  # tokens of a text that are compared on a CPU, which takes minutes for more
CPU_SIZE = 2048  # of the matrices whose product is the peak of a CPU

Result = TypeVar("Result")


class Stopwatch:
    """Adds up the seconds of calls."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def of(self, run: Callable[[], Result]) -> Result:
        """Return what `run` returns."""
        started = time.perf_counter()
        result = run()
        self.seconds += time.perf_counter() - started
        return result


class TimedTokenizer:
    """A `TextTokenizer` that adds up its seconds."""

    def __init__(self, tokenizer: ModelTokenizer, watch: Stopwatch) -> None:
        self._tokenizer, self._watch = tokenizer, watch
        self.tokenizer_id, self.words_add_up = tokenizer.tokenizer_id, tokenizer.words_add_up

    def encode(self, text: str) -> list[int]:
        """Return the token ids of `text`."""
        return self._watch.of(lambda: self._tokenizer.encode(text))

    def count_batch(self, texts: Sequence[str]) -> list[int]:
        """Return the number of tokens of each text."""
        return self._watch.of(lambda: self._tokenizer.count_batch(texts))

    def offsets(self, text: str) -> list[tuple[int, int]]:
        """Return the span of each token of `text`."""
        return self._watch.of(lambda: self._tokenizer.offsets(text))

    def encode_batch_with_offsets(self, texts: Sequence[str]) -> Iterator[tuple[list[int], list[tuple[int, int]]]]:
        """Yield the token ids and spans of each text."""
        yield from self._watch.of(lambda: list(self._tokenizer.encode_batch_with_offsets(texts)))

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of `token_ids`."""
        return self._watch.of(lambda: self._tokenizer.decode(token_ids))


class TimedLosses:
    """A `LossModel` that adds up its seconds; the losses are on the host when a call ends, so nothing runs on."""

    def __init__(self, losses: DecoderLosses, watch: Stopwatch) -> None:
        self._losses, self._watch = losses, watch
        self.settings = losses.settings

    def token_losses(self, texts: Sequence[Sequence[int]]) -> list[Losses]:
        """Return the losses of each text."""
        return self._watch.of(lambda: self._losses.token_losses(texts))


def text_of_tokens(file: Path | None, tokens: int, tokenizer: ModelTokenizer) -> tuple[str, dict[str, Any]]:
    """Return a text of `tokens` tokens, or a few less, and what it is."""
    text, source = whole_text(file, LARGEST_TEXT)
    size = tokenizer.count_batch([text])[0]
    times = -(-tokens // size)
    whole = text * times
    # Tokens are about evenly long: a part by that measure, then what is too much by the tokens' own ends.
    part = whole[: len(text) * tokens * 11 // (size * 10) + 1000]
    ends = tokenizer.offsets(part)
    return part[: ends[min(tokens, len(ends)) - 1][1]], {"text": source, "repeated": times}


def agreement(engine: Engine, token_ids: Sequence[int]) -> dict[str, float]:
    """Return how far losses of packed passes lie from those of other ways, in nats a token, after asserting bounds.

    The first segment alone is compared with one plain pass of the engine; texts of all kinds of lengths with the same
    texts one after another, a segment a pass.
    """
    most = max(CHECK_LENGTHS) if engine.decoder.device.type == "cuda" else CPU_CHECKED
    texts = [token_ids[: min(size, most)] for size in CHECK_LENGTHS]
    first = texts[0]
    packed = DecoderLosses(engine.decoder)
    alone = DecoderLosses(engine.decoder, batch=CHECK_LENGTHS[0], grouped=False)
    plain = engine.token_losses(first).float().cpu().numpy()
    pairs = {
        "one plain pass": (packed.token_losses([first]), [plain]),
        "a segment a pass": (packed.token_losses(texts), [alone.token_losses([text])[0] for text in texts]),
    }
    found = {
        name: float(np.abs(np.concatenate(ours) - np.concatenate(theirs)).mean())
        for name, (ours, theirs) in pairs.items()
    }
    bound = CLOSE[str(engine.decoder.dtype)]
    assert max(found.values()) <= bound, f"losses differ by {found} nats a token on average, allowed {bound}"
    return found


def work_of(engine: Engine, losses: DecoderLosses, tokens: int) -> dict[str, float]:
    """Return the TFLOPs of one text of `tokens` tokens, in products with weights and in attention."""
    config = engine.decoder.config
    heads = config.num_q_heads * config.head_dim
    qkv = config.hidden_size * (heads + 2 * config.num_kv_heads * config.head_dim)
    layer = qkv + heads * config.hidden_size + 3 * config.hidden_size * config.intermediate_size
    weights = config.num_layers * layer + config.vocab_size * config.hidden_size
    attention = 4 * config.num_layers * heads * losses.keys_seen(tokens)
    return {"weights": 2e-12 * weights * tokens, "attention": 1e-12 * attention, "million weights": weights / 1e6}


def peak_tflops(device: torch.device, dtype: torch.dtype) -> float:
    """Return TFLOP/s of the fastest matrix product here."""
    if device.type == "cuda":
        return ceilings(device)["matmul_tflops"]
    left = torch.randn(CPU_SIZE, CPU_SIZE).to(dtype)
    return 2 * CPU_SIZE**3 / best(lambda: left @ left, device) / 1e9


def chunked(engine: Engine, text: str, cap: int, batch: int | None) -> dict[str, Any]:
    """Return the seconds of chunking `text`, by what they went to, and what came of it."""
    tokenising, model, total = Stopwatch(), Stopwatch(), Stopwatch()
    losses = DecoderLosses(engine.decoder, batch=batch)
    tokenizer = TimedTokenizer(engine.tokenizer, tokenising)
    scorer = PerplexityScorer(TimedLosses(losses, model), tokenizer, engine.model_name, PerplexityOptions())
    chunker = perplexity_chunker(ChunkingConfig("perplexity", cap), tokenizer, scorer)
    document = Document.from_text(text)
    chunks = total.of(lambda: chunker.chunk(document))
    assert "".join(chunk.text for chunk in chunks) == text, "the chunks do not keep the text"
    assert max(chunk.token_count for chunk in chunks) <= cap, "a chunk is over the cap"
    apart = total.seconds - tokenising.seconds
    return {
        "seconds without tokenising": apart,
        "model": model.seconds,
        "rest": apart - model.seconds,
        "tokenising": tokenising.seconds,
        "tokens": losses.tokens_forwarded,
        "chunks": len(chunks),
    }


def main() -> None:
    """Warm up, measure, print, and keep the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="a name, folder or .gguf file")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto", help="auto is bfloat16 on a GPU")
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--cap", type=int, default=256)
    parser.add_argument("--batch", type=int, help="most tokens a pass; the library's choice where left out")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--record", default="perplexity_speed", help="name of the file of raw numbers")
    options = parser.parse_args()
    engine = Engine.load(options.model, device=options.device, dtype=options.dtype, kv_tokens=64)
    device = engine.decoder.device
    text, facts = text_of_tokens(options.text, options.tokens, engine.tokenizer)
    some = text[: len(text) * WARM_UP_TOKENS // options.tokens] if options.tokens > WARM_UP_TOKENS else text
    close = agreement(engine, engine.tokenizer.encode(text[:100_000]))
    print(f"losses of packed passes differ, in nats a token, from those of {close}", flush=True)
    chunked(engine, some, options.cap, options.batch)
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    rounds = [chunked(engine, text, options.cap, options.batch) for _ in range(options.rounds)]
    memory = torch.cuda.max_memory_allocated() / 1e9 if on_gpu else None
    parts = ("seconds without tokenising", "model", "rest", "tokenising")
    medians = {part: percentiles([row[part] for row in rounds], at=(50,))["p50"] for part in parts}
    work = work_of(engine, DecoderLosses(engine.decoder, batch=options.batch), rounds[0]["tokens"])
    peak = peak_tflops(device, engine.decoder.dtype)
    reached = (work["weights"] + work["attention"]) / medians["model"]
    row: dict[str, Any] = {"of": Path(options.model).name, "tokens": rounds[0]["tokens"], "chunks": rounds[0]["chunks"]}
    row |= {f"{part}, s": seconds for part, seconds in medians.items()}
    row |= {"TFLOP": work["weights"] + work["attention"], "TFLOP/s": reached, "peak TFLOP/s": peak}
    row |= {"% of peak": 100 * reached / peak, "GPU memory, GB": memory}
    print(markdown_table([row], list(row)))
    within = medians["seconds without tokenising"]
    if on_gpu and options.tokens >= 1_000_000:
        print(f"\nwanted: at most {TARGET_SECONDS:g} s; {'kept' if within <= TARGET_SECONDS else 'NOT kept'}")
    device_name = torch.cuda.get_device_name() if on_gpu else "cpu"
    settings = vars(options) | {"model": Path(options.model).name, "text": None}  # names, no folders
    facts |= {"device": device_name, "dtype": str(engine.decoder.dtype), "settings": settings}
    result = {
        **facts,
        "losses": DecoderLosses(engine.decoder).settings,
        "agreement": close,
        "table": row,
        "work": work,
        "rounds": rounds,
    }
    print(f"raw numbers: {write_result(options.record, result)}")


if __name__ == "__main__":
    main()
