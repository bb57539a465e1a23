"""How fast a document of up to a million tokens is read into pages, and how fast tokens are generated over them.

On a GPU: the shape of Llama 3 8B in bf16 with random weights. Pages are filled with random codes, because neither
scores nor attention take longer for other numbers.

    python benchmarks/pages_speed.py
    python benchmarks/pages_speed.py --whole-prefill            # all million tokens are read
    python benchmarks/pages_speed.py --parts decode --layer-interval 2 --name pages_speed_layers_2
    python benchmarks/pages_speed.py --tiny --device cpu        # a tiny model and short documents, to try the script

Decoding: one CUDA graph replays a step that chooses pages, another one that keeps them; a token costs one of the first
and `interval` - 1 of the second, over `interval`. `attention` is what the same graphs take without the model around it:
choosing, attending, and writing the token's row; `selection` is what a choosing step takes more than the other.
Full attention runs over the same KV with the same kernel, every page listed, and over one layer as bf16 numbers with
torch's SDPA; the faster one is what is compared with. Every part is written to the raw file when it is done, and each
can be measured alone, under another name. Reading: windows at three places of the document, the time for
all of it from a straight line between them, because a window's choice reads what is kept of all pages before it.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from pages_documents import LARGE, TINY, FullAttention, Sizes, fill, random_decoder
from prefill_decode import ceilings
from report import markdown_table, write_result
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ragkit.config import PagesConfig
from ragkit.generation.graph_recorder import GraphRecorder
from ragkit.generation.page_attention import PageAttention
from ragkit.generation.page_options import PageOptions
from ragkit.generation.paged_prefill import PagedPrefill
from ragkit.generation.rotary_cache import RotaryCache
from ragkit.kvcache.chunk_kv import ChunkRef
from ragkit.kvcache.kv_key import KVKey
from ragkit.kvcache.kv_pages import KVPages
from ragkit.kvcache.page_cache import PageCache
from ragkit.kvcache.page_codec import PageCodec
from ragkit.kvcache.page_memory import PageMemory
from ragkit.kvcache.page_records import PageRecords
from ragkit.kvcache.resident_pages import ResidentPages

QUESTION, RUNS, READ_WINDOWS = 32, 20, 16
SECTIONS = {"decode": "decode", "layer": "one_layer", "full": "against_full", "prefill": "prefill"}  # of the raw file
PARTS = tuple(SECTIONS)
BUDGET_ROWS = (4096, 16384, 65536)  # attended to in the rows about one layer's kernel

COLUMNS = {
    "tokens": "Tokens", "codec": "Pages", "gb": "GB of pages", "step_ms": "ms a token", "attention_ms": "attention",
    "selection_ms": "selection", "selection_share": "share of the step", "times_8k": "times the shortest",
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true", help="a tiny random model and short documents")
    parser.add_argument("--lengths", type=int, nargs="*", help="tokens of the documents")
    parser.add_argument("--interval", type=int, help="tokens that share a choice [default: pages.interval]")
    parser.add_argument("--layer-interval", type=int, help="layers that do [default: pages.layer_interval]")
    parser.add_argument("--selector", help="[default: pages.selector]")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"some of {', '.join(PARTS)} [default: all]")
    parser.add_argument("--whole-prefill", action="store_true", help="read the longest document from end to end")
    parser.add_argument("--name", default="pages_speed", help="of the raw file")
    arguments = parser.parse_args()
    parts = arguments.parts.split(",")
    if unknown := [part for part in parts if part not in PARTS]:
        parser.error(f"--parts takes some of {', '.join(PARTS)}, got {', '.join(unknown)}")
    sizes = TINY if arguments.tiny else LARGE
    changes = {
        "interval": arguments.interval,
        "layer_interval": arguments.layer_interval,
        "selector": arguments.selector,
    }
    config = replace(sizes.config, **{name: value for name, value in changes.items() if value is not None})
    sizes = replace(sizes, config=config, lengths=tuple(arguments.lengths or sizes.lengths))

    def keep(result: Mapping[str, Any]) -> None:
        if not arguments.tiny:
            print(f"raw numbers: {write_result(arguments.name, result)}", flush=True)

    with torch.inference_mode():
        result = Bench(sizes, torch.device(arguments.device)).result(parts, whole=arguments.whole_prefill, keep=keep)
    print(markdown_table(result["decode"], COLUMNS))
    for name in ("against_full", "one_layer", "prefill"):
        if result.get(name):
            found = result[name]
            for row in found if isinstance(found, list) else [found]:
                print(f"\n{name}:", ", ".join(f"{key} {_shown(value)}" for key, value in row.items()))


class Bench:
    """The model, and documents of it that are made and let go one after the other."""

    def __init__(self, sizes: Sizes, device: torch.device) -> None:
        self.sizes = sizes
        self.device = device
        self.decoder = random_decoder(sizes, device)
        self.options = PageOptions.of(sizes.config)
        self.reading_options = PageOptions.of(sizes.config, reading=True)
        self.prefill = PagedPrefill(self.decoder, RotaryCache(self.decoder), self.options, self.reading_options)
        self.ceilings = ceilings(device) if device.type == "cuda" else {}

    def result(self, parts: Sequence[str], *, whole: bool, keep: Callable[[Mapping[str, Any]], None]) -> dict[str, Any]:
        """Return all figures of `parts`; those that are there are given to `keep` as they come."""
        sizes = self.sizes
        result: dict[str, Any] = {
            "pages": {key: str(value) for key, value in vars_of(sizes.config).items()},
            "arguments": sys.argv[1:], "ceilings": self.ceilings, "decode": [],
        }  # fmt: skip
        for length in sizes.lengths if "decode" in parts else ():
            row = self.decoding(length, sizes.config.codec)
            result["decode"].append(row)
            row["times_8k"] = row["step_ms"] / result["decode"][0]["step_ms"]
            keep(result)
        measured: dict[str, Callable[[], Any]] = {
            "layer": lambda: self.one_layer(max(sizes.lengths)),
            "full": lambda: self.against_full(sizes.compared),
            "prefill": lambda: (self.whole_reading if whole else self.reading)(sizes.lengths[-1]),
        }
        for part, figures in measured.items():
            if part in parts:
                result[SECTIONS[part]] = figures()
                keep(result)
        return result

    def decoding(self, tokens: int, codec: str) -> dict[str, Any]:
        """Return what a token over a document takes, and what of that is for pages."""
        pages = self.filled(tokens, codec)
        attend = self.asked(pages)
        steps, own = self.measured_steps(attend), self.measured_attention(attend)
        interval = self.options.interval
        row = {
            "tokens": tokens, "codec": codec, "gb": pages.resident.nbytes / 1e9,
            "kept_gb": pages.summaries(self.options.selector).nbytes / 1e9, "interval": interval,
            "choosing_step_ms": steps[True], "keeping_step_ms": steps[False],
            "step_ms": amortised(steps, interval), "attention_ms": amortised(own, interval),
            "selection_ms": (steps[True] - steps[False]) / interval,
            "own_choosing_ms": own[True], "own_keeping_ms": own[False], "peak_gb": self.peak(),
        }  # fmt: skip
        row["selection_share"] = row["selection_ms"] / row["step_ms"]
        print({name: _shown(value) for name, value in row.items()}, flush=True)
        return row

    def against_full(self, tokens: int) -> dict[str, Any]:
        """Return how a step compares with one that attends to every page, stored as int8."""
        result = self.over_int8(tokens)
        self.free()
        if self.device.type == "cuda":
            result["sdpa_bf16_layer_ms"] = self.sdpa_layer(tokens)
            full_ms = result["full_attention_ms"]
            best = min(full_ms, result["sdpa_bf16_layer_ms"] * self.decoder.config.num_layers)
            result["attention_speed_up"] = best / result["attention_ms"]
            result["step_speed_up"] = (result["full_step_ms"] - full_ms + best) / result["step_ms"]
            result["attend_share_of_copy"] = result["attend_gb_per_s"] / self.ceilings["copy_gb_per_s"]
        print({name: _shown(value) for name, value in result.items()}, flush=True)
        return result

    def over_int8(self, tokens: int) -> dict[str, Any]:
        """Return what both steps take, and how fast the kernel reads pages."""
        pages = self.filled(tokens, "int8")
        attend = self.asked(pages)
        steps, own = self.measured_steps(attend), self.measured_attention(attend)
        full = FullAttention(pages, self.decoder.scale, self.prefill)
        token = torch.zeros(1, dtype=torch.int64, device=self.device)
        with_full = self.time(lambda: self.decoder.logits(self.decoder.run(token, full)))
        full_ms = self.time(lambda: self.over_layers(full))
        layer_bytes = pages.resident.nbytes / pages.num_layers
        kernel_ms = self.time(lambda: full(0, *self.heads()))
        interval = self.options.interval
        return {
            "tokens": tokens, "step_ms": amortised(steps, interval), "attention_ms": amortised(own, interval),
            "full_step_ms": with_full, "full_attention_ms": full_ms,
            "attention_speed_up": full_ms / amortised(own, interval),
            "step_speed_up": with_full / amortised(steps, interval),
            "attend_gb_per_s": layer_bytes / kernel_ms / 1e6, "attend_read_mb": layer_bytes / 1e6,
        }  # fmt: skip

    def one_layer(self, tokens: int) -> list[dict[str, float]]:
        """Return microseconds of one layer's attention over `BUDGET_ROWS` rows of pages, at batch 1."""
        around = self.options.sink_pages + self.options.local_pages
        layers = self.decoder.config.num_layers
        result = []
        for rows in sorted({min(count, tokens // 2) for count in BUDGET_ROWS}):
            budget = max(1, rows // self.options.page_size - around)
            options = replace(self.options, budget_pages=budget, found_times=1)
            pages = self.filled(2 * rows, self.sizes.config.codec)
            attend = self.asked(pages, PagedPrefill(self.decoder, RotaryCache(self.decoder), options))
            attend.begin_at(torch.full((1,), QUESTION, device=self.device), choose=False)
            queries = self.heads()[0].contiguous()
            seen = [attend._seen[layer] for layer in range(layers)]
            alone = self.time(lambda: [attend._attend(queries, one) for one in seen]) / layers  # noqa: B023 (at once)
            written = self.time(lambda: self.over_layers(attend)) / layers  # noqa: B023
            nbytes = attend.layout.num_rows * self.decoder.layout.bytes_per_token / layers
            result.append({
                "rows": attend.layout.num_rows, "attend_us": 1e3 * alone, "with_row_written_us": 1e3 * written,
                "read_mb": nbytes / 1e6, "gb_per_s": nbytes / alone / 1e6,
            })  # fmt: skip
            if self.ceilings:
                result[-1]["share_of_copy"] = result[-1]["gb_per_s"] / self.ceilings["copy_gb_per_s"]
        return result

    def reading(self, tokens: int) -> dict[str, float]:
        """Return what reading a document takes, from windows at its beginning, its middle and its end."""
        self.free()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        window = self.options.window_tokens
        count = max(3, min(READ_WINDOWS, tokens // window // 4))
        last = tokens // window - count
        rates = {}
        resident = ResidentPages(self.codec(self.sizes.config.codec), tokens // self.options.page_size, self.device)
        fill(resident, self.decoder)
        for first in (0, last // 2, last):
            pages = self.document(tokens, self.sizes.config.codec, resident)
            pages.num_windows = pages._num_resident = pages._num_checked = first
            pages.summaries(self.reading_options.selector)
            self.read_windows(pages, 2)
            self.synchronise()
            started = time.perf_counter()
            self.read_windows(pages, count - 2)
            self.synchronise()
            rates[first * window] = 1e3 * (time.perf_counter() - started) / (count - 2)
            del pages
            self.free()
        begin, middle, end = rates.values()
        return {
            "tokens": tokens, "window_tokens": window, "first_windows_ms": begin, "middle_windows_ms": middle,
            "last_windows_ms": end, "seconds": (begin + 2 * middle + end) / 4 * (tokens / window) / 1e3,
            "is_extrapolated": True, "peak_gb": self.peak(),
        }  # fmt: skip

    def whole_reading(self, tokens: int) -> dict[str, float]:
        """Return what reading a document from end to end takes, and making what questions find its pages by.

        A short document is read before, so that no kernel is compiled meanwhile.
        """
        short = self.document(min(tokens, 32 * self.options.window_tokens), self.sizes.config.codec)
        self.prefill.read(short)
        self.prefill.prepare(short)
        del short
        self.free()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        pages = self.document(tokens, self.sizes.config.codec)
        started = time.perf_counter()
        self.prefill.read(pages)
        self.synchronise()
        read = time.perf_counter()
        self.prefill.prepare(pages)
        self.synchronise()
        ended = time.perf_counter()
        return {
            "tokens": tokens, "seconds": ended - started, "summary_seconds": ended - read, "is_extrapolated": False,
            "peak_gb": self.peak(),
        }  # fmt: skip

    def read_windows(self, pages: KVPages, count: int) -> None:
        """Read the next windows of a document."""
        for _ in range(count):
            pages.append(self.prefill._rows(pages, pages.num_windows))

    def measured_steps(self, attend: PageAttention) -> dict[bool, float]:
        """Return ms of a step that chooses and of one that keeps."""
        token = torch.zeros(1, dtype=torch.int64, device=self.device)
        own = torch.full((1,), QUESTION, dtype=torch.int64, device=self.device)

        def step(chooses: bool) -> None:
            attend.begin_at(own, choose=chooses)
            self.decoder.logits(self.decoder.run(token, attend))

        return {chooses: self.time(lambda chooses=chooses: step(chooses)) for chooses in (True, False)}

    def measured_attention(self, attend: PageAttention) -> dict[bool, float]:
        """Return the same of the attention of all layers alone."""
        own = torch.full((1,), QUESTION, dtype=torch.int64, device=self.device)

        def step(chooses: bool) -> None:
            attend.begin_at(own, choose=chooses)
            self.over_layers(attend)

        return {chooses: self.time(lambda chooses=chooses: step(chooses)) for chooses in (True, False)}

    def over_layers(self, attend: Callable[..., Tensor]) -> None:
        """Attend with one token in every layer."""
        heads = self.heads()
        for layer in range(self.decoder.config.num_layers):
            attend(layer, *heads)

    def heads(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values of one token."""
        config = self.decoder.config
        shapes = (config.num_q_heads, config.num_kv_heads, config.num_kv_heads)
        return tuple(  # type: ignore[return-value]
            torch.ones((1, heads, config.head_dim), dtype=self.sizes.dtype, device=self.device) for heads in shapes
        )

    def sdpa_layer(self, tokens: int) -> float:
        """Return ms of torch's SDPA of one token over one layer's KV as numbers, keys turned already."""
        config = self.decoder.config
        queries = torch.randn((1, config.num_q_heads, 1, config.head_dim), device=self.device, dtype=torch.bfloat16)
        keys, values = torch.randn(
            (2, 1, config.num_kv_heads, tokens, config.head_dim), device=self.device, dtype=torch.bfloat16
        )
        return self.time(lambda: scaled_dot_product_attention(queries, keys, values, enable_gqa=True))

    def asked(self, pages: KVPages, prefill: PagedPrefill | None = None) -> PageAttention:
        """Return the attention behind a question."""
        attend = (prefill or self.prefill).attention(pages, QUESTION + 2)
        attend.begin(QUESTION, choose=True)
        self.decoder.run(torch.zeros(QUESTION, dtype=torch.int64, device=self.device), attend)
        return attend

    def filled(self, tokens: int, codec: str) -> KVPages:
        """Return a document that was never read: its pages hold random codes."""
        self.free()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        pages = self.document(tokens, codec)
        fill(pages.resident, self.decoder)
        pages.num_windows = pages._num_resident = pages._num_checked = len(pages.refs)
        return pages

    def document(self, tokens: int, codec: str, resident: ResidentPages | None = None) -> KVPages:
        """Return a document of which nothing was read."""
        options, layout = self.options, self.decoder.layout
        page_codec = self.codec(codec)
        ids = (
            tuple(range(options.window_tokens))
            if self.decoder.config.vocab_size > options.window_tokens
            else ((1,) * options.window_tokens)
        )
        refs = [ChunkRef(KVKey(f"{index:064x}"), ids, "") for index in range(tokens // options.window_tokens)]
        if resident is None:
            resident = ResidentPages(page_codec, tokens // options.page_size, self.device)
        cache = PageCache(layout, options.page_size, 1, 0, self.device)
        records = PageRecords(None, page_codec.codec_id, self.decoder.config.num_layers)
        return KVPages(page_codec, refs, options.window_tokens, cache, PageMemory(1 << 20), records, resident)

    def codec(self, name: str) -> PageCodec:
        """Return the codec of pages."""
        return PageCodec(name, self.decoder.layout, self.options.page_size)

    def time(self, work: Callable[[], object]) -> float:
        """Return ms of `work`, as a CUDA graph on a GPU: the median of `RUNS`."""
        if self.device.type != "cuda":
            work()
            started = time.perf_counter()
            work()
            return 1e3 * (time.perf_counter() - started)

        def run() -> None:
            work()

        recorder = GraphRecorder(self.device)
        recorder.begin()
        replay = recorder.record(run)
        recorder.end()
        if recorder._failed:
            raise SystemExit("a CUDA graph could not be recorded")
        took = []
        for _ in range(RUNS):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            replay()
            stop.record()
            stop.synchronize()
            took.append(start.elapsed_time(stop))
        return sorted(took)[RUNS // 2]

    def synchronise(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def peak(self) -> float:
        """Return the most GB that were in use on a GPU."""
        return torch.cuda.max_memory_allocated() / 1e9 if self.device.type == "cuda" else 0.0

    def free(self) -> None:
        """Give back what nobody holds."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def amortised(took: Mapping[bool, float], interval: int) -> float:
    """Return what a token takes where one of `interval` chooses."""
    return (took[True] + (interval - 1) * took[False]) / interval


def vars_of(config: PagesConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in config.__dataclass_fields__}


def _shown(value: Any) -> Any:
    return round(value, 4) if isinstance(value, float) else value


if __name__ == "__main__":
    main()
