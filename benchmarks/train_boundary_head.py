"""Train and evaluate the boundary head (`ragkit.chunking.boundary_head`) on the paragraphs of free documentation.

    python benchmarks/train_boundary_head.py [--sentences N] [--out FILE]

Training text: the manual of PostgreSQL 15 (Debian package postgresql-doc-15, PostgreSQL licence), paragraphs of at
least one sentence as its HTML marks them. Two neighbouring sentences of one paragraph are a pair of label 1, the last
sentence of a paragraph and the first of the next one a pair of label 0 (SAGE, arXiv 2503.01713). Pages are split by
the hash of their name, 80% for training, 10% to stop by, 10% for the table. The demo collection (SQLite's
documentation, public domain) is never trained on: it shows the head on text by other authors. The yardstick is the
cosine of the two vectors, which the semantic chunker cuts by.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ingest_speed import postgres_folder
from lxml import html
from numpy.typing import NDArray
from report import ROOT, markdown_table, write_result

from ragkit.chunking.boundary_head import (
    SHIPPED_HEAD,
    BoundaryHead,
    BoundaryHeadOptions,
    load_boundary_head,
    save_boundary_head,
)
from ragkit.chunking.sentences import sentence_spans
from ragkit.config import EmbeddingConfig
from ragkit.retrieval.embedders import load_embedder

HIDDEN, DROPOUT, LEARNING_RATE, WEIGHT_DECAY, BATCH, EPOCHS, SEED = 64, 0.5, 3e-4, 0.1, 128, 20, 0


@dataclass(frozen=True)
class Pairs:
    """Neighbouring sentences: (pairs, dim) vectors of both and 1.0 where they share a paragraph."""

    first: NDArray[np.float32]
    second: NDArray[np.float32]
    together: NDArray[np.float32]


def paragraphs(path: Path) -> list[list[str]]:
    """Return the sentences of each paragraph of an HTML page, in order."""
    found = []
    for element in html.fromstring(path.read_bytes()).iter("p"):
        text = " ".join(element.text_content().split())
        if len(text) >= 20:
            found.append([text[start:stop].strip() for start, stop in sentence_spans(text)])
    return found


def pages(folder: Path, sentences: int) -> dict[str, list[list[str]]]:
    """Return pages of two paragraphs or more in the order of their names' hashes until there are `sentences`."""
    chosen: dict[str, list[list[str]]] = {}
    count = 0
    for path in sorted(folder.glob("*.html"), key=lambda path: digest(path.name)):
        if count >= sentences:
            break
        page = paragraphs(path)
        if len(page) > 1:
            chosen[path.name] = page
            count += sum(map(len, page))
    return chosen


def digest(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4])


def pairs_of(some: Iterable[list[list[str]]], embedder: Any) -> Pairs:
    """Return the pairs of some pages, every sentence embedded once."""
    some = list(some)
    vectors = embedder.encode([sentence for page in some for paragraph in page for sentence in paragraph])
    first, together = zip(*_rows(some), strict=True)
    rows = np.asarray(first)
    return Pairs(vectors[rows], vectors[rows + 1], np.asarray(together, dtype=np.float32))


def _rows(some: list[list[list[str]]]) -> Iterator[tuple[int, float]]:
    row = 0
    for page in some:
        for number, paragraph in enumerate(page):
            for _ in paragraph[1:]:
                yield row, 1.0
                row += 1
            if number + 1 < len(page):
                yield row, 0.0
            row += 1


