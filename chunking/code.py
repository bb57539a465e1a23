"""The code chunker: cuts source code between definitions, found by a syntax tree.

Tree-sitter parses the text; where a definition starts (with the comments and decorators above it) a cut is cheap,
inside a definition it costs the more the deeper the place lies, inside a line it is the last resort. Text that is in
no known language, or that the parser fails on, is cut as the structural chunker cuts it, and the choice is logged.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib import import_module
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from ragkit.chunking.length_constrained import LengthPrior, Scores
from ragkit.chunking.scored import BoundaryScores, ScoredChunker
from ragkit.chunking.signals import LOG_ODDS
from ragkit.chunking.structural import StructuralOptions, StructureScorer
from ragkit.chunking.units import Units
from ragkit.config import ChunkingConfig
from ragkit.errors import MissingExtraError, UsageError
from ragkit.types import TextTokenizer

if TYPE_CHECKING:
    from tree_sitter import Node, Parser

logger = logging.getLogger(__name__)

# Language -> module and function of its grammar.
_GRAMMARS = {
    "c": ("tree_sitter_c", "language"),
    "cpp": ("tree_sitter_cpp", "language"),
    "go": ("tree_sitter_go", "language"),
    "java": ("tree_sitter_java", "language"),
    "javascript": ("tree_sitter_javascript", "language"),
    "python": ("tree_sitter_python", "language"),
    "rust": ("tree_sitter_rust", "language"),
    "tsx": ("tree_sitter_typescript", "language_tsx"),
    "typescript": ("tree_sitter_typescript", "language_typescript"),
}
LANGUAGES = tuple(_GRAMMARS)

_SAMPLE = 200_000  # code points that the language is recognised by
_MOST_ERRORS = 0.05  # share of the text inside syntax errors above which it is no code of the language
_DEFINITION, _BLANK, _LINE, _OTHER = -1.0, -2.0, -4.0, -20.0
_DEPTH = -3.0  # a level of nesting
_TORN = -30.0  # between a comment or decorator and what it stands above
_DEEPEST = 6


@dataclass(frozen=True, slots=True)
class CodeOptions:
    """`language`: one of `LANGUAGES`, or None to recognise it in each text by trying all."""

    language: str | None = None

    def __post_init__(self) -> None:
        if self.language is not None and self.language not in _GRAMMARS:
            raise UsageError(
                f"there is no grammar for the language {self.language!r}; there are {', '.join(LANGUAGES)}"
            )


class SyntaxScorer:
    """Scores line starts by what the syntax tree has there."""

    name = "code"
    measure = LOG_ODDS

    def __init__(self, options: CodeOptions) -> None:
        import_parser()  # a missing package shows when the chunker is made, not at the first document
        self._options = options
        self._plain = StructureScorer(StructuralOptions())
        self.fingerprint = f"syntax-1:{options.language}:{self._plain.fingerprint}"

    def boundaries(self, text: str) -> list[int]:
        """Return where the lines of code start; where there is no code, what the structural chunker takes."""
        if self._language(text) is None:
            return self._plain.boundaries(text)
        return _line_starts(text)

    def score(self, texts: Sequence[str], units: Sequence[Units]) -> list[BoundaryScores]:
        """Return the scores of each text."""
        return [self._score(text, some) for text, some in zip(texts, units, strict=True)]

    def _language(self, text: str) -> str | None:
        return self._options.language or recognise_language(text)

    def _score(self, text: str, units: Units) -> BoundaryScores:
        language = self._language(text)
        if language is None:
            logger.info("a text is in no language with a grammar; it is cut by its structure")
            return self._plain.score([text], [units])[0]
        at_line = _line_scores(text, language)
        starts = units.starts[1:-1].tolist()
        odds = np.fromiter((at_line.get(start, _OTHER) for start in starts), np.float64, len(starts))
        return BoundaryScores(odds, None)


@lru_cache(maxsize=1)  # asked twice for each text, once for its units and once for its scores
def recognise_language(text: str) -> str | None:
    """Return the language whose grammar leaves the least of `text` in syntax errors, or None above a twentieth.

    Real code leaves under 2%, prose and HTML over 40%. A text of more than 200,000 characters is judged by those.
    """
    if not text.strip():
        return None
    shares = {language: _error_share(text[:_SAMPLE], language) for language in LANGUAGES}
    best = min(shares, key=lambda language: shares[language])
    return best if shares[best] <= _MOST_ERRORS else None


def code_chunker(
    config: ChunkingConfig,
    tokenizer: TextTokenizer,
    options: CodeOptions | None = None,
    prior: LengthPrior | None = None,
) -> ScoredChunker:
    """Return a chunker that cuts source code between definitions and holds the cap.

    Raises:
        MissingExtraError: tree-sitter or a grammar is not installed.
    """
    scorer = SyntaxScorer(options or CodeOptions())
    return ScoredChunker(scorer, config, tokenizer, prior, boundaries=scorer.boundaries)


def import_parser() -> Any:
    """Return the module tree_sitter.

    Raises:
        MissingExtraError: it is not installed.
    """
    return _import("tree_sitter")


def _import(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise MissingExtraError(
            f"the code chunker needs the package {name.replace('_', '-')}, which is not installed; "
            "install it with: pip install 'ragkit[code]'"
        ) from error


@cache
def _parser(language: str) -> Parser:
    module, function = _GRAMMARS[language]
    tree_sitter = import_parser()
    grammar: Callable[[], object] = getattr(_import(module), function)
    parser: Parser = tree_sitter.Parser(tree_sitter.Language(grammar()))
    return parser


def _parse(text: str, language: str) -> Node:
    # A lone surrogate cannot be encoded; any other character of three bytes keeps the offsets.
    return _parser(language).parse(text.encode("utf-8", "surrogatepass")).root_node


def _error_share(text: str, language: str) -> float:
    """Return the share of bytes inside the outermost error nodes, a missing token counted as one byte."""
    root = _parse(text, language)
    wrong = 0
    waiting = [root]
    while waiting:
        node = waiting.pop()
        if node.is_error:
            wrong += node.end_byte - node.start_byte
        elif node.is_missing:
            wrong += 1
        elif node.has_error:
            waiting += node.children
    return wrong / max(1, root.end_byte - root.start_byte)


def _line_starts(text: str) -> list[int]:
    starts = [0]
    at = text.find("\n")
    while at >= 0:
        starts.append(at + 1)
        at = text.find("\n", at + 1)
    return starts


def _line_scores(text: str, language: str) -> dict[int, float]:
    """Return the score of a cut before each line, by the offset of the line."""
    starts = _line_starts(text)
    depth, opens, attached = _rows(_parse(text, language), len(starts))
    scores: dict[int, float] = {}
    previous_blank = False
    for row, (start, stop) in enumerate(zip(starts, [*starts[1:], len(text)], strict=True)):
        blank = not text[start:stop].strip()
        kind = _DEFINITION if opens[row] else _BLANK if previous_blank else _LINE
        score = kind + _DEPTH * min(_DEEPEST, int(depth[row]))
        scores[start] = _TORN if attached[row] or (blank and row) else score
        previous_blank = blank
    return scores


def _rows(root: Node, rows: int) -> tuple[Scores, Scores, Scores]:
    """Return, for each line, how deep it lies, whether a node opens there, and whether it belongs to the line above.

    The depth of a line counts the nodes of several lines that are open across the place before it.
    """
    depth = np.zeros(rows + 1)
    opens = np.zeros(rows + 1)
    attached = np.zeros(rows + 1)
    waiting = [root]
    while waiting:
        node = waiting.pop()
        _attach(node, attached)
        for child in node.children:
            first, last = child.start_point[0], child.end_point[0]
            if last > first:
                depth[first + 1] += 1
                depth[min(last, rows - 1) + 1] -= 1
                opens[first] = 1
                waiting.append(child)
    return np.cumsum(depth)[:rows], opens[:rows], attached[:rows]


def _attach(node: Node, attached: Scores) -> None:
    """Mark the lines between a comment, attribute or decorator and the next sibling as belonging together."""
    children = node.children
    for above, below in pairwise(children):
        leads = any(word in above.type for word in ("comment", "attribute", "decorator", "annotation"))
        first, last = above.end_point[0], below.start_point[0]
        if above.end_point[1] == 0 and first > above.start_point[0]:
            first -= 1  # a comment that ends with its line break
        if leads and 0 < last - first <= 1:
            attached[last] = 1
