"""The learned boundary head: says from the vectors of two neighbouring sentences whether they belong together.

SAGE (arXiv 2503.01713): with x1 and x2 the vectors of neighbouring sentences, a multilayer perceptron on
[x1, x2, x1 - x2, x1 * x2] gives the probability that both stand in one paragraph; below a threshold the text is cut.
The head that is shipped was trained by benchmarks/train_boundary_head.py; it fits one embedder and refuses others.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ragkit.chunking.length_constrained import LengthPrior, Scores
from ragkit.chunking.scored import BoundaryScores, ScoredChunker
from ragkit.chunking.sentence_vectors import SentenceEmbedder, Vectors, VectorStream
from ragkit.chunking.units import Units
from ragkit.config import ChunkingConfig
from ragkit.errors import ModelError, UsageError
from ragkit.types import TextTokenizer

SHIPPED_HEAD = Path(__file__).resolve().parent / "boundary_head.safetensors"
_TENSORS = ("hidden.weight", "hidden.bias", "output.weight", "output.bias")

Weights = NDArray[np.float32]


@dataclass(frozen=True)
class BoundaryHead:
    """The weights of the head.

    Attributes:
        hidden_weight: (hidden, 4 * dim).
        hidden_bias: (hidden,).
        output_weight: (hidden,).
        output_bias: one number.
        embedder_id: the embedder that it was trained on.
    """

    hidden_weight: Weights
    hidden_bias: Weights
    output_weight: Weights
    output_bias: float
    embedder_id: str

    @property
    def dim(self) -> int:
        """Length of a sentence vector."""
        return int(self.hidden_weight.shape[1]) // 4

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest of the weights."""
        digest = hashlib.sha256(self.embedder_id.encode())
        for weight in (self.hidden_weight, self.hidden_bias, self.output_weight, np.float32(self.output_bias)):
            digest.update(np.ascontiguousarray(weight).tobytes())
        return digest.hexdigest()[:16]

    def log_odds_together(self, first: Vectors, second: Vectors) -> Scores:
        """Return (pairs,) log-odds that the sentences of (pairs, dim) `first` and `second` share a paragraph."""
        dim = self.dim
        by_first, by_second, by_difference, by_product = (
            self.hidden_weight[:, start : start + dim] for start in range(0, 4 * dim, dim)
        )
        # [x1, x2, x1 - x2, x1 * x2] W^T without laying the four parts side by side.
        hidden = first @ (by_first + by_difference).T + second @ (by_second - by_difference).T
        hidden += (first * second) @ by_product.T + self.hidden_bias
        odds: Scores = (np.maximum(hidden, 0) @ self.output_weight + self.output_bias).astype(np.float64)
        return odds


def load_boundary_head(path: Path = SHIPPED_HEAD) -> BoundaryHead:
    """Return the head in the safetensors file `path`.

    Raises:
        ModelError: the file is missing, damaged or holds something else.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            hidden, bias, output, output_bias = (file.get_tensor(name).astype(np.float32) for name in _TENSORS)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path} holds no boundary head that can be read: {error}") from error
    shapes = (hidden.shape, bias.shape, output.shape, output_bias.shape)
    size = len(bias) if bias.ndim else 0
    if hidden.ndim != 2 or hidden.shape[1] % 4 or shapes[1:] != ((hidden.shape[0],), (size,), (1,)):
        raise ModelError(f"{path} holds no boundary head: its tensors have the shapes {shapes}")
    if "embedder_id" not in metadata:
        raise ModelError(f"{path} holds no boundary head: it does not name the embedder that it was trained on")
    return BoundaryHead(hidden, bias, output, float(output_bias[0]), metadata["embedder_id"])


def save_boundary_head(head: BoundaryHead, path: Path, recipe: str) -> None:
    """Write `head` in half precision with the `recipe` that made it."""
    from safetensors.numpy import save_file

    values = (head.hidden_weight, head.hidden_bias, head.output_weight, np.array([head.output_bias]))
    tensors = {name: np.ascontiguousarray(value, np.float16) for name, value in zip(_TENSORS, values, strict=True)}
    save_file(tensors, path, {"embedder_id": head.embedder_id, "recipe": recipe})


@dataclass(frozen=True, slots=True)
class BoundaryHeadOptions:
    """The rule's settings.

    Attributes:
        threshold: probability of one paragraph below which the text is cut; 0.55 is SAGE's.
        paragraph_log_odds: added where a paragraph starts; 0 leaves the layout out.
    """

    threshold: float = 0.55
    paragraph_log_odds: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.threshold < 1:
            raise UsageError(f"the threshold of the boundary head must lie between 0 and 1, got {self.threshold}")


class BoundaryHeadScorer:
    """Scores boundaries by the head's probability that two sentences belong together."""

    name = "boundary_head"
    measure = "probability of one paragraph"
    trainer = "benchmarks/train_boundary_head.py"

    def __init__(self, embedder: SentenceEmbedder, head: BoundaryHead, options: BoundaryHeadOptions) -> None:
        if embedder.embedder_id != head.embedder_id:
            raise UsageError(
                f"the boundary head was trained on the embedder {head.embedder_id}, got {embedder.embedder_id}; "
                f"take that embedder, or train a head with {self.trainer}"
            )
        self._embedder = embedder
        self._head = head
        self._threshold = options.threshold
        self.fingerprint = json.dumps([embedder.embedder_id, head.fingerprint, options.threshold])

    def score(self, texts: Sequence[str], units: Sequence[Units]) -> list[BoundaryScores]:
        """Return the scores of each text; the signal is the probability that two units belong together.

        Raises:
            ChunkingError: the embedder returned a vector that is not finite.
        """
        stream = VectorStream(self._embedder, texts, units)
        return [self._scores(stream.take(len(some))) for some in units]

    def _scores(self, pieces: Iterable[Vectors]) -> BoundaryScores:
        together = [np.zeros(0)]
        last: Vectors | None = None
        for piece in pieces:
            rows = piece if last is None else np.concatenate([last, piece])
            together.append(self._head.log_odds_together(rows[:-1], rows[1:]))
            last = piece[-1:]
        odds = np.concatenate(together)
        even = float(np.log(self._threshold) - np.log1p(-self._threshold))
        return BoundaryScores(even - odds, 1.0 / (1.0 + np.exp(-odds)), self._threshold)


def boundary_head_chunker(
    config: ChunkingConfig,
    tokenizer: TextTokenizer,
    embedder: SentenceEmbedder,
    head: BoundaryHead | None = None,
    options: BoundaryHeadOptions | None = None,
    prior: LengthPrior | None = None,
) -> ScoredChunker:
    """Return a chunker that cuts where the head sees a new paragraph, and holds the cap.

    Raises:
        UsageError: the head was trained on another embedder.
    """
    options = options or BoundaryHeadOptions()
    scorer = BoundaryHeadScorer(embedder, head or load_boundary_head(), options)
    return ScoredChunker(scorer, config, tokenizer, prior, options.paragraph_log_odds)
