"""Citations, refusals and answers on xquad, with the product's defaults.

    RAGKIT_DATA=... python benchmarks/answer_quality.py [--generate N] [--generator NAME]

Citations: the gold span lies inside a quote; characters are those of all quotes of a question. Refusals: the question's
document removed from the store, one other document alone, and questions of another collection. The models were fitted
on even-indexed questions (`fit_answers.py`), so the odd-indexed ones are reported apart. `--generate` also generates
answers for N odd-indexed questions and scores them as SQuAD does.
"""

from __future__ import annotations

import argparse
import re
import string
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from answer_cases import Case, Collection, all_cases
from report import markdown_table, percentiles, write_result
from retrieval_data import load_question_sets

from ragkit.answers.citations import cite
from ragkit.answers.confidence import judge
from ragkit.config import AnswerConfig, EmbeddingConfig, GenerationConfig
from ragkit.retrieval.base import Embedder
from ragkit.retrieval.embedders import load_embedder

HALVES = {"fitted on": slice(0, None, 2), "held out": slice(1, None, 2), "all": slice(None)}
ANSWERABLE = ("answerable", "own document", "other collection, answerable")
WANTED = {"only its passage removed": "-"}  # the collection still speaks of what is asked
CONFIG = AnswerConfig()


def citation_rows(cases: Sequence[Case], embedder: Embedder) -> list[dict[str, Any]]:
    """Return one row a half: how often a quote holds the gold span, at how many characters."""
    found, characters, counts, reachable, longest = [], [], [], [], 0
    for case in cases:
        ((uri, start, stop),) = case.question.gold
        quotes = cite(case.question.text, None, case.hits, embedder, CONFIG)
        found.append(any(q.uri == uri and q.char_start <= start and stop <= q.char_stop for q in quotes))
        characters.append(sum(len(quote.quote) for quote in quotes))
        counts.append(len(quotes))
        longest = max([longest, *(len(quote.quote) for quote in quotes)])
        chunks = [(hit.uri, hit.chunk) for hit in case.hits]
        reachable.append(any(at == uri and c.char_start <= start and stop <= c.char_stop for at, c in chunks))
    return [
        {
            "questions": half, "n": len(found[part]), "gold in a quote %": 100 * float(np.mean(found[part])),
            "gold in a retrieved chunk %": 100 * float(np.mean(reachable[part])),
            "characters": float(np.mean(characters[part])), "quotes": float(np.mean(counts[part])),
            "longest quote": longest,
        }
        for half, part in HALVES.items()
    ]  # fmt: skip


def refusal_rows(
    cases: dict[str, list[Case]], embedder: Embedder
) -> tuple[list[dict[str, Any]], dict[str, list[float]]]:
    """Return the share refused of each kind of case, and every score."""
    rows, scores = [], {}
    for kind, items in cases.items():
        judged = [judge(case.question.text, case.hits, embedder, CONFIG) for case in items]
        refused = np.array([not one.found for one in judged])
        scores[kind] = [round(one.score, 4) for one in judged]
        halves = {f"{half} %": 100 * float(np.mean(refused[part])) for half, part in HALVES.items()}
        wanted = "at most 10" if kind in ANSWERABLE else WANTED.get(kind, "at least 70")
        rows.append({"asked": kind, "n": len(items), "wanted refused %": wanted, **halves})
    return rows, scores


def latency_row(cases: Sequence[Case], embedder: Embedder) -> dict[str, Any]:
    """Return the milliseconds of judging and citing, for questions with 8 chunks."""
    samples = {"judge": [], "cite": []}
    for case in [case for case in cases if len(case.hits) == 8][:60]:
        for name, work in (
            ("judge", lambda case=case: judge(case.question.text, case.hits, embedder, CONFIG)),
            ("cite", lambda case=case: cite(case.question.text, None, case.hits, embedder, CONFIG)),
        ):
            started = time.perf_counter()
            work()
            samples[name].append(1e3 * (time.perf_counter() - started))
    return {f"{name} {point}": value for name, ms in samples.items() for point, value in percentiles(ms[5:]).items()}


def generated_row(cases: Sequence[Case], golds: Sequence[str], name: str, embedder: Embedder) -> dict[str, Any]:
    """Return the token F1 of generated answers, and the citations that rest on them."""
    from ragkit.generation.engine import Engine
    from ragkit.generation.sampling import SamplingConfig

    engine = Engine.load(name, device="auto")
    builder = engine.prompt_builder()
    scores, held, quoted, answers = [], [], [], []
    for case, gold in zip(cases, golds, strict=True):
        chunks = [hit.chunk for hit in case.hits]
        built = builder.build(case.question.text, chunks, max_new_tokens=64)
        answer = "".join(step.piece for step in engine.generate(built.prompt, SamplingConfig(64, 0.0, 1.0, 0))).strip()
        ((uri, start, stop),) = case.question.gold
        quotes = cite(case.question.text, answer, case.hits, embedder, CONFIG)
        scores.append(token_f1(answer, gold))
        held.append(" ".join(_normalised(gold)) in " ".join(_normalised(answer)))
        quoted.append(any(q.uri == uri and q.char_start <= start and stop <= q.char_stop for q in quotes))
        answers.append({"question": case.question.text, "gold": gold, "answer": answer})
    return {
        "generator": name, "n": len(scores), "F1 %": 100 * float(np.mean(scores)),
        "answer holds gold %": 100 * float(np.mean(held)), "gold in a quote %": 100 * float(np.mean(quoted)),
        "answers": answers,
    }  # fmt: skip


def token_f1(answer: str, gold: str) -> float:
    """Return the F1 of the words of the two, articles and punctuation left out (Rajpurkar et al., 2016)."""
    mine, theirs = _normalised(answer), _normalised(gold)
    shared = sum((Counter(mine) & Counter(theirs)).values())
    return 2 * shared / (len(mine) + len(theirs)) if shared else 0.0


def _normalised(text: str) -> list[str]:
    plain = "".join(char for char in text.lower() if char not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--generate", type=int, default=0, metavar="N", help="generate answers for N questions")
    arguments.add_argument("--generator", default=GenerationConfig().model)
    options = arguments.parse_args()
    embedder = load_embedder(EmbeddingConfig(), device="cpu")
    sets = {data.name: data for data in load_question_sets(["xquad", "chunking_evaluation"])}
    with tempfile.TemporaryDirectory() as folder:
        collections = {name: Collection(data, embedder, Path(folder) / name) for name, data in sets.items()}
        cases = all_cases(collections)
    citations = citation_rows(cases["answerable"], embedder)
    refusals, scores = refusal_rows(cases, embedder)
    latency = latency_row(cases["answerable"], embedder)
    result: dict[str, Any] = {"citations": citations, "refusals": refusals, "milliseconds": latency, "scores": scores}
    print(markdown_table(citations, list(citations[0])), markdown_table(refusals, list(refusals[0])), sep="\n\n")
    print("\n" + markdown_table([latency], list(latency)))
    if options.generate:
        held_out = range(1, len(cases["answerable"]), 2)
        sample = list(held_out)[:: max(1, len(held_out) // options.generate)][: options.generate]
        texts = {uri: document.text for uri, document in sets["xquad"].documents.items()}
        chosen = [cases["answerable"][index] for index in sample]
        golds = [texts[uri][start:stop] for ((uri, start, stop),) in (case.question.gold for case in chosen)]
        result["generated"] = generated_row(chosen, golds, options.generator, embedder)
        columns = [name for name in result["generated"] if name != "answers"]
        print("\n" + markdown_table([result["generated"]], columns))
    write_result("answer_quality", result)


if __name__ == "__main__":
    main()
