"""`ragkit bench speculative`: how many drafted tokens stand, and what that saves, on the machine at hand."""

from __future__ import annotations

import os
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ragkit.cli.common import Session, flag
from ragkit.cli.measuring import check_places, write_results
from ragkit.cli.output import json_text
from ragkit.config import DraftMode
from ragkit.errors import UsageError

if TYPE_CHECKING:
    from ragkit.bench.draft_benchmark import DraftBenchmark
    from ragkit.bench.grounded_prompts import GroundedQuestion
    from ragkit.generation.engine import Engine
    from ragkit.generation.speculative_decode import Drafting
    from ragkit.pipeline import Pipeline

_DATA = "RAGKIT_DATA"
_STORE = "store"


def speculative(
    session: Session,
    drafters: Annotated[
        str, typer.Option("--drafters", metavar="NAME,NAME", help="What is compared with plain decoding.")
    ] = "lookup,self",
    transfer: Annotated[
        bool, typer.Option("--transfer", help="Also measure drafters that can in the mode transfer.")
    ] = False,
    source: Annotated[
        str | None,
        typer.Option(
            "--source",
            metavar="NAME",
            help="xquad or emma of RAGKIT_DATA, a file of MuSiQue's form, or store. [default: what is there]",
        ),
    ] = None,
    tokens: Annotated[int, typer.Option("--tokens", min=64, metavar="N", help="Tokens of a prompt.")] = 4096,
    items: Annotated[int, typer.Option("--items", min=1, metavar="N", help="Questions.")] = 5,
    rounds: Annotated[int, typer.Option("--rounds", min=1, metavar="N", help="How often each is answered.")] = 3,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=2, metavar="N", help="Most tokens of an answer.")
    ] = 96,
    temperature: Annotated[
        float, typer.Option("--temperature", min=0.0, metavar="T", help="0 takes the likeliest token each time.")
    ] = 0.0,
    quote: Annotated[
        bool, typer.Option("--quote", help="Ask for the words of the passages, so that answers copy.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Also write the raw numbers to this file, as JSON.")
    ] = None,
    generator: Annotated[
        str | None, typer.Option("--generator", metavar="NAME", help="Language model: a name, folder or hub id.")
    ] = None,
) -> None:
    """Compare drafted with plain decoding: how many tokens stood, and how much sooner the answer was there.

    All ways of answering take turns, so that a busy machine slows all of them.
    """
    check_places(out, None, lambda folder: None)
    settings = session.settings({"generation.model": flag(generator, "--generator")})
    names = [name.strip() for name in drafters.split(",") if name.strip()]
    if not names or "none" in names:
        raise UsageError(f"--drafters takes lookup, self or names of models, got {drafters!r}")
    with session.open(settings, create=True) as pipeline:
        questions = _questions(pipeline, source, items)
        with session.output.waiting("loading models …"):
            engine = pipeline.parts.engine
        from ragkit.bench.draft_benchmark import DraftBenchmark, table_lines
        from ragkit.bench.grounded_prompts import grounded_prompts

        room = engine.max_context - max_new_tokens
        ways = _ways(pipeline, engine, names, transfer=transfer)
        benchmark = DraftBenchmark(engine, ways, max_new_tokens, rounds, temperature)
        prompts = grounded_prompts(
            questions, engine.prompt_builder(), engine.tokenizer, min(tokens, room), max_new_tokens, quote=quote
        )
        with session.output.waiting("decoding …"):
            benchmark.run(prompts)
    if not benchmark.answers:
        raise UsageError("no answer had two tokens, so there is nothing to measure: ask other questions (--source)")
    data = _report(benchmark, settings.config.generation.model)
    if out is not None:
        write_results(out, json_text(data))
        session.output.note(f"wrote {out}")
    session.output.result(data, table_lines(benchmark.rows()))


def _questions(pipeline: Pipeline, source: str | None, items: int) -> list[GroundedQuestion]:
    from ragkit.bench.grounded_prompts import GroundedQuestion, grounded_questions

    data = Path(os.environ[_DATA]) if _DATA in os.environ else None
    if source is None:
        source = "xquad" if data is not None and (data / "xquad").is_dir() else _STORE
    if source != _STORE:
        return grounded_questions(source, data, items)
    from ragkit.bench.blend_prompts import questions_from

    store = pipeline.store  # an error that says what to do where there is none
    found = [
        GroundedQuestion(
            question.text,
            [one.stored.chunk.text for one in pipeline.parts.retriever.retrieve(question.text, 64).chunks],
        )
        for question in questions_from(store, items)
    ]
    if not found:
        raise UsageError("the store's chunks hold no sentence to make a question of: name another --source")
    return found


def _ways(pipeline: Pipeline, engine: Engine, names: list[str], *, transfer: bool) -> dict[str, Drafting]:
    from ragkit.drafting import make_drafter
    from ragkit.generation.acceptance import Transfer
    from ragkit.generation.draft_control import DraftLimits
    from ragkit.generation.speculative_decode import Drafting
    from ragkit.types import Prompt

    ways = {}
    base = pipeline.config.draft
    for name in names:
        config = replace(base, drafter=name, mode=DraftMode.EXACT, dropped_layers=0)
        drafter = make_drafter(pipeline.parts, config, blended=False, prompt=Prompt(()))
        limits = DraftLimits(config.depth)
        ways[name] = Drafting(drafter, limits=limits)
        if transfer and drafter.has_probabilities:
            ways[f"{name} transfer"] = Drafting(drafter, Transfer(config.strength), limits)
    return ways


def _report(benchmark: DraftBenchmark, model: str) -> dict[str, Any]:
    from ragkit.bench.draft_benchmark import rows_json
    from ragkit.bench.machine import machine_facts, versions

    return {
        "benchmark": "speculative",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": model,
        **rows_json(benchmark),
        "machine": machine_facts(),
        "versions": versions(),
    }
