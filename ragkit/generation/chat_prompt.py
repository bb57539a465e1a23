"""Conversations as prompts: the model's chat template around messages whose text can write no control tokens."""

from __future__ import annotations

from collections.abc import Sequence

from ragkit.errors import GenerationError
from ragkit.models.chat_template import ChatTemplate
from ragkit.models.tokenizer import ModelTokenizer
from ragkit.types import Prompt, Segment

# Private-use characters that no template writes: the rendered template is cut where they stand.
_FIRST_MARK, _MOST_MESSAGES = 0xE000, 6400


def chat_prompt(tokenizer: ModelTokenizer, template: ChatTemplate, messages: Sequence[tuple[str, str]]) -> Prompt:
    """Return the prompt of `messages`, (role, text) each, up to where the assistant's answer begins.

    A template without a system role gets the system's text before that of the first user.

    Raises:
        GenerationError: there are no messages, too many, or the template does not show each of them once.
        ModelError: the template refuses them, two users in a row for instance.
    """
    if not 0 < len(messages) <= _MOST_MESSAGES:
        raise GenerationError(f"a conversation has 1 to {_MOST_MESSAGES} messages, got {len(messages)}")
    pieces = _pieces(template, messages)
    if pieces is None and messages[0][0] == "system" and len(messages) > 1:
        (_, system), (role, first), *rest = messages
        messages = [(role, f"{system}\n\n{first}"), *rest]
        pieces = _pieces(template, messages)
    if pieces is None:
        raise GenerationError(f"the chat template of {template.folder} does not show each message once and in order")
    token_ids = tokenizer.encode_template(pieces[0])
    for (_, text), piece in zip(messages, pieces[1:], strict=True):
        token_ids += [*tokenizer.encode(text), *tokenizer.encode_template(piece)]
    return Prompt((Segment(tuple(token_ids)),))


def formatted_prompt(tokenizer: ModelTokenizer, text: str) -> Prompt:
    """Return the prompt of a text that already went through a template: its control tokens are parsed."""
    return Prompt((Segment(tuple(tokenizer.encode_template(text))),))


def _pieces(template: ChatTemplate, messages: Sequence[tuple[str, str]]) -> list[str] | None:
    """Return what the template puts around the texts, or None where one of them is not shown once in its place."""
    marks = [chr(_FIRST_MARK + index) for index in range(len(messages))]
    rest = template.render([{"role": role, "content": mark} for (role, _), mark in zip(messages, marks, strict=True)])
    pieces: list[str] = []
    for mark in marks:
        before, found, rest = rest.partition(mark)
        if not found or mark in rest:
            return None
        pieces.append(before)
    return [*pieces, rest]
