"""Full prefill and decoding against Hugging Face transformers, side by side in one run.

On a GPU: the shape of Llama 3 8B with random weights, which both sides share. On a CPU (`--cpu`): the bundled model.

    python benchmarks/prefill_decode.py
    python benchmarks/prefill_decode.py --cpu

Both sides keep the KV of the prompt and compute logits for its last token alone. Before anything is timed, both are
compared with transformers in fp32 (on a GPU at the same shape with fewer layers): ours may not be further away than
theirs. Rounds alternate; figures are medians (p50) with p20 and p80 in the JSON.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from report import markdown_table, percentiles, write_result
from torch import Tensor

from ragkit.generation.attention import PrefillAttention
from ragkit.generation.contiguous_decode import ContiguousDecodeRunner
from ragkit.generation.decode_runner import DecodeRunner
from ragkit.generation.decode_state import StepRunner
from ragkit.generation.decoder import Decoder
from ragkit.generation.full_prefill import FullPrefill
from ragkit.generation.weights import assemble_weights
from ragkit.kvcache.pool import KVPool
from ragkit.kvcache.request_kv import RequestKV
from ragkit.kvcache.rope import RotaryTable
from ragkit.models.model_config import model_config

SHAPE_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
}
GPU_LENGTHS = (4096, 8192, 16384, 32768, 65536)
CPU_LENGTHS = (417, 2048)
ROUNDS = 5
DECODE_STEPS = 64
CHECK_TOKENS = 1000
CHECK_STEPS = 100
# Our distance from fp32 logits may be this many times theirs, and this much in fp32 itself.
CLOSE_AS_THEIRS = 1.1
CLOSE_IN_FP32 = 1e-4
CHECK_LAYERS = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="the bundled model on the CPU")
    parser.add_argument("--dtype", default="", help="bfloat16 or float32; bfloat16 on GPU, the engine's choice on CPU")
    parser.add_argument("--lengths", type=int, nargs="*", help="prompt lengths in tokens")
    parser.add_argument("--decode-at", type=int, help="tokens before the timed decoding steps; 0 skips them")
    arguments = parser.parse_args()
    on_cpu = arguments.cpu or not torch.cuda.is_available()
    device = torch.device("cpu" if on_cpu else "cuda")
    lengths = tuple(arguments.lengths or (CPU_LENGTHS if on_cpu else GPU_LENGTHS))
    decode_at = arguments.decode_at if arguments.decode_at is not None else (1024 if on_cpu else 8192)
    with torch.inference_mode():
        agreement = agreement_of_bundled(arguments.dtype) if on_cpu else agreement_of_random(device)
        print(agreement, flush=True)
        theirs, ours = bundled_models(arguments.dtype) if on_cpu else random_models(device)
        bench = Bench(theirs, ours, max(*lengths, decode_at + 2 * DECODE_STEPS))
        result: dict[str, Any] = {"dtype": str(ours.dtype), "device": str(device), "agreement": agreement}
        if not on_cpu:
            result["ceilings"] = ceilings(device)
        result["prefill"] = [bench.prefill(length) for length in lengths]
        if decode_at:
            result["decode"] = bench.decode(decode_at, result.get("ceilings"))
    path = write_result(f"prefill_decode_{'cpu' if on_cpu else 'gpu'}", result)
    columns = {
        "tokens": "Tokens", "transformers_ms": "transformers SDPA, ms", "ragkit_ms": "ragkit, ms",
        "speed_up": "Speed-up", "tokens_per_s": "ragkit tokens/s",
    }  # fmt: skip
    print(markdown_table(result["prefill"], columns))
    if decode_at:
        print("\ndecode:", result["decode"])
    print(f"\nraw numbers: {path}")


def random_models(device: torch.device) -> tuple[Any, Decoder]:
    """Return both sides at the 8B shape in bf16, with equal random weights."""
    theirs = random_llama(device, torch.bfloat16, SHAPE_8B["num_hidden_layers"])
    return theirs, ours_of(theirs, torch.bfloat16)


def random_llama(device: torch.device, dtype: torch.dtype, layers: float) -> Any:
    """Return transformers' Llama at the 8B shape with `layers` layers of random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**{**SHAPE_8B, "num_hidden_layers": layers})
    torch.set_default_dtype(dtype)
    with device:
        torch.manual_seed(0)
        model = LlamaForCausalLM._from_config(config, attn_implementation="sdpa").eval()
    torch.set_default_dtype(torch.float32)
    return with_fp32_rotation(model)


def with_fp32_rotation(model: Any) -> Any:
    """Return `model` with rotary frequencies in fp32, which a change of its dtype rounds."""
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config).to(model.device)
    return model


