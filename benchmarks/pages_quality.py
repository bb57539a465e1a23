r"""What `ragkit eval needle` and `ragkit eval ruler` measure, with the documents shared out among processes of one GPU.

    python benchmarks/pages_quality.py needle --lengths 8192,65536 --strategies full,rag,pages --processes 8
    python benchmarks/pages_quality.py ruler --tasks kv_retrieval --lengths 32768 --items 5 --questions 10 \
        --strategies full,rag,pages --selectors min-max,window --budgets 2048,4096

A small model's kernels leave most of a card idle, so documents are read side by side: by threads of a process, each
with a stream of its own, whose kernels run at once, and by several processes, which take turns on a card. Every needle
has a document of its own, unless those of all depths stand together in one. Documents and answers are those of the
commands, and so is the raw file, benchmarks/results/pages_NAME.json, which is written while it is measured; a run that
was ended goes on with `--go-on` and the same arguments. Settings come from the environment (`RAGKIT_GENERATION_MODEL`,
`RAGKIT_PAGES_...`).
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from queue import Empty
from typing import Any

import torch
from earlier_answers import GAVE_UP, HOW, UNANSWERED, Document, Earlier, earlier_answers
from report import RESULTS, commit

from ragkit.bench.long_answers import AnswererTools, LongContextAnswerer, PagesVariants, frame_tokens
from ragkit.bench.long_context import LongContextEval, LongPlan
from ragkit.bench.long_items import LongTask, Material
from ragkit.bench.long_report import LongReport, Outcome, depth_cells, score_rows, task_cells
from ragkit.bench.long_strategies import make_answerers
from ragkit.bench.machine import machine_facts
from ragkit.bench.needle import NeedleTask, spaced_depths
from ragkit.bench.ruler_tasks import ruler_tasks
from ragkit.cli.eval_long import report_facts, report_json
from ragkit.cli.output import json_text
from ragkit.config import PageSelectorName
from ragkit.pipeline import Pipeline
from ragkit.progress import Silent
from ragkit.settings import load_settings

Place = tuple[int, int, int]  # of a document: its length, which task, which one of its kind


def main() -> None:
    arguments = parsed()
    lengths = sorted(int(part) for part in arguments.lengths.split(","))
    tasks = tasks_of(arguments)
    documents = 1 if arguments.together else arguments.depths
    count = arguments.needles * documents if arguments.evaluation == "needle" else arguments.items
    # The longest first, so that no process is left with one at the end.
    places = [(length, task, index) for length in lengths[::-1] for index in range(count) for task in range(len(tasks))]
    before = Earlier()
    if arguments.go_on:
        before = earlier_answers(path_of(arguments), facts_of(arguments, lengths), machine_facts())
        there = set(before.done)
        places = [place for place in places if document_of(place, tasks) not in there]
        if not places:
            print(f"nothing is left of {path_of(arguments)}")
            return
    context = multiprocessing.get_context("spawn")
    waiting, done = context.Queue(), context.Queue()
    for place in places:
        waiting.put(place)
    workers = [
        context.Process(target=work, args=(arguments, number % arguments.gpus, waiting, done), daemon=True)
        for number in range(min(arguments.processes, len(places)))
    ]
    for worker in workers:
        worker.start()
    Gathering(arguments, lengths, tasks, len(places), before).run(workers, done)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("evaluation", choices=["needle", "ruler"])
    parser.add_argument("--lengths", required=True, help="in tokens, separated by commas")
    parser.add_argument("--strategies", default="full,rag,pages")
    parser.add_argument("--selectors", default="", help="page selectors that pages compares")
    parser.add_argument("--budgets", default="", help="tokens that they find")
    parser.add_argument("--found-times", default="", help="how many times the budget selectors find first")
    parser.add_argument("--own-prefill", action="store_true", help="each selector reads the documents itself")
    parser.add_argument("--depths", type=int, default=11)
    parser.add_argument("--needles", type=int, default=3, help="random ones for each length and depth")
    parser.add_argument("--together", action="store_true", help="all depths in one document, with a question each")
    parser.add_argument("--tasks", default="", help="of RULER; all where left out")
    parser.add_argument("--items", type=int, default=5, help="documents for each task of RULER and length")
    parser.add_argument("--questions", type=int, default=1, help="about each document of a task that has several")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--gpus", type=int, default=1, help="that processes are shared out among")
    parser.add_argument("--time-limit", type=float, default=float("inf"), help="seconds; then what is done is written")
    parser.add_argument("--name", default="", help="behind pages_ in the name of the raw file")
    parser.add_argument("--go-on", action="store_true", help="keep the raw file's answers and ask for the others")
    return parser.parse_args()


def tasks_of(arguments: argparse.Namespace) -> list[LongTask]:
    if arguments.evaluation == "needle":
        return [NeedleTask(spaced_depths(arguments.depths), arguments.together)]
    return ruler_tasks([name for name in arguments.tasks.split(",") if name])


def variants_of(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "selectors": tuple(PageSelectorName(name) for name in arguments.selectors.split(",") if name),
        "budgets": tuple(int(number) for number in arguments.budgets.split(",") if number),
        "found_times": tuple(int(number) for number in arguments.found_times.split(",") if number),
        "own_prefill": arguments.own_prefill,
    }


def work(arguments: argparse.Namespace, gpu: int, waiting: Any, done: Any) -> None:
    """Answer documents until none waits; runs in a process of its own."""
    if arguments.gpus > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(gpu)  # nothing has looked at the GPUs yet
    config = load_settings().config
    models = Pipeline(Path(), config)  # for its models alone: no store is opened
    strategies = arguments.strategies.split(",")
    embedder = models.embedder if "rag" in strategies else None
    tools = AnswererTools(models.engine, embedder, config, PagesVariants(**variants_of(arguments)))
    data = os.environ.get("RAGKIT_DATA")
    material = Material(
        models.tokenizer,
        Path(data) if data else None,
        seed=arguments.seed,
        frame_tokens=frame_tokens(tools),
        questions=arguments.questions,
    )

    device = models.engine.decoder.device
    if device.type == "cuda":  # what all streams use is there before the first of them begins
        models.engine.rotary.table(1, 1)
        torch.cuda.synchronize()

    def take() -> None:
        tasks = tasks_of(arguments)
        stream = torch.cuda.stream(torch.cuda.Stream(device)) if device.type == "cuda" else nullcontext()
        with stream:
            answerers = make_answerers(strategies, tools)
            parent = multiprocessing.parent_process()
            while parent is not None and parent.is_alive():  # a parent that is killed ends nobody
                try:
                    place = waiting.get(timeout=1)
                except Empty:
                    return
                done.put((place, *answered(place, tasks, material, answerers)))

    with ThreadPoolExecutor(arguments.threads) as threads:
        for taken in [threads.submit(take) for _ in range(arguments.threads)]:
            taken.result()


def answered(
    place: Place, tasks: Sequence[LongTask], material: Material, answerers: Sequence[LongContextAnswerer]
) -> tuple[Sequence[Outcome], Sequence[str]]:
    """Return the answers to one document by every strategy, and what was left out."""
    length, task, index = place
    plan = LongPlan([tasks[task]], [length], [[index]])
    measured = LongContextEval(plan, material, answerers, lambda outcomes: [], {})
    measured.run(Silent())
    report = measured.report()
    return report.outcomes, report.notes


class Gathering:
    """Collects what processes answer, and writes it now and then."""

    def __init__(
        self,
        arguments: argparse.Namespace,
        lengths: Sequence[int],
        tasks: Sequence[LongTask],
        count: int,
        before: Earlier,
    ) -> None:
        self.arguments, self.lengths, self.tasks = arguments, lengths, tasks
        self.left = self.count = count
        self.before = before
        self.outcomes = [*before.outcomes]
        self.done = [*before.done]
        self.notes = dict.fromkeys(before.notes)
        self.started = self.written = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Of this run."""
        return time.perf_counter() - self.started

    def run(self, workers: Sequence[Any], done: Any) -> None:
        """Go on until all is done, nobody works any more, or the time is over; print what was found."""
        while self.left and self.seconds < self.arguments.time_limit:
            try:
                self.take(*done.get(timeout=1))
            except Empty:
                if not any(worker.is_alive() for worker in workers):
                    break
        if self.left:
            self.notes[f"{self.left} of {self.count + len(self.before.done)} {UNANSWERED}"] = None
        path = self.write()
        for row in score_rows(self.outcomes):
            print(
                f"{row.strategy:24} {row.task:18} {row.length:>9,} {row.score:6.1f} ({row.low:.0f}-{row.high:.0f}) "
                f"gold shown {row.gold_shown:.0f} n={row.questions} read {row.document_seconds:.1f}s"
            )
        print(f"raw numbers: {path}")
        for worker in workers:
            worker.kill()

    def take(self, place: Place, some: Sequence[Outcome], why: Sequence[str]) -> None:
        """Take the answers to a document, and what was left out."""
        self.left -= 1
        self.outcomes += some
        self.notes |= dict.fromkeys(why)
        if not any(GAVE_UP in note for note in why):
            self.done.append(document_of(place, self.tasks))
        said = " ".join(f"{one.strategy}={one.score:.2f}" for one in some[:8])
        read = max((one.document_seconds for one in some), default=0.0)
        print(f"{self.seconds:6.1f}s {place} {said} read {read:.1f}s", flush=True)
        if time.perf_counter() - self.written > 10:
            self.write()
            self.written = time.perf_counter()

    def write(self) -> Path:
        """Write the raw file, and return its path."""
        cells = depth_cells if self.arguments.evaluation == "needle" else task_cells
        order = {name: at for at, name in enumerate(dict.fromkeys(one.strategy for one in self.outcomes))}
        ordered = sorted(
            self.outcomes, key=lambda one: (order[one.strategy], one.task, one.length, one.index, one.number)
        )
        facts = facts_of(self.arguments, self.lengths)
        seconds = self.before.seconds + self.seconds
        report = LongReport(score_rows(ordered), cells(ordered), ordered, [*self.notes], facts, seconds)
        record = report_json(report, self.arguments.evaluation, [], interrupted=self.left > 0)
        record |= {"commit": commit(), "command": "python benchmarks/pages_quality.py " + " ".join(sys.argv[1:])}
        record["done"] = sorted(self.done)
        if others := [one for one in dict.fromkeys(self.before.commits) if one != record["commit"]]:
            record["earlier_commits"] = others
        RESULTS.mkdir(parents=True, exist_ok=True)
        path = path_of(self.arguments)
        partial = path.with_suffix(".partial")
        partial.write_text(json_text(record) + "\n", encoding="utf-8")
        partial.replace(path)
        return path


def document_of(place: Place, tasks: Sequence[LongTask]) -> Document:
    return place[0], tasks[place[1]].name, place[2]


def path_of(arguments: argparse.Namespace) -> Path:
    return RESULTS / f"pages_{arguments.name or arguments.evaluation}.json"


def facts_of(arguments: argparse.Namespace, lengths: Sequence[int]) -> dict[str, Any]:
    """Return the settings that the raw file names."""
    needles = arguments.evaluation == "needle"
    own = {
        key: getattr(arguments, key)
        for key in (("depths", "needles", "together") if needles else ("tasks", "items", "questions"))
    }
    facts = report_facts(load_settings().config, arguments.seed, public_texts=bool(os.environ.get("RAGKIT_DATA")))
    facts |= {"lengths": lengths, "strategies": arguments.strategies.split(","), **variants_of(arguments), **own}
    facts |= {name: getattr(arguments, name) for name in HOW}
    return facts


if __name__ == "__main__":
    main()
