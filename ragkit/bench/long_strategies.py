"""The ways of answering questions about long documents, by the name that `--strategies` takes; one module each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from ragkit.bench.answer_full import FullAnswerer
from ragkit.bench.answer_pages import pages_answerers
from ragkit.bench.answer_rag import RagAnswerer
from ragkit.bench.long_answers import AnswererTools, LongContextAnswerer

#: A strategy may give several answerers, which are called one after the other for every document.
ANSWERERS: Mapping[str, Callable[[AnswererTools], Sequence[LongContextAnswerer]]] = {
    "full": lambda tools: [FullAnswerer(tools)],
    "rag": lambda tools: [RagAnswerer(tools)],
    "pages": pages_answerers,
}


def make_answerers(names: Sequence[str], tools: AnswererTools) -> list[LongContextAnswerer]:
    """Return the answerers of the strategies `names`, in their order."""
    return [answerer for name in names for answerer in ANSWERERS[name](tools)]
