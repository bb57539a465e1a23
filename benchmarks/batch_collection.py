"""The side of batch_speed.py on a CPU: the bundled model over the examples' collection, in a loop and in a batch."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from report import markdown_table

from ragkit import Pipeline, PipelineConfig
from ragkit.config import AnswerConfig, GenerationConfig, Strategy
from ragkit.generation.batch_engine import BatchEngine
from ragkit.generation.batch_request import BatchRequest
from ragkit.generation.sampling import SamplingConfig
from ragkit.generation.steps import Finished

QUESTIONS = Path(__file__).with_name("collection_questions.txt")
COLLECTION = Path(__file__).resolve().parent.parent / "examples" / "collection"


def on_collection(count: int, rounds: int, strategy: Strategy) -> dict[str, Any]:
    """Return both ways over the collection, in turns, and whether their tokens agree."""
    questions = QUESTIONS.read_text(encoding="utf-8").splitlines()[:count]
    generation = GenerationConfig(strategy=strategy, max_new_tokens=64)
    config = PipelineConfig(generation=generation, answers=AnswerConfig(found_threshold=0.0))
    with tempfile.TemporaryDirectory() as folder, Pipeline.open(Path(folder) / "store", config) as pipeline:
        pipeline.ingest([COLLECTION])
        engine = pipeline.parts.engine
        # Every answer has all of its tokens, whatever the model says.
        engine.decoder.config = dataclasses.replace(engine.decoder.config, stop_token_ids=())
        for question in questions if strategy is Strategy.BLEND else questions[:1]:  # chunk KV is there, for both ways
            pipeline.query(question, max_new_tokens=1)
        list(pipeline.query_many(questions[:2]))
        spent: dict[str, list[float]] = {"loop": [], "batch": []}
        for _ in range(rounds):
            started = time.perf_counter()
            loop = [pipeline.query(question) for question in questions]
            spent["loop"].append(time.perf_counter() - started)
            started = time.perf_counter()
            batch = list(pipeline.query_many(questions))
            spent["batch"].append(time.perf_counter() - started)
            print({side: f"{values[-1]:.1f} s" for side, values in spent.items()}, flush=True)
        answers = [one.answer for one in batch]
        assert all(one is not None and one.tokens.generated == 64 for one in [*answers, *loop])
        equal = sum(one is not None and one.text == other.text for one, other in zip(answers, loop, strict=True))
        rows = [
            {"side": "Pipeline.query in a loop", **mean_times(spent["loop"], len(questions))},
            {"side": "Pipeline.query_many", **mean_times(spent["batch"], len(questions))},
        ]
        agreement = {} if strategy is Strategy.BLEND else token_agreement(pipeline, questions)
    speed_up = min(spent["loop"]) / min(spent["batch"])
    print(markdown_table(rows, {"side": "Side", "seconds": "Seconds", "ms_per_question": "ms a question"}))
    print(f"{speed_up:.2f} times, {equal} of {len(questions)} answers equal, {agreement}")
    return {
        "questions": len(questions),
        "strategy": strategy,
        "rows": rows,
        "samples": spent,
        "speed_up": speed_up,
        "equal_answers": equal,
        "agreement": agreement,
    }


def mean_times(seconds: Sequence[float], questions: int) -> dict[str, float]:
    return {"seconds": min(seconds), "ms_per_question": min(seconds) / questions * 1e3}


@torch.inference_mode()
def token_agreement(pipeline: Pipeline, questions: Sequence[str]) -> dict[str, Any]:
    """Return how many answers have equal tokens, and for the others the gap of the two best logits where they part.

    The noise of shapes is how far logits of one prompt move when it is computed in two pieces instead of one.
    """
    engine, builder = pipeline.parts.engine, pipeline.parts.engine.prompt_builder()
    sampling = SamplingConfig(64, ignore_stop_tokens=True)
    prompts = []
    for question in questions:
        found = pipeline.parts.retriever.retrieve(question, 8)
        chunks = [one.stored.chunk for one in found.chunks]
        prompts.append(builder.build(question, chunks, max_new_tokens=64).prompt)
    requests = [BatchRequest(str(at), prompt, sampling) for at, prompt in enumerate(prompts)]
    results = {int(one.request_id): one for one in BatchEngine(engine).run(requests)}
    noise, gaps = [], []
    for at, prompt in enumerate(prompts):
        alone = list(engine.generate(prompt, sampling))[-1]
        finished = results[at].finished
        assert isinstance(alone, Finished)
        assert finished is not None
        if alone.token_ids == finished.token_ids:
            continue
        same = next(i for i, (a, b) in enumerate(zip(alone.token_ids, finished.token_ids, strict=True)) if a != b)
        ids = [*prompt.token_ids, *alone.token_ids[:same]]
        whole = engine.forward(ids).logits.float()
        half = len(ids) // 2
        pieces = engine.forward(ids[half:], engine.forward(ids[:half]).kv).logits.float()
        noise.append(float((whole - pieces).abs().max()))
        best = whole.topk(2).values
        gaps.append(float(best[0] - best[1]))
    within = sum(gap <= 2 * one for gap, one in zip(gaps, noise, strict=True))
    return {
        "requests": len(prompts), "equal": len(prompts) - len(gaps), "gaps": gaps, "shape_noise": noise,
        "differing_within_noise": within,
    }  # fmt: skip
