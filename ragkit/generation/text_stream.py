"""Text out of a growing list of tokens, in pieces that never end within a character."""

from __future__ import annotations

from ragkit.types import TextTokenizer

_INCOMPLETE = "�"  # what decoding puts where bytes of a character are missing


class TextStream:
    """Turns tokens into text pieces whose concatenation is the decoded text of all tokens.

    A piece is held back while its last character may still be incomplete. Only the tokens since the last piece but
    one are decoded again, so the cost does not grow with the answer.
    """

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        self._token_ids: list[int] = []
        self._context = 0  # tokens from here on give the next one its context (spacing)
        self._emitted = 0  # tokens before this one are in pieces already

    def push(self, token_id: int) -> str:
        """Return the text that is certain after `token_id`, often empty."""
        self._token_ids.append(token_id)
        piece = self._pending()
        if not piece or piece.endswith(_INCOMPLETE):
            return ""
        self._context, self._emitted = self._emitted, len(self._token_ids)
        return piece

    def close(self) -> str:
        """Return the rest, incomplete characters included as U+FFFD."""
        rest = self._pending()
        self._context = self._emitted = len(self._token_ids)
        return rest

    def _pending(self) -> str:
        known = self._tokenizer.decode(self._token_ids[self._context : self._emitted])
        return self._tokenizer.decode(self._token_ids[self._context :])[len(known) :]
