"""Prompts as segments: template | chunk | chunk | ... | question, tokenised apart and joined as ids.

A chunk's ids depend on its text alone, so its KV can be computed once and found again; the template's text is the
only one in which control tokens are parsed, so neither documents nor questions can write any.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from ragkit.errors import GenerationError
from ragkit.models.chat_template import ChatTemplate
from ragkit.models.tokenizer import ModelTokenizer
from ragkit.types import Chunk, Prompt, Segment

DEFAULT_SYSTEM_PROMPT = "You answer questions from the given passages, briefly and in your own words."
PASSAGES_HEADING = "Passages:\n\n"
CHUNK_END = "\n\n"
QUESTION_HEADING = "Answer the question from the passages above, briefly.\n\nQuestion: "

# Private-use characters that no template writes; the rendered template is cut where they stand.
_SYSTEM_MARK, _CONTENT_MARK = "\ue000", "\ue001"
_KEPT_CHUNKS = 1024  # texts whose ids are kept: about ten megabytes of ids at 256 tokens each


@dataclass(frozen=True, slots=True)
class BuiltPrompt:
    """A prompt and what did not fit into it.

    Attributes:
        prompt: the segments.
        dropped_chunks: ids of the chunks that the context budget had no room for, best first.
    """

    prompt: Prompt
    dropped_chunks: tuple[str, ...]


class PromptBuilder:
    """Builds prompts for one model.

    Args:
        tokenizer: the model's tokenizer.
        template: the model's chat template.
        max_context: the model's window in tokens.
        system_prompt: replaces `DEFAULT_SYSTEM_PROMPT`; it is plain text, too.
    """

    def __init__(
        self, tokenizer: ModelTokenizer, template: ChatTemplate, max_context: int, system_prompt: str = ""
    ) -> None:
        self._tokenizer = tokenizer
        self._max_context = max_context
        before, after = self._frame(template, system_prompt or DEFAULT_SYSTEM_PROMPT)
        self._prefix = (*before, *tokenizer.encode(PASSAGES_HEADING))
        self._heading = tuple(tokenizer.encode(QUESTION_HEADING))
        self._suffix = after
        self._chunk_end = tuple(tokenizer.encode(CHUNK_END))
        # A question names its chunks three times, to prefetch, to build and to find them, and the next ones some again.
        self._chunk_ids = lru_cache(_KEPT_CHUNKS)(lambda text: (*tokenizer.encode(text), *self._chunk_end))

    @property
    def prefix(self) -> Segment:
        """The segment before the first chunk: equal for every prompt of this builder."""
        return Segment(self._prefix)

    def chunk_segment(self, chunk: Chunk) -> Segment:
        """Return the segment of a chunk, with the same ids wherever it stands."""
        return Segment(self._chunk_ids(chunk.text), chunk.chunk_id)

    def build(
        self, question: str, chunks: Sequence[Chunk], *, max_new_tokens: int, context_tokens: int = 0
    ) -> BuiltPrompt:
        """Return the prompt for `question` over `chunks`.

        Args:
            question: plain text.
            chunks: best first. The best stands last, next to the question: models use what stands at the ends
                of a context best (Liu et al., arXiv 2307.03172), small ones what stands right before the question.
            max_new_tokens: room that is kept for the answer.
            context_tokens: most tokens of prompt and answer together; 0 is the model's window.

        A chunk is kept if it fits beside the better ones that were kept; nothing is ever cut.

        Raises:
            GenerationError: the question alone does not fit.
        """
        window = min(context_tokens or self._max_context, self._max_context)
        ending = self.ending(question)
        room = window - max_new_tokens - len(self._prefix) - len(ending.token_ids)
        if room < 0:
            raise GenerationError(
                f"the question takes {len(ending.token_ids)} tokens, the frame {len(self._prefix)} and the answer "
                f"{max_new_tokens}, more than the window of {window}: shorten the question or lower max_new_tokens"
            )
        kept: list[Segment] = []
        dropped: list[str] = []
        for chunk in chunks:
            segment = self.chunk_segment(chunk)
            if len(segment.token_ids) <= room:
                kept.append(segment)
                room -= len(segment.token_ids)
            else:
                dropped.append(chunk.chunk_id)
        return BuiltPrompt(Prompt((self.prefix, *reversed(kept), ending)), tuple(dropped))

    @property
    def chunk_end(self) -> tuple[int, ...]:
        """The ids behind every chunk."""
        return self._chunk_end

    def ending(self, question: str) -> Segment:
        """Return the segment behind the last chunk: the question, and what the template puts around it."""
        return Segment((*self._heading, *self._tokenizer.encode(question), *self._suffix))

    def _frame(self, template: ChatTemplate, system_prompt: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        # The template is rendered around marks, and what the user writes is encoded as plain text in their place.
        messages = [{"role": "system", "content": _SYSTEM_MARK}, {"role": "user", "content": _CONTENT_MARK}]
        rendered = template.render(messages)
        if rendered.count(_SYSTEM_MARK) != 1:  # some templates have no system role
            rendered = template.render([{"role": "user", "content": f"{_SYSTEM_MARK}\n\n{_CONTENT_MARK}"}])
        opening, system_mark, rest = rendered.partition(_SYSTEM_MARK)
        middle, content_mark, closing = rest.partition(_CONTENT_MARK)
        if not (system_mark and content_mark):
            raise GenerationError(f"the chat template of {template.folder} does not show the messages it is given")
        encode_template = self._tokenizer.encode_template
        before = (*encode_template(opening), *self._tokenizer.encode(system_prompt), *encode_template(middle))
        return before, tuple(encode_template(closing))
