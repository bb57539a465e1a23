"""The prompts that blending is measured with: of random tokens, of a collection's own chunks, or of MuSiQue's passages.

Prompts are built as `ragkit query` builds them. Questions about a collection come from the user, or are made from it: a
sentence is cut in half, and the question asks how it goes on, so the rest of the sentence is the right answer. Their
chunks are those that retrieval finds.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from ragkit.bench.musique import MusiqueItem
from ragkit.chunking.sentences import sentence_spans
from ragkit.errors import UsageError
from ragkit.generation.prompt import PromptBuilder
from ragkit.models.tokenizer import ModelTokenizer
from ragkit.store.base import StoreReader
from ragkit.types import Chunk, Prompt, Segment, chunk_id_of

#: What the prompts that are only timed ask.
TIMED_QUESTION = "What do the passages say, and where does one of them differ from the others?"

_LEAST_WORDS, _MOST_WORDS = 10, 60  # of a sentence that becomes a question
_TRIES = 4  # sentences are looked for in so many times as many chunks as questions are wanted
_BATCH = 64  # chunks read at once

Retrieve = Callable[[str], Sequence[Chunk]]


@dataclass(frozen=True, slots=True)
class ScoredPrompt:
    """A prompt whose answers are compared; `gold` are the right answer's token ids, empty where it is not known."""

    question: str
    prompt: Prompt
    gold: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Question:
    """A question, and the right answer where it is known."""

    text: str
    answer: str = ""


def random_prompt(builder: PromptBuilder, vocab_size: int, tokens: int, chunk_tokens: int) -> Prompt:
    """Return a prompt of `tokens` tokens whose chunks, at least two, are random.

    A longer prompt begins with the chunks of a shorter one, but for the last, where both are longer than two chunks.

    Raises:
        UsageError: prefix and question alone take as many.
    """
    prefix, ending = builder.build(TIMED_QUESTION, (), max_new_tokens=1).prompt.segments
    room = tokens - len(prefix.token_ids) - len(ending.token_ids)
    if room < 2:
        raise UsageError(f"a prompt of {tokens} tokens has no room for chunks: the frame takes {tokens - room}")
    chance = random.Random(0)
    size = min(chunk_tokens, room // 2)
    ids = [chance.randrange(vocab_size) for _ in range(room)]
    chunks = [Segment(tuple(ids[at : at + size]), f"random-{at}") for at in range(0, room, size)]
    return Prompt((prefix, *chunks, ending))


def collection_prompt(builder: PromptBuilder, store: StoreReader, tokens: int) -> Prompt | None:
    """Return a prompt of at most `tokens` tokens made of the store's chunks.

    None where the store has too few of them, or where fewer than two fit.
    """
    chunks, held = [], 0
    for chunk in _all_chunks(store):
        chunks.append(chunk)
        held += chunk.token_count
        if held >= tokens:
            prompt = builder.build(TIMED_QUESTION, chunks, max_new_tokens=1, context_tokens=tokens + 1).prompt
            return prompt if _num_chunks(prompt) >= 2 else None
    return None


def questions_from(store: StoreReader, count: int) -> list[Question]:
    """Return up to `count` questions made from chunks that are drawn from all over the store, the same each time."""
    with store.snapshot():
        rows = [int(row) for row in store.row_ids()]
        drawn = random.Random(0).sample(rows, min(len(rows), _TRIES * count))
        made = (_question_of(one.chunk.text) for one in store.chunks(drawn))
        return list(itertools.islice((question for question in made if question is not None), count))


def retrieved_prompts(
    questions: Sequence[Question],
    retrieve: Retrieve,
    builder: PromptBuilder,
    tokenizer: ModelTokenizer,
    room_behind: int,
) -> Iterator[ScoredPrompt]:
    """Yield the prompts that `ragkit query` would build; questions with fewer than two chunks are left out.

    The first chunk needs no blending: it stands behind the very prefix that its KV was computed behind.
    """
    for question in questions:
        prompt = builder.build(question.text, retrieve(question.text), max_new_tokens=room_behind).prompt
        if _num_chunks(prompt) >= 2:
            yield ScoredPrompt(question.text, prompt, tuple(tokenizer.encode(question.answer)))


def musique_prompts(
    items: Sequence[MusiqueItem], builder: PromptBuilder, tokenizer: ModelTokenizer, room_behind: int
) -> Iterator[ScoredPrompt]:
    """Yield the items that fit the model's window whole."""
    for item in items:
        chunks = [
            Chunk(chunk_id_of("musique", item.index, number), "musique", number, text, 0, len(text), 0)
            for number, text in enumerate(item.passages)
        ]
        built = builder.build(item.question, chunks, max_new_tokens=room_behind)
        if not built.dropped_chunks:
            yield ScoredPrompt(item.question, built.prompt, tuple(tokenizer.encode(item.answers[0])))


def _num_chunks(prompt: Prompt) -> int:
    return sum(segment.chunk_id is not None for segment in prompt.segments)


def _all_chunks(store: StoreReader) -> Iterator[Chunk]:
    with store.snapshot():
        rows = store.row_ids()
        for start in range(0, len(rows), _BATCH):
            yield from (one.chunk for one in store.chunks(rows[start : start + _BATCH]))


def _question_of(text: str) -> Question | None:
    """Return a question about the first sentence of `text` that is long enough, or None."""
    for start, stop in sentence_spans(text):
        words = text[start:stop].split()
        if _LEAST_WORDS <= len(words) <= _MOST_WORDS:
            half = len(words) // 2
            beginning, rest = " ".join(words[:half]), " ".join(words[half:])
            return Question(f'How does the sentence go on that begins with "{beginning}"?', rest)
    return None
