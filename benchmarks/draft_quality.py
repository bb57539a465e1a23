"""What `transfer` does to answers: against the target alone, and against the drafter's short prompt alone.

    RAGKIT_DATA=... python benchmarks/draft_quality.py [--generator NAME] [--tokens 4000] [--questions 60]
        [--source xquad] [--strengths 0,5,10,20] [--context-tokens 512]

Prompts hold `--tokens` tokens of passages, of which the short prompt has the best `--context-tokens`. An answer scores
1 where it holds the right answer's words. Differences to the target alone are paired, with 95% bootstrap intervals.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from report import markdown_table, paired_bootstrap, write_result

from ragkit.bench.bootstrap import mean_bootstrap
from ragkit.bench.grounded_prompts import GroundedPrompt, grounded_prompts, grounded_questions
from ragkit.bench.long_scores import AnswerMetric, score
from ragkit.bench.repeated_prefill import RepeatedPrefill
from ragkit.generation.acceptance import Transfer
from ragkit.generation.drafter_self import self_drafter, short_prompts
from ragkit.generation.engine import Engine
from ragkit.generation.full_prefill import FullPrefill
from ragkit.generation.sampling import SamplingConfig
from ragkit.generation.speculative_decode import Drafting

TARGET, SHORT = "target alone", "short prompt alone"


def scored(engine: Engine, item: GroundedPrompt, ways: dict[str, Drafting | None], options: Any) -> dict[str, Any]:
    sampling = SamplingConfig(options.new_tokens)
    prefill = RepeatedPrefill(FullPrefill())
    found: dict[str, Any] = {}
    for name, drafting in ways.items():
        prompt = short_prompts(item.prompt, options.context_tokens)[0] if name == SHORT else item.prompt
        *_, finished = engine.generate(prompt, sampling, "full" if name == SHORT else prefill, drafting=drafting)
        text = engine.tokenizer.decode(finished.token_ids)
        found[name] = {
            "score": score(AnswerMetric.PART, text, item.answers),
            "drafted": finished.draft.drafted,
            "accepted": finished.draft.accepted,
            "text": text,
        }
    return found


def table(results: Sequence[dict[str, Any]], names: Sequence[str]) -> list[dict[str, Any]]:
    target = [one[TARGET]["score"] for one in results]
    rows = []
    for name in names:
        own = [one[name]["score"] for one in results]
        mean, low, high = mean_bootstrap([own])
        change, least, most = paired_bootstrap(own, target)
        drafted = sum(one[name]["drafted"] for one in results)
        rows.append(
            {
                "way": name,
                "score": f"{mean:.3f} ({low:.3f} to {high:.3f})",
                "against target": "-" if name == TARGET else f"{change:+.3f} ({least:+.3f} to {most:+.3f})",
                "stood": f"{sum(one[name]['accepted'] for one in results) / drafted:.0%}" if drafted else "-",
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--generator", default="smollm2-135m-instruct")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--source", default="xquad")
    parser.add_argument("--tokens", type=int, default=4000)
    parser.add_argument("--context-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--questions", type=int, default=60)
    parser.add_argument("--strengths", default="0,5,10,20")
    parser.add_argument("--time-limit", type=float, default=3600.0, help="seconds after which no prompt is begun")
    parser.add_argument("--name", default="draft_quality")
    options = parser.parse_args()
    engine = Engine.load(options.generator, options.device, options.dtype, offline=True)
    drafter = self_drafter(engine, context_tokens=options.context_tokens)
    strengths = [float(text) for text in options.strengths.split(",")]
    ways: dict[str, Drafting | None] = {TARGET: None, SHORT: None, "exact": Drafting(drafter)}
    ways |= {f"transfer, eta {strength:g}": Drafting(drafter, Transfer(strength)) for strength in strengths}
    data = Path(os.environ["RAGKIT_DATA"]) if "RAGKIT_DATA" in os.environ else None
    questions = [one for one in grounded_questions(options.source, data, options.questions) if one.answers]
    prompts = list(
        grounded_prompts(questions, engine.prompt_builder(), engine.tokenizer, options.tokens, options.new_tokens)
    )
    began = time.perf_counter()
    results: list[dict[str, Any]] = []
    while len(results) < len(prompts) and time.perf_counter() - began < options.time_limit:
        results.append(scored(engine, prompts[len(results)], ways, options))
    rows = table(results, list(ways))
    print(markdown_table(rows, ["way", "score", "against target", "stood"]))
    print(
        write_result(
            options.name, {"options": vars(options), "prompts": len(results), "rows": rows, "answers": results}
        )
    )


if __name__ == "__main__":
    main()
