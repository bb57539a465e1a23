"""Drafted decoding against our own plain decoding at the shape of Llama 3 8B, with random weights and graphs.

    python benchmarks/speculative_speed.py [--contexts 8192 32768 130560] [--stood FILE]
    python benchmarks/speculative_speed.py --tiny --device cpu      does the script work?

Three tables. What a pass over 1 to 32 tokens costs beside a step. What a step of drafting over a short context costs,
with the model's own weights and with its copy of 4 bits. And whole loops, of which everything runs: drafts, verifying,
choosing, the control of lengths. Random weights accept nothing, so that what stands is imposed after all of it is
computed: each drafted token with the same chance, or as many as FILE says that stood on real weights, which
`benchmarks/draft_runs.py` writes: how many tokens were proposed and how many stood, pass after pass. The ceiling is
what the best fixed length would reach at that acceptance if verifying cost a plain step, the first drafted token no
more than a further one, and nothing else anything. What stood is counted of the tokens that were looked at: those
behind one that fell are not.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from imposed_drafts import MOST_DEPTH, ImposedAcceptance, LookupDrafter, ModelDrafter, Stands
from prefill_decode import SHAPE_8B, ceilings
from report import markdown_table, percentiles, write_result
from torch import Tensor

from ragkit.generation.decode_runner import DecodeRunner
from ragkit.generation.decode_state import DecodeState
from ragkit.generation.decoder import Decoder
from ragkit.generation.draft_control import DraftLimits
from ragkit.generation.draft_costs import MeasuredCosts
from ragkit.generation.draft_runner import DraftRunner
from ragkit.generation.draft_times import StepTimes
from ragkit.generation.draft_tree import DraftTree
from ragkit.generation.int4_projection import GROUP, int4_linear_of
from ragkit.generation.sampling import SamplingConfig
from ragkit.generation.speculative_decode import Drafting, SpeculativeRequest, advance
from ragkit.generation.verify_runner import VerifyRunner
from ragkit.generation.weights import assemble_weights
from ragkit.kvcache.pool import KVPool
from ragkit.kvcache.request_kv import RequestKV
from ragkit.kvcache.rope import RotaryTable
from ragkit.models.model_config import ModelConfig, model_config
from ragkit.types import Prompt, Segment

TINY = {
    **SHAPE_8B, "vocab_size": 300, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
CONTEXTS = (8192, 32768, 130560)  # the last with room for answers below 131,072
PASSES = (1, 2, 4, 8, 9, 16, 32)  # tokens of a pass; 9 are the last token and 8 drafted ones
ACCEPTANCES = (0.2, 0.5, 0.8)
DRAFTERS = ("self", "self-4bit", "lookup")
DRAFT_CONTEXT = 4096
ROUNDS = 15
WARM_UP_TOKENS, TIMED_TOKENS = 48, 208


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, nargs="+", default=list(CONTEXTS))
    parser.add_argument("--drafters", nargs="+", default=list(DRAFTERS), choices=DRAFTERS)
    parser.add_argument("--stood", type=Path, help="what stood on real weights")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true", help="a small model and short contexts; nothing is written")
    arguments = parser.parse_args()
    if arguments.tiny:
        arguments.contexts = [100, 200]
    began = time.perf_counter()
    with torch.inference_mode():
        bench = Bench(torch.device(arguments.device), arguments.contexts, tiny=arguments.tiny)
        print(f"model made after {time.perf_counter() - began:.0f} s", flush=True)
        result = bench.measure(arguments.contexts, arguments.drafters, stood_runs(arguments.stood))
    result["seconds"] = time.perf_counter() - began
    print_tables(result)
    if not arguments.tiny:
        print(f"\nraw numbers: {write_result('speculative_speed', result)}")


def stood_runs(path: Path | None) -> dict[str, list[list[int]]]:
    """Return how many tokens were proposed and stood in each pass on real weights, by drafter."""
    if path is None:
        return {}
    stood: dict[str, list[list[int]]] = json.loads(path.read_text(encoding="utf-8"))["result"]["stood"]
    return stood


def print_tables(result: dict[str, Any]) -> None:
    passes = {
        "context": "Tokens before", "tokens": "Tokens of the pass", "ms": "ms", "ratio": "Of a plain step",
        "gb_per_s": "GB/s",
    }  # fmt: skip
    print(markdown_table(result["passes"], passes) + "\n")
    drafts = {
        "drafter": "Drafter",
        "context": "Tokens before",
        "first_ms": "ms the first",
        "ms": "ms a further one",
        "gb_per_s": "GB/s",
    }
    print(markdown_table(result["drafts"], drafts) + "\n")
    loops = {
        "context": "Tokens before", "drafter": "Drafter", "imposed": "Acceptance", "ms_per_token": "ms a token",
        "plain_ms": "plain, ms", "speed_up": "Times plain", "ceiling": "Ceiling", "of_ceiling": "Of the ceiling",
        "begun": "Begun", "drafted_per_pass": "Drafted a pass", "stood_share": "Stood of looked at",
    }  # fmt: skip
    print(markdown_table(result["loops"], loops))


class Bench:
    """A model with its copy, requests over random rows, and the measurements."""

    def __init__(self, device: torch.device, contexts: Sequence[int], *, tiny: bool) -> None:
        self.device = device
        self.tiny = tiny
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        config = model_config({**(TINY if tiny else SHAPE_8B), "model_type": "llama", "rms_norm_eps": 1e-5})
        self.decoder, self.copy = random_decoders(config, device, dtype)
        self.draft_context = 64 if tiny else DRAFT_CONTEXT
        room = WARM_UP_TOKENS + TIMED_TOKENS + 64
        blocks = sum(-(-(tokens + room) // 64) for tokens in (*contexts, self.draft_context)) + 2
        self.pool = KVPool(self.decoder.layout, blocks, device)
        for pool in (*self.pool.keys, *self.pool.values):
            pool.normal_()
        self.rotary = RotaryTable.build(config.rope, config.head_dim, max(contexts) + room, device)
        self.runner = DecodeRunner(self.decoder, self.pool)
        self.verifier = VerifyRunner(self.decoder, self.pool, self.runner.scratch_slot)
        # Each with blocks of its own: a step looks at all that its request has.
        self.states = {context: self._state(context + room) for context in contexts}
        self.draft_state = self._state(self.draft_context + room)
        self.draft_runners = {}
        for name, model in (("self", self.decoder), ("self-4bit", self.copy)):
            self.draft_runners[name] = DraftRunner(model, self.pool, self.runner.scratch_slot, self.decoder)
        self.draft_times = {name: StepTimes() for name in self.draft_runners}
        self.costs = MeasuredCosts(device.type)

    def _state(self, tokens: int) -> DecodeState:
        kv = RequestKV(self.pool)
        kv.reserve(tokens)
        return self.runner.begin(kv, self.rotary)

    def measure(self, contexts: Sequence[int], drafters: Sequence[str], stood: dict[str, list[int]]) -> dict[str, Any]:
        """Return all three tables."""
        result: dict[str, Any] = {"dtype": str(self.decoder.dtype), "device": str(self.device)}
        if self.device.type == "cuda":
            result["ceilings"] = ceilings(self.device)
        result["drafts"] = [self.draft_steps(name) for name in self.draft_runners if name in drafters]
        draft_ms = {row["drafter"]: row["ms"] for row in result["drafts"]} | {"lookup": 0.0}
        result["passes"] = [row for context in contexts for row in self.passes(context)]
        result["loops"] = []
        for context in contexts:
            self.plain_loop(context)
            for name in drafters:
                imposed = [(f"{chance}", Stands(chance)) for chance in ACCEPTANCES]
                imposed += [("as on real weights", Stands(runs=stood[name]))] if name in stood else []
                for label, stands in imposed:
                    row = {"context": context, "drafter": name, "imposed": label}
                    row |= self.loop(context, name, label, stands, draft_ms[name])
                    print(row, flush=True)
                    result["loops"].append(row)
        return result

    def passes(self, context: int) -> list[dict[str, Any]]:
        """Return what a plain step (0 tokens drafted or verified) and passes over some tokens take, in turns."""
        state = self.states[context]
        kv = state.kv

        def step() -> None:
            int(self.runner.step([state], [5])[0].argmax())

        def verify(tokens: int) -> Callable[[], object]:
            tree = DraftTree.chain([7] * (tokens - 1))
            return lambda: self.verifier.verify([state], [5], [tree])[0].argmax(-1).tolist()

        runs: dict[int, Callable[[], object]] = {0: step} | {tokens: verify(tokens) for tokens in PASSES}
        spent: dict[int, list[float]] = {tokens: [] for tokens in runs}
        rounds = 2 if self.tiny else ROUNDS
        for round_number in range(rounds + 2):
            order = list(runs) if round_number % 2 else list(reversed(runs))
            for tokens in order:
                kv.num_tokens = context
                ms = timed(runs[tokens], self.device)
                if round_number > 1:  # the first rounds compile, capture and warm up
                    spent[tokens].append(ms)
        bytes_read = self.decoder_bytes() + context * self.pool.layout.bytes_per_token
        rows = []
        for tokens, each in spent.items():
            ms = statistics.median(each)
            rows.append({"context": context, "tokens": tokens, "ms": ms, "percentiles": percentiles(each)})
            # Of the same round, so that a card that slows down slows both.
            rows[-1]["ratio"] = statistics.median(a / b for a, b in zip(each, spent[0], strict=True))
            rows[-1]["gb_per_s"] = bytes_read / ms / 1e6
            print(rows[-1], flush=True)
        return rows

    def draft_steps(self, name: str) -> dict[str, Any]:
        """Return what one more drafted token takes over the short context."""
        runner, state = self.draft_runners[name], self.draft_state
        runner.prepare([state])
        for pending in (140, 150, 40, 20, 3, 1):  # the first are read without a graph, whose kernels are compiled here
            state.kv.num_tokens = self.draft_context
            runner.draft([state], [[5] * pending], 2)
        short, long = 1, 9
        spent: dict[int, list[float]] = {short: [], long: []}
        for round_number in range((2 if self.tiny else ROUNDS) + 2):
            for steps, each in spent.items():
                state.kv.num_tokens = self.draft_context
                pending = [5] * (1 + round_number % 2)  # as many as drafts that fell and that stood leave
                ms = timed(lambda steps=steps, own=pending: runner.draft([state], [own], steps), self.device)
                if round_number > 1:
                    each.append(ms)
        first, all_of_them = (statistics.median(each) for each in spent.values())
        ms = (all_of_them - first) / (long - short)
        read = self.draft_bytes(name)
        row = {"drafter": name, "context": self.draft_context, "ms": ms, "first_ms": first}
        row["gb_per_s"] = read / ms / 1e6 if ms > 0 else 0.0
        print(row, flush=True)
        return row

    def plain_loop(self, context: int) -> float:
        """Return milliseconds a token of plain decoding, the choice of tokens included."""
        state = self.states[context]
        state.kv.num_tokens = context
        token, count = 5, 8 if self.tiny else 64
        started = time.perf_counter()
        for _ in range(count):
            token = int(self.runner.step([state], [token])[0].argmax())
        return (time.perf_counter() - started) * 1e3 / count

    def loop(self, context: int, name: str, label: str, stands: Stands, draft_ms: float) -> dict[str, Any]:
        """Return what drafted decoding takes a token, plain decoding before and after it."""
        before = self.plain_loop(context)
        own = f"{name} {context} {label}"  # what stood is remembered by it, and each loop is to begin without
        drafter = (
            LookupDrafter(own, stands)
            if name == "lookup"
            else ModelDrafter(
                own, self.draft_runners[name], self.draft_state, self.draft_context,
                self.draft_bytes(name) / (self.decoder_bytes() + context * self.pool.layout.bytes_per_token),
                self.draft_times[name],
            )
        )  # fmt: skip
        warm_up, timed_tokens = (8, 16) if self.tiny else (WARM_UP_TOKENS, TIMED_TOKENS)
        sampling = SamplingConfig(max_new_tokens=warm_up + timed_tokens + MOST_DEPTH + 1)
        drafting = Drafting(drafter, limits=DraftLimits(depth=MOST_DEPTH))
        prompt = Prompt((Segment((1,)),))
        request = SpeculativeRequest(drafting, prompt, sampling, frozenset(), self.costs)
        acceptance = ImposedAcceptance(stands)
        request._acceptance = acceptance  # type: ignore[assignment]
        request.state = self.states[context]
        request.state.kv.num_tokens = context
        request.first(torch.zeros(self.decoder.config.vocab_size, device=self.device))
        started, at, looked_at = 0.0, 0, 0
        use = request.use()
        while len(request.token_ids) < warm_up + timed_tokens:
            if not started and len(request.token_ids) >= warm_up:
                at, use, looked_at = len(request.token_ids), request.use(), acceptance.looked_at
                started = time.perf_counter()
            advance([request], self.runner, self.verifier)
        spent = (time.perf_counter() - started) * 1e3
        tokens, end = len(request.token_ids) - at, request.use()
        request.close()
        after = self.plain_loop(context)
        passes = end.steps - use.steps
        plain_ms = (before + after) / 2
        row = {"ms_per_token": spent / tokens, "plain_ms": plain_ms, "speed_up": plain_ms * tokens / spent}
        expected = stands.expected
        rates = [expected[n] / (plain_ms + n * draft_ms) for n in range(MOST_DEPTH + 1)]
        row["ceiling"] = max(rates) * plain_ms
        row["of_ceiling"] = row["speed_up"] / row["ceiling"]
        row["best_length"] = rates.index(max(rates))
        row["drafted_per_pass"] = (end.drafted - use.drafted) / passes
        row["looked_at"] = acceptance.looked_at - looked_at
        row["stood_share"] = (end.accepted - use.accepted) / max(1, row["looked_at"])
        row["tokens_per_pass"] = tokens / passes
        row["begun"] = drafter.begun
        return row

    def draft_bytes(self, name: str) -> int:
        """Return the bytes that a step of the drafter reads over its short context."""
        weights = self.decoder_bytes() if name == "self" else self.copy_bytes()
        return weights + self.draft_context * self.pool.layout.bytes_per_token

    def decoder_bytes(self) -> int:
        """Return the bytes that a step reads of the weights: all but the embedding."""
        return sum(parameter_bytes(self.decoder.config)) * self.decoder.dtype.itemsize

    def copy_bytes(self) -> int:
        """Return the same of the copy: half a byte a weight, and two of scale and of zero a group; the last is kept."""
        *layers, vocabulary = parameter_bytes(self.decoder.config)
        return int(sum(layers) * (0.5 + 4 / GROUP)) + vocabulary * self.decoder.dtype.itemsize


def parameter_bytes(config: ModelConfig) -> list[int]:
    """Return the numbers of weights of all products, the vocabulary's last."""
    hidden, inner, heads = config.hidden_size, config.intermediate_size, config.num_q_heads + 2 * config.num_kv_heads
    layer = hidden * (heads + config.num_q_heads) * config.head_dim + 3 * hidden * inner
    return [layer] * config.num_layers + [config.vocab_size * hidden]


