"""Fits the two small models of `ragkit.answers` and prints the lines that stand there.

    RAGKIT_DATA=... python benchmarks/fit_answers.py

Fitted on the even-indexed questions of xquad alone: the support of a sentence (which one holds the gold span, a
softmax over all sentences of the hits) and the confidence that an answer is there (the whole collection against the
collection without the question's document). `answer_quality.py` reports the odd-indexed ones.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from answer_cases import Case, Collection
from retrieval_data import load_question_sets

from ragkit.answers.confidence import SIGNAL_NAMES, signals_of
from ragkit.answers.evidence import SUPPORT_COLUMNS, Evidence, gather_evidence
from ragkit.config import EmbeddingConfig
from ragkit.retrieval.base import Embedder
from ragkit.retrieval.embedders import load_embedder

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

RIDGE = 1e-3  # on standardised weights


def fit_support(cases: Sequence[Case], embedder: Embedder) -> dict[str, float]:
    """Return the weight of each column by conditional logistic regression."""
    tables, labels = [], []
    for case in cases:
        evidence = gather_evidence(case.question.text, None, case.hits)
        gold = np.array(gold_sentences(case, evidence))
        if not gold.any():
            continue
        vectors = embedder.encode([sentence.text for sentence in evidence.sentences])
        dense = vectors @ embedder.encode_queries([case.question.text])[0]
        columns = [getattr(evidence.support, name) for name in SUPPORT_COLUMNS if name != "answer"]
        tables.append(np.column_stack([dense, *columns]))
        labels.append(gold)
    owner = torch.cat([torch.full((len(rows),), index) for index, rows in enumerate(tables)])
    table, gold = torch.tensor(np.concatenate(tables)), torch.tensor(np.concatenate(labels))

    def loss(weights: torch.Tensor, standard: torch.Tensor) -> torch.Tensor:
        scores = standard @ weights
        shares = torch.exp(scores - scores.max().detach())
        zeros = torch.zeros(len(tables), dtype=shares.dtype)
        held = zeros.index_add(0, owner[gold], shares[gold])
        return -(held / zeros.index_add(0, owner, shares)).log().mean()

    names = ["dense", *(name for name in SUPPORT_COLUMNS if name != "answer")]
    weights, _ = minimise(table, loss, bias=False)
    return dict(zip(names, weights, strict=True))


def fit_confidence(answerable: Sequence[Case], unanswerable: Sequence[Case], embedder: Embedder) -> dict[str, float]:
    """Return the bias and the weight of each signal by logistic regression."""
    rows = [signals_of(case.question.text, case.hits, embedder) for case in (*answerable, *unanswerable)]
    table = torch.tensor([[getattr(row, name) for name in SIGNAL_NAMES] for row in rows], dtype=torch.float64)
    truth = torch.tensor([1.0] * len(answerable) + [0.0] * len(unanswerable), dtype=torch.float64)

    def loss(weights: torch.Tensor, standard: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.binary_cross_entropy_with_logits(standard @ weights[:-1] + weights[-1], truth)

    weights, bias = minimise(table, loss, bias=True)
    return {"bias": bias, **dict(zip(SIGNAL_NAMES, weights, strict=True))}


def minimise(table: torch.Tensor, loss: Loss, *, bias: bool) -> tuple[list[float], float]:
    """Return the weights (and bias) of the raw columns that minimise `loss` with a ridge on the standardised ones."""
    mean, deviation = table.mean(0), table.std(0) + 1e-9
    standard = (table - mean) / deviation
    weights = torch.zeros(table.shape[1] + bias, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([weights], max_iter=500, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimiser.zero_grad()
        total = loss(weights, standard) + RIDGE * (weights[: table.shape[1]] ** 2).sum()
        total.backward()
        return total

    optimiser.step(closure)
    found = weights.detach()
    raw = found[: table.shape[1]] / deviation
    return raw.tolist(), float(found[-1] - (raw * mean).sum()) if bias else 0.0


def gold_sentences(case: Case, evidence: Evidence) -> list[bool]:
    """Return for each sentence whether the gold span lies in it."""
    ((uri, start, stop),) = case.question.gold
    return [
        case.hits[sentence.hit].uri == uri and sentence.char_start <= start and stop <= sentence.char_stop
        for sentence in evidence.sentences
    ]


def main() -> None:
    embedder = load_embedder(EmbeddingConfig(), device="cpu")
    (data,) = load_question_sets(["xquad"])
    with tempfile.TemporaryDirectory() as folder:
        collection = Collection(data, embedder, Path(folder) / "xquad")
        answerable = [collection.ask(question) for question in data.questions[::2]]
        unanswerable = list(collection.without_own_document())[::2]
    for name, fitted in (
        ("WEIGHTS", fit_support(answerable, embedder)),
        ("MODEL", fit_confidence(answerable, unanswerable, embedder)),
    ):
        print(f"{name}: " + ", ".join(f"{key}={value:.2f}" for key, value in fitted.items()))


if __name__ == "__main__":
    sys.exit(main())