def ours_of(theirs: Any, dtype: torch.dtype) -> Decoder:
    """Return our decoder with the weights of a transformers model."""
    state, config = theirs.state_dict(), model_config(theirs.config.to_dict())
    return Decoder(config, assemble_weights(lambda name: state[name].to(dtype), config))


def bundled_models(dtype: str) -> tuple[Any, Decoder]:
    """Return both sides with the bundled model."""
    from transformers import AutoModelForCausalLM

    from ragkit.generation.placement import resolve_dtype
    from ragkit.models import resolve

    folder, device = resolve("smollm2-135m-instruct"), torch.device("cpu")
    chosen = resolve_dtype(dtype or "auto", device)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=chosen, attn_implementation="sdpa").eval()
    return theirs, Decoder.load(folder, device, chosen)


def agreement_of_random(device: torch.device) -> dict[str, float]:
    """Return distances from fp32 logits at the 8B shape with `CHECK_LAYERS` layers, after asserting the bound."""
    exact = random_llama(device, torch.float32, CHECK_LAYERS)
    tokens = check_tokens(exact.config.vocab_size, device)
    expected = last_logits(exact, tokens)
    ours = ours_of(exact, torch.bfloat16)
    theirs = with_fp32_rotation(exact.to(torch.bfloat16))
    return agreement(expected, theirs, ours, tokens)


def agreement_of_bundled(dtype: str) -> dict[str, float]:
    """Return distances from fp32 logits with the bundled model, after asserting the bound."""
    exact, _ = bundled_models("float32")
    theirs, ours = bundled_models(dtype)
    tokens = check_tokens(exact.config.vocab_size, ours.device)
    return agreement(last_logits(exact, tokens), theirs, ours, tokens)


def agreement(expected: Tensor, theirs: Any, ours: Decoder, tokens: Tensor) -> dict[str, float]:
    """Return how far both sides are from `expected` (tokens, vocab_size), ours by prefill and by decoding."""
    bench = Bench(theirs, ours, CHECK_TOKENS)
    prefilled, decoded = bench.check_logits(tokens)
    errors = {
        "transformers": distance(last_logits(theirs, tokens), expected),
        "prefill": distance(prefilled, expected),
        "decode": distance(decoded, expected),
    }
    bound = max(CLOSE_IN_FP32, CLOSE_AS_THEIRS * errors["transformers"])
    assert max(errors["prefill"], errors["decode"]) <= bound, f"{errors} is not within {bound}"
    return errors


def check_tokens(vocab_size: int, device: torch.device) -> Tensor:
    return torch.randint(0, vocab_size, (CHECK_TOKENS,), generator=torch.Generator().manual_seed(1)).to(device)


def last_logits(model: Any, tokens: Tensor) -> Tensor:
    logits: Tensor = model(tokens.unsqueeze(0), use_cache=False, logits_to_keep=CHECK_STEPS).logits[0].float()
    return logits


