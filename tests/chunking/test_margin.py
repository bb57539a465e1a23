"""The model is asked once a sentence, behind the KV of the chunk so far."""

from __future__ import annotations

import pytest
import torch
from loss_doubles import TopicJudge

from ragkit.chunking.base import check_chunks
from ragkit.chunking.margin import MarginOptions, MarginScorer, margin_chunker
from ragkit.chunking.scored import ScoredChunker
from ragkit.config import ChunkingConfig
from ragkit.errors import ChunkingError, UsageError
from ragkit.types import CausalOutput, Document

TEXT = "The CATS purr. They like CATS. All CATS sleep. The SHIPS sail. All SHIPS sink. Old SHIPS rust."


def texts(chunks):
    return [chunk.text.strip() for chunk in chunks]


@pytest.mark.parametrize("dynamic", [True, False])
def test_a_sentence_joins_while_the_model_says_so(word_tokenizer, dynamic):
    chunker = margin_chunker(ChunkingConfig(), word_tokenizer, TopicJudge(), "judge@1", MarginOptions(dynamic))
    assert texts(chunker.chunk(Document.from_text(TEXT))) == [TEXT[:46], TEXT[47:]]


def test_the_model_reads_the_part_and_the_sentence_behind_it_exactly(word_tokenizer):
    judge = TopicJudge()
    margin_chunker(ChunkingConfig(), word_tokenizer, judge, "judge@1").chunk(Document.from_text(TEXT))
    asked = [text for text in judge.read if "Answer: " in text]
    assert len(asked) == 5
    assert [text.split("\n\n")[1] for text in asked][1:3] == [TEXT[:47], TEXT[:63]]


def test_the_chunk_so_far_is_not_forwarded_again(word_tokenizer):
    judge = TopicJudge()
    scorer = MarginScorer(judge, "judge@1", 10_000, MarginOptions(dynamic_threshold=False))
    text = "All CATS sleep here. " * 60
    ScoredChunker(scorer, ChunkingConfig(max_tokens=10_000), word_tokenizer).chunk(Document.from_text(text))
    question = len(judge.read[-1]) - judge.read[-1].index("\n\nThe last sentence")
    prefix = judge.read[0].index("All")
    assert scorer.tokens_forwarded <= len(text) + prefix + 60 * question


def test_the_part_put_before_the_model_stays_under_the_cap(word_tokenizer):
    judge = TopicJudge()
    text = "All CATS sleep here. " * 200
    document = Document.from_text(text)
    chunks = margin_chunker(ChunkingConfig(max_tokens=30), word_tokenizer, judge, "judge@1").chunk(document)
    check_chunks(document, chunks, 30)
    assert judge.longest < 700


def test_a_window_smaller_than_a_sentence_loses_no_text(word_tokenizer):
    judge = TopicJudge(max_context=40)
    document = Document.from_text(TEXT)
    chunks = margin_chunker(ChunkingConfig(max_tokens=9), word_tokenizer, judge, "judge@1").chunk(document)
    check_chunks(document, chunks, 9)
    assert judge.longest <= 40


def test_logits_that_are_not_finite_are_an_error(word_tokenizer):
    class Broken(TopicJudge):
        def forward(self, token_ids, past=()):
            return CausalOutput(torch.full((128,), torch.nan), super().forward(token_ids, past).kv)

    with pytest.raises(ChunkingError, match="not finite at sentence 1"):
        margin_chunker(ChunkingConfig(), word_tokenizer, Broken(), "b@1").chunk(Document.from_text(TEXT))


def test_a_tokenizer_that_parts_the_answers_is_refused():
    judge = TopicJudge()
    judge.tokenizer.encode = lambda text: [0, 0]
    with pytest.raises(UsageError, match="tokens for 1 and 2 are single"):
        MarginScorer(judge, "judge@1", 256, MarginOptions())