def train(data: Pairs, check: Pairs, embedder_id: str) -> BoundaryHead:
    """Return the head with the best area under the curve on `check` over all epochs."""
    torch.manual_seed(SEED)
    dim = data.first.shape[1]
    hidden, output = torch.nn.Linear(4 * dim, HIDDEN), torch.nn.Linear(HIDDEN, 1)
    parameters = [*hidden.parameters(), *output.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    # Components of unit vectors are tiny, their products more so: the head learns on numbers around one, and the
    # scale is put into its weights afterwards.
    scale = dim**0.5
    column_scale = np.repeat(np.float32([scale, scale, scale, scale**2]), dim)
    first, second = (torch.from_numpy(part) * scale for part in (data.first, data.second))
    together = torch.from_numpy(data.together)
    # Both labels weigh the same, whatever the length of the paragraphs.
    share = together.mean()
    weight = torch.where(together > 0, 0.5 / share, 0.5 / (1 - share))
    best, best_score = None, 0.0
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(together)).split(BATCH):
            one, two = first[batch], second[batch]
            features = torch.cat([one, two, one - two, one * two], dim=1)
            dropped = torch.nn.functional.dropout(hidden(features).relu(), DROPOUT)
            odds = output(dropped)[:, 0]
            loss = torch.nn.functional.binary_cross_entropy_with_logits(odds, together[batch], weight[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        head = BoundaryHead(
            hidden.weight.detach().numpy() * column_scale,
            hidden.bias.detach().numpy().copy(),
            output.weight.detach().numpy()[0].copy(),
            float(output.bias.detach()),
            embedder_id,
        )
        score = area_under_curve(head.log_odds_together(check.first, check.second), check.together)
        if score > best_score:
            best, best_score = head, score
    assert best is not None
    return best


def area_under_curve(scores: NDArray[np.float64], labels: NDArray[np.float32]) -> float:
    """Return the probability that a pair of label 1 scores above one of label 0, ties counted half."""
    _, place, count = np.unique(scores, return_inverse=True, return_counts=True)
    rank = (np.cumsum(count) - (count - 1) / 2)[place]
    ones = labels > 0
    above = rank[ones].sum() - ones.sum() * (ones.sum() + 1) / 2
    return float(above / (ones.sum() * (~ones).sum()))


def evaluation(name: str, data: Pairs, head: BoundaryHead) -> dict[str, Any]:
    """Return how well head and cosine tell the labels apart, and the head's balanced accuracy at its threshold."""
    odds = head.log_odds_together(data.first, data.second)
    cosine = np.einsum("pd,pd->p", data.first, data.second).astype(np.float64)
    threshold = BoundaryHeadOptions().threshold
    said = odds > np.log(threshold / (1 - threshold))
    ones = data.together > 0
    return {
        "text": name,
        "pairs": len(ones),
        "boundaries": int((~ones).sum()),
        "auc_head": area_under_curve(odds, data.together),
        "auc_cosine": area_under_curve(cosine, data.together),
        "balanced_accuracy": float((said[ones].mean() + (~said[~ones]).mean()) / 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sentences", type=int, default=8_000)
    parser.add_argument("--out", type=Path, default=SHIPPED_HEAD)
    options = parser.parse_args()
    manual = postgres_folder()
    if manual is None:
        raise SystemExit("the Debian package postgresql-doc-15 is not installed: apt-get install postgresql-doc-15")
    embedder = load_embedder(EmbeddingConfig())
    chosen = pages(manual, options.sentences)
    tenths: list[list[list[list[str]]]] = [[] for _ in range(10)]
    for name, page in chosen.items():
        tenths[digest("split " + name) % 10].append(page)
    training = pairs_of([page for tenth in tenths[2:] for page in tenth], embedder)
    head = train(training, pairs_of(tenths[1], embedder), embedder.embedder_id)
    recipe = f"{len(training.together)} pairs of {len(chosen)} pages of postgresql-doc-15, hidden {HIDDEN}, seed {SEED}"
    save_boundary_head(head, options.out, recipe)
    shipped = load_boundary_head(options.out)
    demo = pages(ROOT / "examples" / "collection", 800).values()
    rows = [
        evaluation("PostgreSQL, held-out pages", pairs_of(tenths[0], embedder), shipped),
        evaluation("SQLite documentation", pairs_of(demo, embedder), shipped),
    ]
    columns = {
        "text": "Text",
        "pairs": "Pairs",
        "boundaries": "Boundaries",
        "auc_head": "AUC, head",
        "auc_cosine": "AUC, cosine",
        "balanced_accuracy": "Balanced accuracy at 0.55",
    }
    print(markdown_table(rows, columns))
    print(f"\nraw numbers: {write_result('boundary_head', {'recipe': recipe, 'rows': rows})}")


if __name__ == "__main__":
    main()