class Bench:
    """Both sides with one KV pool, and the measurements."""

    def __init__(self, theirs: Any, ours: Decoder, most_tokens: int) -> None:
        self.theirs = theirs
        self.ours = ours
        self.device = ours.device
        self.pool = KVPool(ours.layout, -(-most_tokens // 64) + 2, ours.device)
        self.rotary = RotaryTable.build(ours.config.rope, ours.config.head_dim, most_tokens, ours.device)
        self.runner: StepRunner = (
            DecodeRunner(ours, self.pool) if ours.device.type == "cuda" else ContiguousDecodeRunner(ours)
        )

    def _tokens(self, count: int) -> Tensor:
        generator = torch.Generator().manual_seed(count)
        return torch.randint(0, self.ours.config.vocab_size, (count,), generator=generator).to(self.device)

    def _prefill_ours(self, tokens: Tensor) -> tuple[Tensor, RequestKV]:
        kv = RequestKV(self.pool)
        return FullPrefill().extend(self.ours, kv, self.rotary, tokens), kv

    def _prefill_theirs(self, tokens: Tensor) -> Any:
        return self.theirs(tokens.unsqueeze(0), use_cache=True, logits_to_keep=1)

    def check_logits(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return our logits after each of the last `CHECK_STEPS` tokens: of one pass over all, and decoded singly."""
        kv = RequestKV(self.pool)
        kv.reserve(len(tokens))
        attend = PrefillAttention(kv, self.rotary, 0, len(tokens), self.ours.scale)
        prefilled = self.ours.logits(self.ours.run(tokens, attend).rows(slice(-CHECK_STEPS, None)))
        kv.release()
        _, kv = self._prefill_ours(tokens[:-CHECK_STEPS])
        kv.reserve(len(tokens))
        state = self.runner.begin(kv, self.rotary)
        decoded = [self.runner.step([state], [token])[0].clone() for token in tokens[-CHECK_STEPS:].tolist()]
        kv.release()
        return prefilled, torch.stack(decoded)

    def prefill(self, length: int) -> dict[str, Any]:
        """Return median milliseconds of both sides for a prompt of `length` tokens, measured in turns."""
        tokens = self._tokens(length)
        times: dict[str, list[float]] = {"transformers": [], "ragkit": []}
        for round_number in range(ROUNDS + 1):
            order = list(times) if round_number % 2 else list(reversed(times))
            for side in order:
                run = self._their_run if side == "transformers" else self._our_run
                spent = timed(lambda run=run: run(tokens), self.device)
                if round_number:  # the first round warms up
                    times[side].append(spent)
        row: dict[str, Any] = {"tokens": length}
        for side, spent in times.items():
            row |= {f"{side}_ms": statistics.median(spent), f"{side}_percentiles": percentiles(spent)}
        row["speed_up"] = row["transformers_ms"] / row["ragkit_ms"]
        row["tokens_per_s"] = length / row["ragkit_ms"] * 1e3
        print(row, flush=True)
        return row

    def _their_run(self, tokens: Tensor) -> None:
        self._prefill_theirs(tokens)

    def _our_run(self, tokens: Tensor) -> None:
        self._prefill_ours(tokens)[1].release()

    def decode(self, context: int, ceiling: dict[str, float] | None) -> dict[str, Any]:
        """Return milliseconds a token behind `context` tokens: choosing the token on the host is part of a step."""
        tokens = self._tokens(context)
        logits, kv = self._prefill_ours(tokens)
        kv.reserve(context + 2 * DECODE_STEPS)
        state = self.runner.begin(kv, self.rotary)
        spent = []
        for _ in range(2 * DECODE_STEPS):
            started = time.perf_counter()
            logits = self.runner.step([state], [int(logits.argmax())])[0]
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            spent.append((time.perf_counter() - started) * 1e3)
        kv.release()
        spent = spent[DECODE_STEPS:]  # the first steps warm up, and capture the graph
        row = {"tokens": context, "ragkit_ms": statistics.median(spent), "ragkit_percentiles": percentiles(spent)}
        row["transformers_ms"] = self._decode_theirs(tokens)
        row["read_gb"] = (self._weight_bytes() + context * self.ours.layout.bytes_per_token) / 1e9
        if ceiling:
            row["floor_ms"] = row["read_gb"] / ceiling["copy_gb_per_s"] * 1e3
            row["over_floor"] = row["ragkit_ms"] / row["floor_ms"]
        print(row, flush=True)
        return row

    def _decode_theirs(self, tokens: Tensor) -> float:
        out = self._prefill_theirs(tokens)
        spent = []
        for _ in range(8):
            started = time.perf_counter()
            following = out.logits[:, -1:].argmax(-1)
            out = self.theirs(following, past_key_values=out.past_key_values, use_cache=True)
            int(out.logits[0, -1, 0])
            spent.append((time.perf_counter() - started) * 1e3)
        return statistics.median(spent[2:])

    def _weight_bytes(self) -> int:
        # Every weight is read once a token but the embedding, of which one row is.
        config = self.ours.config
        all_weights = sum(parameter.numel() for parameter in self.theirs.parameters())
        embedding = 0 if config.tied_embeddings else config.vocab_size * config.hidden_size
        return (all_weights - embedding) * self.ours.dtype.itemsize


def ceilings(device: torch.device) -> dict[str, float]:
    """Return what this card does at best: GB/s of a copy, counting both ways, and TFLOP/s of a matrix product."""
    return {"copy_gb_per_s": _copy_rate(device), "matmul_tflops": _product_rate(device)}


def _copy_rate(device: torch.device) -> float:
    source = torch.randn(2**30, device=device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    return 4 * 2**30 / best(lambda: target.copy_(source), device) / 1e6


def _product_rate(device: torch.device) -> float:
    left = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    right = torch.randn_like(left)
    return 2 * 8192**3 / best(lambda: left @ right, device) / 1e9


def best(run: Callable[[], object], device: torch.device) -> float:
    run()
    return min(timed(run, device) for _ in range(10))


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Return milliseconds of one run, the device idle before and after."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - started) * 1e3


def distance(got: Tensor, expected: Tensor) -> float:
    """Return ||got - expected|| / ||expected||, the mean over rows of logits."""
    return float(((got.float() - expected).norm(dim=-1) / expected.norm(dim=-1)).mean())


if __name__ == "__main__":
    main()
