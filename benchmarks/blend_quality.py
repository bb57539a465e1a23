"""How near blended prefill comes to full prefill: KL, answer likelihood and first tokens, by selector and budget.

    RAGKIT_DATA=... python benchmarks/blend_quality.py [--model NAME] [--items all|even|odd|N] [--dtype T] [--codec C]
        [--ratios 0.05,0.15] [--variants NAME,...] [--time-limit SECONDS] [--name RESULT]

MuSiQue questions (10 passages each, the items whose gold answer stands in a passage). For each item full prefill
gives the reference: the distribution of the first answer token, its greedy answer of 16 tokens, and the likelihood of
the gold answer. A variant is a selector with or without change propagation at one ratio; `d` is its KL from the
reference, of the first token and as the mean over the 16 tokens, teacher-forced. The recovered share is
1 - d / d_reuse, a ratio of means with a bootstrap over items; d_reuse is plain reuse of chunks computed behind the
prefix, through the bf16 codec. `--study` compares settings of propagation and of the default
selector instead; look at even items only.
"""

from __future__ import annotations

import argparse
import json
import re
import string
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from report import data_folder, markdown_table, write_result
from torch import Tensor

from ragkit.generation.attention import PrefillAttention
from ragkit.generation.blend_pass import Propagation
from ragkit.generation.blend_prefill import BlendOptions, BlendPrefill
from ragkit.generation.chunk_prefill import ChunkPrefill
from ragkit.generation.engine import Engine
from ragkit.generation.full_prefill import FullPrefill
from ragkit.generation.strategy import PrefillRequest, PrefillStrategy
from ragkit.kvcache.codecs import make_codec
from ragkit.kvcache.eviction import make_policy
from ragkit.kvcache.kv_key import ContextKind, KVRecipe
from ragkit.kvcache.kv_store import KVStore
from ragkit.kvcache.memory_tier import MemoryTier
from ragkit.kvcache.request_kv import RequestKV
from ragkit.kvcache.selectors_deviation import DeviationAtOneLayer, DeviationOf, GradualFiltering
from ragkit.kvcache.selectors_question import QuestionAttention, TwoRounds
from ragkit.kvcache.selectors_static import Everything, FirstTokens, NoTokens, RandomTokens
from ragkit.kvcache.token_selection import TokenSelector
from ragkit.models.chat_template import ChatTemplate
from ragkit.types import Prompt, Segment, chunk_id_of

SYSTEM = "Answer the question based on the given passages."
INSTRUCTION = (
    "Answer the question based on the given passages. Answer within 5 words. "
    "Do NOT repeat the question or output any other words. Question: "
)
MARK = "\ue000"  # where the user's text stands in the rendered template
ANSWER_TOKENS = 16
NO_PROPAGATION = Propagation(key_strength=0.0, value_strength=0.0)
REUSE = "reuse"


@dataclass(frozen=True)
class Item:
    """One question with its passages."""

    index: int
    question: str
    answers: tuple[str, ...]
    passages: tuple[str, ...]


