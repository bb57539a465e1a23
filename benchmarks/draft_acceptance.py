"""How many drafted tokens stand with real weights on grounded questions, and how much faster answers come.

    RAGKIT_DATA=... python benchmarks/draft_acceptance.py [--generator NAME] [--device cpu|cuda] [--dtype TYPE]
        [--tokens 8000] [--questions 8] [--sources xquad,emma,FILE] [--drafters lookup,self] [--quote] [--name NAME]

FILE is one that `benchmarks/filing_questions.py` wrote (reports of companies). Prompts hold `--tokens` tokens of
passages; with `--quote` questions ask for the words of the passages. Prints one table a source.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from report import write_result

from ragkit.bench.draft_benchmark import DraftBenchmark, rows_json, table_lines
from ragkit.bench.grounded_prompts import grounded_prompts, grounded_questions
from ragkit.generation.drafter import Drafter
from ragkit.generation.drafter_lookup import LookupDrafter
from ragkit.generation.drafter_self import self_drafter
from ragkit.generation.engine import Engine
from ragkit.generation.speculative_decode import Drafting


def drafter_of(name: str, engine: Engine, context_tokens: int) -> Drafter:
    if name == "lookup":
        return LookupDrafter()
    if name == "self":
        return self_drafter(engine, context_tokens=context_tokens)
    from ragkit.generation.drafter_model import model_drafter

    return model_drafter(name, Engine.load(name, offline=True), engine)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--generator", default="smollm2-135m-instruct")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--tokens", type=int, default=7800)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--questions", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sources", default="xquad,emma")
    parser.add_argument("--drafters", default="lookup,self")
    parser.add_argument("--context-tokens", type=int, default=1024)
    parser.add_argument("--quote", action="store_true")
    parser.add_argument("--name", default="draft_acceptance")
    options = parser.parse_args()
    room = 2 * (options.tokens + options.new_tokens + options.context_tokens)  # for a prompt, its answer and its drafts
    engine = Engine.load(options.generator, options.device, options.dtype, kv_tokens=room, offline=True)
    drafters = {name: drafter_of(name, engine, options.context_tokens) for name in options.drafters.split(",")}
    data = Path(os.environ["RAGKIT_DATA"]) if "RAGKIT_DATA" in os.environ else None
    results = {}
    for source in options.sources.split(","):
        benchmark = DraftBenchmark(
            engine, {name: Drafting(drafter) for name, drafter in drafters.items()}, options.new_tokens, options.rounds
        )
        questions = grounded_questions(source, data, options.questions)
        prompts = grounded_prompts(
            questions, engine.prompt_builder(), engine.tokenizer, options.tokens, options.new_tokens,
            quote=options.quote,
        )  # fmt: skip
        benchmark.run(prompts)
        print(f"\n{Path(source).stem}{', quoting' if options.quote else ''}, {options.generator}:")
        print("\n".join(table_lines(benchmark.rows())), flush=True)
        results[Path(source).stem] = rows_json(benchmark)
    print(write_result(options.name, {"options": vars(options), "sources": results}))


if __name__ == "__main__":
    main()
