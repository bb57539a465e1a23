"""How many drafted tokens stand on real weights, pass after pass: what `speculative_speed.py --stood` replays.

    RAGKIT_DATA=... python benchmarks/draft_runs.py [--generator NAME] [--tokens 7800] [--questions 8]
        [--sources xquad,emma] [--drafters lookup,self,self-4bit] [--quote] [--name draft_runs]

Every pass proposes 16 tokens, or as many as the drafter finds, whatever that costs, so that the run is seen to its end.
Greedy. With `--quote` questions ask for the words of the passages.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from report import markdown_table, write_result

from ragkit.bench.grounded_prompts import grounded_prompts, grounded_questions
from ragkit.generation.draft_control import DraftLimits
from ragkit.generation.draft_tree import DraftTree
from ragkit.generation.drafter import Drafter
from ragkit.generation.drafter_lookup import LookupDrafter
from ragkit.generation.drafter_self import self_drafter
from ragkit.generation.engine import Engine
from ragkit.generation.int4_projection import int4_copy
from ragkit.generation.sampling import SamplingConfig
from ragkit.generation.speculative_decode import Drafting, SpeculativeRequest

DEPTH = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generator", default="smollm2-135m-instruct")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--tokens", type=int, default=7800)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--questions", type=int, default=8)
    parser.add_argument("--sources", default="xquad,emma")
    parser.add_argument("--drafters", default="lookup,self,self-4bit")
    parser.add_argument("--context-tokens", type=int, default=1024, help="tokens of chunks that self drafts from")
    parser.add_argument("--quote", action="store_true")
    parser.add_argument("--name", default="draft_runs")
    options = parser.parse_args()
    room = 2 * (options.tokens + options.new_tokens + options.context_tokens)  # for a prompt, its answer and its drafts
    engine = Engine.load(options.generator, options.device, options.dtype, kv_tokens=room, offline=True)
    data = Path(os.environ["RAGKIT_DATA"]) if "RAGKIT_DATA" in os.environ else None
    prompts = [
        prompt
        for source in options.sources.split(",")
        for prompt in grounded_prompts(
            grounded_questions(source, data, options.questions), engine.prompt_builder(), engine.tokenizer,
            options.tokens, options.new_tokens, quote=options.quote,
        )
    ]  # fmt: skip
    sampling = SamplingConfig(max_new_tokens=options.new_tokens)
    stood: dict[str, list[tuple[int, int]]] = {}
    rows: list[dict[str, Any]] = []
    for name in options.drafters.split(","):
        limits = DraftLimits(depth=DEPTH, length=DEPTH)
        drafting = Drafting(drafter_of(name, engine, options.context_tokens), limits=limits)
        with recorded() as passes:
            for prompt in prompts:
                list(engine.generate(prompt.prompt, sampling, drafting=drafting))
        stood[name] = passes
        rows.append({"drafter": name} | summary(passes))
        print(rows[-1], flush=True)
    print(markdown_table(rows, list(rows[0])))
    print(write_result(options.name, {"options": vars(options), "drafters": rows, "stood": stood}))


class recorded:
    """Notes of every pass how many tokens stood behind each other, and how many could have."""

    def __enter__(self) -> list[tuple[int, int]]:
        passes: list[tuple[int, int]] = []
        self._observe: Callable[..., None] = SpeculativeRequest.observe
        observe = self._observe

        def noted(
            request: SpeculativeRequest, tree: DraftTree, accepted: int, context: int, pass_ms: float, draft_ms: float
        ) -> None:
            passes.append((tree.depth, accepted))
            observe(request, tree, accepted, context, pass_ms, draft_ms)

        SpeculativeRequest.observe = noted  # type: ignore[method-assign]
        return passes

    def __exit__(self, *_: object) -> None:
        SpeculativeRequest.observe = self._observe  # type: ignore[method-assign]


def drafter_of(name: str, engine: Engine, context_tokens: int) -> Drafter:
    """Return a drafter by name."""
    if name == "lookup":
        return LookupDrafter()
    copy = int4_copy(engine.decoder, engine.folder) if name == "self-4bit" else None
    return self_drafter(engine, context_tokens=context_tokens, decoder=copy)


def summary(passes: list[tuple[int, int]]) -> dict[str, float]:
    """Return the mean length of a pass's run, and the chance that a proposed token whose predecessors stand does."""
    tries = sum(min(stood + 1, proposed) for proposed, stood in passes)
    return {
        "passes": len(passes),
        "proposed": sum(proposed for proposed, _ in passes) / len(passes),
        "stood": sum(stood for _, stood in passes) / len(passes),
        "acceptance": sum(stood for _, stood in passes) / max(1, tries),
    }


if __name__ == "__main__":
    main()
