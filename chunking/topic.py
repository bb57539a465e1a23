"""The topic chunker: whole paragraphs, cut where a learned head sees that a new section starts.

Same-topic prediction (Aumiller et al., ICAIL 2021, "Structural Text Segmentation of Legal Documents"): whether two
neighbouring paragraphs belong to one section is decided for each pair by itself, and what a change of topic parts are
the segments. The classifier there is a fine-tuned transformer; here it is the boundary head on the embedder's vectors
of the two paragraphs, trained by benchmarks/train_topic_head.py on a technical manual.

Measured by that script: on held-out pages of the same manual (1,345 pairs of paragraphs, 205 of them across sections)
the head tells sections apart with an area under the curve of 0.85, the cosine of the two vectors with 0.52. On eight
software licences (451 pairs, 93 across), legal text of which it has seen none, it is at 0.57 and so no better than the
cosine. For legal and contract text train a head on text of that kind with the same script, or take the structural
chunker, which goes by headings and numbering.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ragkit.chunking.boundary_head import BoundaryHead, BoundaryHeadOptions, BoundaryHeadScorer, load_boundary_head
from ragkit.chunking.length_constrained import LengthPrior
from ragkit.chunking.outline import outline
from ragkit.chunking.scored import ScoredChunker
from ragkit.chunking.sentence_vectors import SentenceEmbedder
from ragkit.chunking.units import paragraph_units
from ragkit.config import ChunkingConfig
from ragkit.types import TextTokenizer

SHIPPED_TOPIC_HEAD = Path(__file__).resolve().parent / "topic_head.safetensors"


class TopicScorer(BoundaryHeadScorer):
    """Scores boundaries by the head's probability that two paragraphs belong to one section."""

    name = "topic"
    measure = "probability of one section"
    trainer = "benchmarks/train_topic_head.py"


def heading_starts(text: str) -> Sequence[int]:
    """Return where headings start, those of numbered clauses included: a paragraph starts with its heading."""
    return [heading.char_start for heading in outline(text)]


def topic_chunker(
    config: ChunkingConfig,
    tokenizer: TextTokenizer,
    embedder: SentenceEmbedder,
    head: BoundaryHead | None = None,
    options: BoundaryHeadOptions | None = None,
    prior: LengthPrior | None = None,
) -> ScoredChunker:
    """Return a chunker that keeps paragraphs whole, cuts where the head sees a new topic, and holds the cap.

    Raises:
        UsageError: the head was trained on another embedder.
    """
    options = options or BoundaryHeadOptions()
    scorer = TopicScorer(embedder, head or load_boundary_head(SHIPPED_TOPIC_HEAD), options)
    return ScoredChunker(scorer, config, tokenizer, prior, options.paragraph_log_odds, heading_starts, paragraph_units)
