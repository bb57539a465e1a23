"""How near blended prefill comes to full prefill: KL, answer likelihood and first tokens, by selector and budget.

    RAGKIT_DATA=... python benchmarks/blend_quality.py [--model NAME] [--items all|even|odd|N] [--dtype T] [--codec C]
        [--ratios 0.05,0.15] [--variants NAME,...] [--processes N] [--time-limit SECONDS] [--name RESULT]
        [--questions FILE.json] [--contexts prefix,isolated,neighbours [--chunk-tokens N]]

MuSiQue questions (10 passages each, the items whose gold answer stands in a passage), or those of any file of the
same form (`question`, `answers`, which may be empty, and `ctxs` with a `text` each; filing_questions.py writes one).
For each item full prefill gives the reference: the distribution of the first answer token, its greedy answer of 16
tokens, and the likelihood of the gold answer. A variant is a selector with or without change propagation at one
ratio; `d` is its KL from the reference, of the first token and as the mean over the 16 tokens, teacher-forced. The
recovered share is 1 - d / d_reuse, a ratio of means with a bootstrap over items; d_reuse is plain reuse of chunks
computed behind the prefix, through the bf16 codec. `--variants auto` lets each item find its own ratio, for three
values of `blend.auto_coverage`; `--ratios` has no part in it. `--variants question,shared` compares shared rows
with private ones. "NLL moved" is how far the gold answer's likelihood lies from full prefill's, whichever way, so that
noise does not cancel out.

`--contexts` compares what chunks are computed behind: for each, plain reuse and the default method at every ratio.
Which chunks stood before a chunk the file must say (`before`, a list of texts beside each `text`; filing_questions.py
writes it); or `--chunk-tokens N` cuts passages into chunks of at most N tokens as ragkit does it, and puts them into
the prompt in random order, so that neighbours seldom stand side by side there. `--study` compares settings of
propagation and of the default selector instead; look at even items only.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from parts import add_part_options, dealt, measured_rows
from report import data_folder, markdown_table, write_result

from ragkit.bench.answer_distance import ROOM_BEHIND, AnswerDistance, AnswerScorer
from ragkit.bench.blend_quality import NO_PROPAGATION, PLAIN_REUSE, REUSE_CONTEXT, BlendQuality, Variant
from ragkit.bench.musique import FILE_NAME, MusiqueItem, question_items
from ragkit.bench.recovery import Share, recoveries
from ragkit.chunking.registry import create_chunker
from ragkit.config import AUTO, BlendConfig, BlendRows, ChunkingConfig, KVConfig
from ragkit.generation.blend_pass import Propagation
from ragkit.generation.engine import Engine
from ragkit.generation.neighbours import nearest_segments
from ragkit.kvcache.coverage import configured_ratio
from ragkit.kvcache.kv_key import ContextKind
from ragkit.kvcache.selectors_cache_craft import CacheCraft
from ragkit.kvcache.selectors_deviation import DeviationAtOneLayer, DeviationOf, GradualFiltering
from ragkit.kvcache.selectors_question import QuestionAttention, TwoRounds
from ragkit.kvcache.selectors_static import Everything, FirstTokens, NoTokens, RandomTokens
from ragkit.kvcache.token_selection import LayerRange, TokenSelector
from ragkit.models.chat_template import ChatTemplate
from ragkit.models.tokenizer import ModelTokenizer
from ragkit.types import Document, Prompt, Segment, chunk_id_of

SYSTEM = "Answer the question based on the given passages."
INSTRUCTION = (
    "Answer the question based on the given passages. Answer within 5 words. "
    "Do NOT repeat the question or output any other words. Question: "
)
AUTO_COVERAGES = (0.6, 0.7, 0.8)
MARK = "\ue000"  # where the user's text stands in the rendered template


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="a name, folder or .gguf file")
    parser.add_argument("--questions", help="a JSON file of MuSiQue's form instead of MuSiQue")
    parser.add_argument("--items", default="odd", help="all, even, odd, or a number of items")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--codec", default="bf16")
    parser.add_argument("--context", default="prefix", choices=[kind.value for kind in ContextKind])
    parser.add_argument("--contexts", default="", help="compare these contexts instead of selectors")
    parser.add_argument("--chunk-tokens", type=int, default=0, help="cut passages; 0 takes them whole")
    parser.add_argument("--neighbour-tokens", type=int, default=KVConfig().neighbour_tokens)
    parser.add_argument("--ratios", default="0.02,0.05,0.1,0.15,0.3")
    parser.add_argument("--variants", default="", help="only these selectors; auto, shared: see above")
    parser.add_argument("--study", action="store_true", help="settings of propagation instead of selectors")
    add_part_options(parser)
    parser.add_argument("--name", default="blend_quality", help="name of the result")
    arguments = parser.parse_args()
    rows = measured_rows(__file__, arguments, measure)
    if rows is None:
        return
    table = summary([{label: AnswerDistance(**one) for label, one in row["variants"].items()} for row in rows])
    print(markdown_table(table, list(table[0])))
    limit = arguments.time_limit if math.isfinite(arguments.time_limit) else None
    settings = vars(arguments) | {"time_limit": limit, "model": Path(arguments.model).name}
    payload = {"settings": settings, "table": table, "items": rows}
    print("raw numbers:", write_result(arguments.name, payload))


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Return one row an item of this process's part: its index and the distances by variant."""
    items = question_items(questions_file(arguments.questions))
    engine = Engine.load(arguments.model, device=arguments.device, dtype=arguments.dtype, kv_tokens=2 * 9000)
    ratios = [float(ratio) for ratio in arguments.ratios.split(",")]
    num_layers = engine.decoder.config.num_layers
    contexts = [ContextKind(one) for one in arguments.contexts.split(",") if one]
    if contexts:
        variants = list(context_variants(contexts, ratios))
    else:
        variants = list(study(ratios) if arguments.study else make_variants(num_layers, ratios, arguments.variants))
    passages = Passages(engine.tokenizer, arguments.chunk_tokens, arguments.neighbour_tokens)
    if ContextKind.NEIGHBOURS in (*contexts, arguments.context) and not any(map(passages.have_neighbours, items)):
        sys.exit("nothing says which chunks are neighbours: give --chunk-tokens, or --questions with `before`")
    bench = Bench(engine, passages, arguments.codec, ContextKind(arguments.context))
    rows: list[dict[str, Any]] = []
    started = time.perf_counter()
    for item in dealt(chosen_items(items, arguments.items), arguments.part):
        distances = bench.score(item, variants)
        if distances is not None:
            rows.append({"index": item.index, "variants": {label: asdict(one) for label, one in distances.items()}})
            print(f"{len(rows)} items, {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
        if time.perf_counter() - started > arguments.time_limit:
            break
    return rows


def questions_file(given: str | None) -> Path:
    """Return the file that was given, or MuSiQue's."""
    if given is not None:
        return Path(given)
    folder = data_folder("musique")
    if folder is None:
        sys.exit("set RAGKIT_DATA to the folder of the benchmark data")
    return folder / FILE_NAME


def make_variants(num_layers: int, ratios: Sequence[float], only: str) -> Iterator[Variant]:
    """Yield the rows: plain reuse, everything, and each selector at each ratio with and without propagation.

    Ratios that the items find are measured where `only` names `auto`, and shared rows where it names `shared`.
    """
    selectors: list[TokenSelector] = [
        QuestionAttention(),
        _named(QuestionAttention(most_even=0.0), "question only"),
        TwoRounds(),
        FirstTokens(),
        RandomTokens(),
        DeviationAtOneLayer(DeviationOf.VALUES),
        DeviationAtOneLayer(DeviationOf.KEYS),
        DeviationAtOneLayer(DeviationOf.BOTH),
        GradualFiltering(num_layers),
        CacheCraft(),
    ]
    wanted = [one for one in only.split(",") if one]
    yield PLAIN_REUSE
    if "auto" in wanted:
        for coverage in AUTO_COVERAGES:
            ratio_found = configured_ratio(BlendConfig(ratio=AUTO, auto_coverage=coverage))
            yield Variant("question", QuestionAttention(), ratio_found)
    if not wanted:
        yield Variant("everything", Everything(), 1.0, NO_PROPAGATION)
    for ratio in ratios:
        if "shared" in wanted:
            yield Variant("question + propagation, shared rows", QuestionAttention(), ratio, rows=BlendRows.SHARED)
        for selector in selectors:
            if not wanted or selector.name in wanted:
                yield Variant(f"{selector.name} + propagation", selector, ratio)
                yield Variant(selector.name, selector, ratio, NO_PROPAGATION)


def context_variants(contexts: Sequence[ContextKind], ratios: Sequence[float]) -> Iterator[Variant]:
    """Yield plain reuse and the default method at each ratio, for each context.

    Behind the prefix the reuse is what all are compared with.
    """
    yield PLAIN_REUSE
    for context in contexts:
        if context is not REUSE_CONTEXT:
            yield Variant(f"{context}, reuse", NoTokens(), 0.0, NO_PROPAGATION, context)
        for ratio in ratios:
            yield Variant(f"{context}, question + propagation", QuestionAttention(), ratio, context=context)


def study(ratios: Sequence[float]) -> Iterator[Variant]:
    """Yield the default method, without propagation, keys that move less, other layers' attention."""
    yield PLAIN_REUSE
    for ratio in ratios:
        yield Variant("question + propagation", QuestionAttention(), ratio)
        yield Variant("question", QuestionAttention(), ratio, NO_PROPAGATION)
        for strength in (0.5, 0.75):
            name = f"question + propagation, keys by {strength:g}"
            yield Variant(name, QuestionAttention(), ratio, Propagation(key_strength=strength))
        for first, end in ((3 / 8, 5 / 8), (1 / 2, 2 / 3)):
            selector = QuestionAttention(layers=LayerRange(first, end))
            yield Variant(f"question + propagation, layers from {first:.3f} to {end:.3f}", selector, ratio)


class Passages:
    """The chunks of an item, and their neighbours.

    Args:
        tokenizer: the model's.
        chunk_tokens: passages are cut into chunks of at most so many tokens; 0 takes them whole.
        neighbour_tokens: as `kv.neighbour_tokens`.
    """

    def __init__(self, tokenizer: ModelTokenizer, chunk_tokens: int, neighbour_tokens: int) -> None:
        self._tokenizer = tokenizer
        self._neighbour_tokens = neighbour_tokens
        self._chunker = create_chunker(ChunkingConfig(max_tokens=chunk_tokens), tokenizer) if chunk_tokens else None

    def chunks(self, item: MusiqueItem, room: int) -> list[tuple[Segment, tuple[Segment, ...]]]:
        """Return each chunk with its neighbours; prefix, neighbours and chunk fit `room`."""
        found: list[tuple[Segment, tuple[Segment, ...]]] = []
        for number, texts in enumerate(self._texts(item)):
            segments = [self._segment(text, chunk_id_of(f"musique {item.index}", number, at)) for at, text in texts]
            before = [self._segment(text, "before") for text in (item.before[number] if item.before else ())]
            for index, segment in enumerate(segments):
                backwards = [*before, *segments[:index]][::-1]
                found.append(
                    (segment, nearest_segments(backwards, self._neighbour_tokens, room - len(segment.token_ids)))
                )
        if self._chunker is not None:
            random.Random(item.index).shuffle(found)
        return found

    def have_neighbours(self, item: MusiqueItem) -> bool:
        """Return whether any chunk of an item has neighbours."""
        return any(item.before) or any(len(texts) > 1 for texts in self._texts(item))

    def _texts(self, item: MusiqueItem) -> list[list[tuple[int, str]]]:
        """Return the chunks of each passage: where they begin, and their text."""
        if self._chunker is None:
            return [[(0, text)] for text in item.passages]
        documents = (Document.from_text(text) for text in item.passages)
        return [[(one.char_start, one.text) for one in self._chunker.chunk(document)] for document in documents]

    def _segment(self, text: str, chunk_id: str) -> Segment:
        return Segment(tuple(self._tokenizer.encode(text + "\n\n")), chunk_id)


class Bench:
    """Full prefill and variants of one model over items, one item at a time."""

    def __init__(self, engine: Engine, passages: Passages, codec: str, context: ContextKind) -> None:
        self.engine = engine
        self.passages = passages
        self.neighbours: dict[str | None, tuple[Segment, ...]] = {}
        template = ChatTemplate(engine.folder)
        rendered = template.render([{"role": "system", "content": SYSTEM}, {"role": "user", "content": MARK}])
        before, _, after = rendered.partition(MARK)
        self.prefix = Segment(tuple(engine.tokenizer.encode_template(before)))
        self.suffix = tuple(engine.tokenizer.encode_template(after))
        scorer = AnswerScorer(engine.decoder, engine.rotary, engine.pool)
        self.quality = BlendQuality(scorer, self.prefix.token_ids, codec, context, lambda one: self.neighbours[one])

    def score(self, item: MusiqueItem, variants: Sequence[Variant]) -> dict[str, AnswerDistance] | None:
        """Return the distances of each variant, or None where the item does not fit the model's window."""
        prompt = self.prompt(item)
        if len(prompt) + ROOM_BEHIND > self.engine.max_context:
            return None
        gold = self.engine.tokenizer.encode(item.answers[0]) if item.answers else ()
        return self.quality.score(prompt, variants, gold)

    def prompt(self, item: MusiqueItem) -> Prompt:
        """Return prefix | passages | question, as CacheBlend's benchmark words it."""
        chunks = self.passages.chunks(item, self.engine.max_context - len(self.prefix.token_ids))
        self.neighbours = {chunk.chunk_id: neighbours for chunk, neighbours in chunks}
        question = (*self.engine.tokenizer.encode(INSTRUCTION + item.question), *self.suffix)
        return Prompt((self.prefix, *(chunk for chunk, _ in chunks), Segment(question)))


def summary(items: Sequence[Mapping[str, AnswerDistance]]) -> list[dict[str, Any]]:
    """Return one row a variant, with 95% intervals of a bootstrap over items."""

    def percent(share: Share | None) -> str | None:
        return None if share is None else f"{100 * share.value:.1f} [{100 * share.low:.0f}, {100 * share.high:.0f}]"

    return [
        {
            "variant": row.variant,
            "items": row.prompts,
            "recomputed %": 100 * row.recomputed,
            "KL first": row.kl_first,
            "recovered %": percent(row.recovered_first),
            "KL of 16": row.kl_mean,
            "recovered % ": percent(row.recovered_mean),
            "first agrees %": 100 * row.agrees_first,
            "gold NLL": row.nll,
            "NLL recovered %": percent(row.recovered_nll),
            "NLL moved": row.nll_moved,
            "NLL moved, recovered %": percent(row.recovered_nll_moved),
            "largest logit difference": row.largest_logit_difference,
        }
        for row in recoveries(items, PLAIN_REUSE.label)
    ]


def chosen_items(items: Sequence[MusiqueItem], which: str) -> Sequence[MusiqueItem]:
    """Return all, the even-numbered, the odd-numbered, or the first few of the items."""
    if which in ("even", "odd"):
        return items[which == "odd" :: 2]
    return items if which == "all" else items[: int(which)]


def _named(selector: TokenSelector, name: str) -> TokenSelector:
    selector.name = name  # type: ignore[misc]
    return selector


if __name__ == "__main__":
    main()
