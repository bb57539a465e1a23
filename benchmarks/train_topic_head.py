"""Train and evaluate the topic head: the boundary head on paragraphs, for sections of legal and technical text.

    python benchmarks/train_topic_head.py [--pages N] [--out FILE]

Same-topic prediction (Aumiller et al., ICAIL 2021, "Structural Text Segmentation of Legal Documents"): two paragraphs
share a section or do not, each decision by itself. Training text: the manual of PostgreSQL 15 (Debian package
postgresql-doc-15, PostgreSQL licence), whose HTML marks sections; titles are left out, so that only the text tells.
Each paragraph makes a pair with the next one, which is what a chunker asks and the best of the paper's regimes; three
more pairs of each label from elsewhere on the page, its other regime, were tried and gave 0.81 in the first row. Pages
are split by the hash of their name, 80% for training, 10% to stop by, 10% for the table.

Legal text is never trained on: the table's second row are the licences that Debian installs, cut where a numbered
section starts, their numbers and titles left out. Yardsticks are the cosine of the two vectors and the shipped boundary
head, which was trained on sentences.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from ingest_speed import postgres_folder
from lxml import html
from report import markdown_table, write_result
from train_boundary_head import HIDDEN, SEED, Pairs, area_under_curve, digest, evaluation, train

from ragkit.chunking.boundary_head import load_boundary_head, save_boundary_head
from ragkit.chunking.topic import SHIPPED_TOPIC_HEAD
from ragkit.config import EmbeddingConfig
from ragkit.retrieval.embedders import load_embedder

LICENCES = Path("/usr/share/common-licenses")
LICENCE_NAMES = ("Apache-2.0", "Artistic", "GFDL-1.3", "GPL-2", "GPL-3", "LGPL-2.1", "MPL-1.1", "MPL-2.0")
SHORTEST = 20  # characters of a paragraph
_SECTION = re.compile(r"(?:ref)?sect\d|chapter|preface|appendix|refsynopsisdiv")
_NUMBER = re.compile(r"\s*(?:Section\s+)?\d{1,2}\.?(?:\s|$)")
_NUMBERING = re.compile(r"\s*(?:\(?[a-z0-9]{1,4}[.)]|\d+(?:\.\d+)+\.?)\s+")
_TITLE = 60  # characters up to which a numbered paragraph without a full stop inside is a title

Page = list[list[str]]  # sections of paragraphs


def manual_page(path: Path) -> Page:
    """Return the paragraphs of each section of an HTML page; a section within another one counts for itself."""
    sections: list[tuple[Any, list[str]]] = []
    for element in html.fromstring(path.read_bytes()).iter("p"):
        text = " ".join(element.text_content().split())
        if len(text) < SHORTEST:
            continue
        owner = next((up for up in element.iterancestors("div") if _SECTION.fullmatch(up.get("class") or "")), None)
        if not sections or sections[-1][0] is not owner:
            sections.append((owner, []))
        sections[-1][1].append(text)
    return [paragraphs for _, paragraphs in sections]


def licence(path: Path) -> Page:
    """Return the paragraphs of each numbered section of a licence, numbers and titles left out."""
    sections: Page = [[]]
    for block in re.split(r"\n\s*\n", path.read_text(encoding="utf-8")):
        opens = _NUMBER.match(block)
        if opens:
            sections.append([])
        numbering = opens or _NUMBERING.match(block)
        text = " ".join(block[numbering.end() if numbering else 0 :].split())
        if len(text) >= SHORTEST and not _is_title(text, bool(opens)):
            sections[-1].append(text)
    return [section for section in sections if section]


def _is_title(text: str, numbered: bool) -> bool:
    return (numbered and len(text) < _TITLE) or "----" in text or not any(char.islower() for char in text)


def _rows(pages: Sequence[Page]) -> Iterator[tuple[int, float]]:
    """Yield, for each pair of neighbours of a page, the row of the first and 1.0 where both stand in one section."""
    start = 0
    for page in pages:
        owners = [number for number, section in enumerate(page) for _ in section]
        yield from ((start + row, float(one == other)) for row, (one, other) in enumerate(pairwise(owners)))
        start += len(owners)


def pairs_of(pages: Sequence[Page], embedder: Any) -> Pairs:
    """Return the vectors of the pairs of neighbours of each page, every paragraph embedded once."""
    vectors = embedder.encode([text for page in pages for section in page for text in section])
    first, together = zip(*_rows(pages), strict=True)
    rows = np.asarray(first)
    return Pairs(vectors[rows], vectors[rows + 1], np.asarray(together, dtype=np.float32))


def manual_pages(folder: Path, count: int) -> dict[str, Page]:
    """Return pages of two sections or more in the order of their names' hashes, `count` at most."""
    chosen: dict[str, Page] = {}
    for path in sorted(folder.glob("*.html"), key=lambda path: digest(path.name)):
        if len(chosen) == count:
            break
        page = manual_page(path)
        if len(page) > 1:
            chosen[path.name] = page
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pages", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=SHIPPED_TOPIC_HEAD)
    options = parser.parse_args()
    manual = postgres_folder()
    if manual is None:
        raise SystemExit("the Debian package postgresql-doc-15 is not installed: apt-get install postgresql-doc-15")
    embedder = load_embedder(EmbeddingConfig())
    tenths: list[list[Page]] = [[] for _ in range(10)]
    for name, page in manual_pages(manual, options.pages).items():
        tenths[digest("split " + name) % 10].append(page)
    training = [page for tenth in tenths[2:] for page in tenth]
    data = pairs_of(training, embedder)
    head = train(data, pairs_of(tenths[1], embedder), embedder.embedder_id)
    recipe = f"{len(data.together)} pairs of {len(training)} pages of postgresql-doc-15, hidden {HIDDEN}, seed {SEED}"
    save_boundary_head(head, options.out, recipe)
    shipped, of_sentences = load_boundary_head(options.out), load_boundary_head()
    legal = [licence(path) for name in LICENCE_NAMES if (path := LICENCES / name).is_file()]
    rows = []
    for name, pages in (("PostgreSQL, held-out pages", tenths[0]), (f"{len(legal)} licences", legal)):
        pairs = pairs_of(pages, embedder)
        odds = of_sentences.log_odds_together(pairs.first, pairs.second)
        rows.append(evaluation(name, pairs, shipped) | {"auc_sentence_head": area_under_curve(odds, pairs.together)})
    columns = {
        "text": "Text",
        "pairs": "Pairs",
        "boundaries": "Boundaries",
        "auc_head": "AUC, topic head",
        "auc_sentence_head": "AUC, boundary head",
        "auc_cosine": "AUC, cosine",
        "balanced_accuracy": "Balanced accuracy at 0.55",
    }
    print(markdown_table(rows, columns))
    print(f"\nraw numbers: {write_result('topic_head', {'recipe': recipe, 'rows': rows})}")


if __name__ == "__main__":
    main()
