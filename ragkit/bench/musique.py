"""MuSiQue: questions that need several passages, with ten or so beside them that do not help.

Source: Trivedi et al., MuSiQue (arXiv 2108.00573), as CacheBlend's evaluation samples it: one JSON file, a list of
objects with `question`, `answers` and `ctxs`, each with a `text`.
"""

from __future__ import annotations

import json
import re
import string
from dataclasses import dataclass
from pathlib import Path

FILE_NAME = "musique_s.json"


@dataclass(frozen=True, slots=True)
class MusiqueItem:
    """One question with its passages.

    Attributes:
        index: its place in the file.
        question, answers: what is asked, and the right answers.
        passages: what it is answered from.
        before: of each passage, what stands before it in its document, in reading order; nothing in MuSiQue.
    """

    index: int
    question: str
    answers: tuple[str, ...]
    passages: tuple[str, ...]
    before: tuple[tuple[str, ...], ...] = ()


def musique_items(folder: Path) -> list[MusiqueItem]:
    """Return the items whose answer stands in a passage."""
    return question_items(folder / FILE_NAME)


def question_items(path: Path) -> list[MusiqueItem]:
    """Return the items of a file of MuSiQue's form whose answer stands in a passage, or that have none."""
    items = []
    for index, one in enumerate(json.loads(path.read_text(encoding="utf-8"))):
        passages = tuple(passage["text"] for passage in one["ctxs"])
        text = _plain(" ".join(passages))
        if not one["answers"] or any(_plain(answer) in text for answer in one["answers"]):
            before = tuple(tuple(passage.get("before", ())) for passage in one["ctxs"])
            items.append(MusiqueItem(index, one["question"], tuple(one["answers"]), passages, before))
    return items


def _plain(text: str) -> str:
    kept = "".join(char for char in text.lower() if char not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", kept).split())