@dataclass(frozen=True)
class Variant:
    """One row of the table."""

    name: str
    selector: TokenSelector
    propagation: Propagation
    ratio: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="a name, folder or .gguf file")
    parser.add_argument("--items", default="odd", help="all, even, odd, or a number of items")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--codec", default="bf16")
    parser.add_argument("--context", default="prefix", choices=[kind.value for kind in ContextKind])
    parser.add_argument("--ratios", default="0.02,0.05,0.1,0.15,0.3")
    parser.add_argument("--variants", default="", help="only these selectors")
    parser.add_argument("--study", action="store_true", help="settings of propagation instead of selectors")
    parser.add_argument("--time-limit", type=float, default=float("inf"), help="seconds, then what is done is reported")
    parser.add_argument("--name", default="blend_quality", help="name of the result")
    arguments = parser.parse_args()
    folder = data_folder("musique")
    if folder is None:
        sys.exit("set RAGKIT_DATA to the folder of the benchmark data")
    engine = Engine.load(arguments.model, device=arguments.device, dtype=arguments.dtype, kv_tokens=2 * 9000)
    ratios = [float(ratio) for ratio in arguments.ratios.split(",")]
    num_layers = engine.decoder.config.num_layers
    variants = list(study(ratios) if arguments.study else make_variants(num_layers, ratios, arguments.variants))
    bench = Bench(engine, arguments.codec, ContextKind(arguments.context))
    rows: list[dict[str, Any]] = []
    started = time.perf_counter()
    with torch.inference_mode():
        for item in chosen_items(musique_items(folder), arguments.items):
            scored = bench.score(item, variants)
            if scored is not None:
                rows.append({"index": item.index, "variants": scored})
                print(f"{len(rows)} items, {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
            if time.perf_counter() - started > arguments.time_limit:
                break
    table = summary(rows)
    print(markdown_table(table, list(table[0])))
    payload = {"settings": vars(arguments) | {"time_limit": None}, "table": table, "items": rows}
    print("raw numbers:", write_result(arguments.name, payload))


def make_variants(num_layers: int, ratios: Sequence[float], only: str) -> Iterator[Variant]:
    """Yield the rows: plain reuse, everything, and each selector at each ratio with and without propagation."""
    selectors: list[TokenSelector] = [
        QuestionAttention(),
        _named(QuestionAttention(0.0), "question only"),
        TwoRounds(),
        FirstTokens(),
        RandomTokens(),
        DeviationAtOneLayer(DeviationOf.VALUES),
        DeviationAtOneLayer(DeviationOf.KEYS),
        DeviationAtOneLayer(DeviationOf.BOTH),
        GradualFiltering(num_layers),
    ]
    wanted = [one for one in only.split(",") if one]
    yield Variant(REUSE, NoTokens(), NO_PROPAGATION, 0.0)
    if not wanted:
        yield Variant("everything", Everything(), NO_PROPAGATION, 1.0)
    for ratio in ratios:
        for selector in selectors:
            if not wanted or selector.name in wanted:
                yield Variant(f"{selector.name} + propagation", selector, Propagation(), ratio)
                yield Variant(selector.name, selector, NO_PROPAGATION, ratio)


def study(ratios: Sequence[float]) -> Iterator[Variant]:
    """Yield settings of the default method."""
    yield Variant(REUSE, NoTokens(), NO_PROPAGATION, 0.0)
    for ratio in ratios:
        for share in (0.25, 0.5, 0.75, 1.0):
            selector = QuestionAttention(share)
            yield Variant(f"even {share:g}", selector, Propagation(), ratio)
            yield Variant(f"even {share:g} evidence", selector, Propagation(by_evidence=True), ratio)
        for sigma in (16.0, 32.0, 96.0):
            yield Variant(f"sigma {sigma:g}", QuestionAttention(), Propagation(sigma), ratio)
            yield Variant(f"sigma {sigma:g} evidence", QuestionAttention(), Propagation(sigma, by_evidence=True), ratio)
        for strength in (0.5, 0.75):
            yield Variant(f"strength {strength:g}", QuestionAttention(), Propagation(48.0, strength, strength), ratio)
        yield Variant("two rounds", TwoRounds(), Propagation(), ratio)
        yield Variant("two rounds evidence", TwoRounds(), Propagation(by_evidence=True), ratio)


class Bench:
    """Full prefill and variants of one model over items, one item at a time."""

    def __init__(self, engine: Engine, codec: str, context: ContextKind) -> None:
        self.engine = engine
        self.codec = codec
        self.context = context
        template = ChatTemplate(engine.folder)
        rendered = template.render([{"role": "system", "content": SYSTEM}, {"role": "user", "content": MARK}])
        before, _, after = rendered.partition(MARK)
        self.prefix = Segment(tuple(engine.tokenizer.encode_template(before)))
        self.suffix = tuple(engine.tokenizer.encode_template(after))

    def score(self, item: Item, variants: Sequence[Variant]) -> dict[str, dict[str, float]] | None:
        """Return the scores of each variant, or None where the item does not fit the model's window."""
        prompt = self.prompt(item)
        if len(prompt) + 64 > self.engine.max_context:
            return None
        gold = self.engine.tokenizer.encode(item.answers[0])
        reference = self.run(FullPrefill(), prompt, gold, None)
        out = {}
        for codec in dict.fromkeys(("bf16", self.codec)):
            context = ContextKind.PREFIX if codec == "bf16" and codec != self.codec else self.context
            with self.blend_store(codec) as store:
                for variant in variants:
                    if (variant.name == REUSE) != (codec == "bf16") and len({"bf16", self.codec}) > 1:
                        continue
                    strategy = BlendPrefill(
                        store,
                        self.chunk_prefill(codec, context),
                        BlendOptions(variant.ratio, variant.selector, variant.propagation),
                    )
                    got = self.run(strategy, prompt, gold, reference["answer"])
                    out[f"{variant.name} @ {variant.ratio:g}"] = compare(got, reference)
        return out

    def prompt(self, item: Item) -> Prompt:
        """Return prefix | passages | question, as CacheBlend's benchmark words it."""
        encode = self.engine.tokenizer.encode
        chunks = [
            Segment(tuple(encode(text + "\n\n")), chunk_id_of("musique", item.index, number))
            for number, text in enumerate(item.passages)
        ]
        return Prompt((self.prefix, *chunks, Segment((*encode(INSTRUCTION + item.question), *self.suffix))))

    def run(
        self, strategy: PrefillStrategy, prompt: Prompt, gold: Sequence[int], answer: Sequence[int] | None
    ) -> dict[str, Any]:
        """Return first logits, gold nats a token, and the logits along `answer` (or the own greedy one)."""
        engine = self.engine
        with RequestKV(engine.pool) as kv:
            total = len(prompt) + 64
            rotary = engine.rotary.table(total, len(prompt))
            result = strategy.prefill(engine.decoder, PrefillRequest(prompt, kv, rotary))
            kv.reserve(total)
            first = result.logits.float()
            if answer is None:
                answer = self.greedy(kv, rotary, first)
            along = torch.cat((first.unsqueeze(0), self.logits_behind(kv, rotary, answer[:-1])))
            behind_gold = torch.cat((first.unsqueeze(0), self.logits_behind(kv, rotary, gold[:-1])))
            targets = torch.tensor(list(gold), device=first.device).unsqueeze(1)
            nats = -behind_gold.log_softmax(-1).gather(1, targets).mean()
        chunk_tokens = sum(len(one.token_ids) for one in prompt.segments if one.chunk_id is not None)
        beside = len(prompt) - chunk_tokens if result.reused == 0 else len(prompt.segments[-1].token_ids)
        share = (result.recomputed - beside) / chunk_tokens
        return {"along": along, "nll": float(nats), "answer": list(answer), "recomputed": share}

    def greedy(self, kv: RequestKV, rotary: Any, first: Tensor) -> list[int]:
        """Return the greedy answer of `ANSWER_TOKENS` tokens, stop tokens included."""
        tokens = [int(first.argmax())]
        while len(tokens) < ANSWER_TOKENS:
            tokens.append(int(self.logits_behind(kv, rotary, tokens)[-1].argmax()))
        return tokens

    def logits_behind(self, kv: RequestKV, rotary: Any, token_ids: Sequence[int]) -> Tensor:
        """Return (tokens, vocab) fp32 logits after each of `token_ids`, computed behind the prompt and not kept."""
        decoder = self.engine.decoder
        if not token_ids:
            return torch.empty((0, decoder.config.vocab_size), device=decoder.device)
        attend = PrefillAttention(kv, rotary, kv.num_tokens, len(token_ids), decoder.scale)
        return decoder.logits(decoder.run(list(token_ids), attend)).float()

    def blend_store(self, codec: str) -> KVStore:
        """Return a store in memory, large enough for one item."""
        memory = MemoryTier("ram", 8 << 30, make_policy("lru"), self.engine.decoder.device)
        return KVStore(make_codec(codec, self.engine.decoder.layout), memory)

    def chunk_prefill(self, codec: str, context: ContextKind) -> ChunkPrefill:
        """Return what computes the chunks behind the canonical prefix."""
        recipe = KVRecipe("0" * 64, self.engine.decoder.config, "benchmark", self.engine.decoder.dtype, codec)
        return ChunkPrefill(self.engine.decoder, self.engine.rotary, recipe, self.prefix.token_ids, context)


def compare(got: Mapping[str, Any], reference: Mapping[str, Any]) -> dict[str, float]:
    """Return the distances of a variant from full prefill on one item."""
    theirs, mine = reference["along"].log_softmax(-1), got["along"].log_softmax(-1)
    divergence = (theirs.exp() * (theirs - mine)).sum(-1)
    return {
        "kl_first": float(divergence[0]),
        "kl_mean": float(divergence.mean()),
        "same_first": float(mine[0].argmax() == theirs[0].argmax()),
        "nll": got["nll"],
        "nll_full": reference["nll"],
        "recomputed": got["recomputed"],
        "largest_logit_difference": float((got["along"][0] - reference["along"][0]).abs().max()),
    }


def summary(items: Sequence[Mapping[str, Any]], resamples: int = 2000) -> list[dict[str, Any]]:
    """Return one row a variant, with 95% intervals of a bootstrap over items."""
    draws = np.random.default_rng(0).integers(0, len(items), (resamples, len(items)))
    names = list(items[0]["variants"])
    reuse = next(name for name in names if name.startswith(REUSE))

    def column(name: str, key: str) -> np.ndarray:
        return np.array([item["variants"][name][key] for item in items])

    def share(part: np.ndarray, whole: np.ndarray) -> str:
        # of the mean gap that plain reuse leaves, with the interval
        values = 100 * (1 - part[draws].mean(1) / whole[draws].mean(1))
        low, high = np.percentile(values, [2.5, 97.5])
        return f"{100 * (1 - part.mean() / whole.mean()):.1f} [{low:.0f}, {high:.0f}]"

    rows = []
    for name in names:
        gap = column(name, "nll") - column(name, "nll_full")
        reuse_gap = column(reuse, "nll") - column(reuse, "nll_full")
        rows.append(
            {
                "variant": name,
                "items": len(items),
                "recomputed %": 100 * float(column(name, "recomputed").mean()),
                "KL first": float(column(name, "kl_first").mean()),
                "recovered %": share(column(name, "kl_first"), column(reuse, "kl_first")),
                "KL of 16": float(column(name, "kl_mean").mean()),
                "recovered % ": share(column(name, "kl_mean"), column(reuse, "kl_mean")),
                "first agrees %": 100 * float(column(name, "same_first").mean()),
                "gold NLL": float(column(name, "nll").mean()),
                "NLL recovered %": share(gap, reuse_gap),
                "largest logit difference": float(column(name, "largest_logit_difference").max()),
            }
        )
    return rows


def musique_items(folder: Any) -> list[Item]:
    """Return the items whose answer stands in a passage."""
    items = []
    for index, one in enumerate(json.loads((folder / "musique_s.json").read_text(encoding="utf-8"))):
        passages = tuple(passage["text"] for passage in one["ctxs"])
        text = _plain(" ".join(passages))
        if any(_plain(answer) in text for answer in one["answers"]):
            items.append(Item(index, one["question"], tuple(one["answers"]), passages))
    return items


def chosen_items(items: Sequence[Item], which: str) -> Sequence[Item]:
    """Return all, the even-numbered, the odd-numbered, or the first few of the answerable items."""
    if which in ("even", "odd"):
        return items[which == "odd" :: 2]
    return items if which == "all" else items[: int(which)]


def _plain(text: str) -> str:
    kept = "".join(char for char in text.lower() if char not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", kept).split())


def _named(selector: TokenSelector, name: str) -> TokenSelector:
    selector.name = name  # type: ignore[misc]
    return selector


if __name__ == "__main__":
    main()