def random_decoders(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> tuple[Decoder, Decoder]:
    """Return a model of random weights, and one of the same shape with weights of 4 bits."""

    def tensor(name: str) -> Tensor:
        return torch.randn(shape_of(name, config), device=device, dtype=dtype) * 0.02

    weights = assemble_weights(tensor, config)
    copy = assemble_weights(tensor, config, int4_linear_of)
    return Decoder(config, weights), Decoder(
        config, dataclasses.replace(copy, embedding=weights.embedding, head=weights.head)
    )


def shape_of(name: str, config: ModelConfig) -> tuple[int, ...]:
    """Return the shape of a weight by its Hugging Face name."""
    hidden, head_dim = config.hidden_size, config.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "q_proj": (config.num_q_heads * head_dim, hidden),
        "k_proj": (config.num_kv_heads * head_dim, hidden),
        "v_proj": (config.num_kv_heads * head_dim, hidden),
        "o_proj": (hidden, config.num_q_heads * head_dim),
        "gate_proj": (config.intermediate_size, hidden),
        "up_proj": (config.intermediate_size, hidden),
        "down_proj": (hidden, config.intermediate_size),
        "embed_tokens": (config.vocab_size, hidden),
        "lm_head": (config.vocab_size, hidden),
    }
    return next((shape for part, shape in shapes.items() if part in name), (hidden,))


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Return milliseconds of one run, the device idle before and after."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - started) * 1e3


if __name__ == "__main__":
    main()
