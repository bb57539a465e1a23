"""Every chunker that scores boundaries, its models doubles: what the tests of contracts and bad input run over."""

from __future__ import annotations

import numpy as np
from embedding_doubles import TopicEmbedder
from loss_doubles import CodePointTokenizer, TableLosses, TopicJudge

from ragkit.chunking.balanced import balanced_chunker
from ragkit.chunking.boundary_head import BoundaryHead, boundary_head_chunker
from ragkit.chunking.breakpoints import BreakpointRule
from ragkit.chunking.cluster import ClusterChunker, ClusterOptions
from ragkit.chunking.code import CodeOptions, code_chunker
from ragkit.chunking.margin import margin_chunker
from ragkit.chunking.perplexity import PerplexityOptions, PerplexityScorer, perplexity_chunker
from ragkit.chunking.semantic import SemanticOptions, semantic_chunker
from ragkit.chunking.structural import structural_chunker
from ragkit.chunking.topic import topic_chunker


def semantic(rule):
    options = SemanticOptions(rule, 60 if rule is not BreakpointRule.STANDARD_DEVIATION else 0.5)
    return lambda config, tokenizer: semantic_chunker(config, tokenizer, TopicEmbedder(), options)


def perplexity(**options):
    def make(config, tokenizer):
        own = CodePointTokenizer()  # a language model brings its own tokenizer
        scorer = PerplexityScorer(TableLosses(own, ["c", "T"]), own, "table@1", PerplexityOptions(**options))
        return perplexity_chunker(config, tokenizer, scorer)

    return make


def random_head():
    draw = np.random.default_rng(0).normal
    weights = draw(size=(5, 16)).astype(np.float32), draw(size=5).astype(np.float32), draw(size=5).astype(np.float32)
    return BoundaryHead(*weights, 0.0, "topics@1")


def boundary_head(config, tokenizer):
    return boundary_head_chunker(config, tokenizer, TopicEmbedder(), random_head())


def topic(config, tokenizer):
    return topic_chunker(config, tokenizer, TopicEmbedder(), random_head())


SCORED_CHUNKERS = {
    "balanced": balanced_chunker,
    "boundary_head": boundary_head,
    **{f"semantic-{rule.value}": semantic(rule) for rule in BreakpointRule},
    "cluster": lambda config, tokenizer: ClusterChunker(config, tokenizer, TopicEmbedder(), ClusterOptions(8)),
    "code": lambda config, tokenizer: code_chunker(config, tokenizer),
    "code-python": lambda config, tokenizer: code_chunker(config, tokenizer, CodeOptions("python")),
    "margin": lambda config, tokenizer: margin_chunker(config, tokenizer, TopicJudge(2000), "judge@1"),
    "perplexity": perplexity(),
    "perplexity-merge": perplexity(merge_tokens=20, dynamic_threshold=True),
    "structural": lambda config, tokenizer: structural_chunker(config, tokenizer),
    "topic": topic,
}
