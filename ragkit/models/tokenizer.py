"""The generator's tokenizer, straight on the `tokenizers` library so that chunking starts without transformers.

Two views of one `tokenizer.json`: `encode` and everything of `TextTokenizer` treat their input as plain text, so a
document that contains `<|im_end|>` yields the tokens of those ten characters and never the control token;
`encode_template` is for the text of the chat template, which is the model's own, and does parse control tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from ragkit.errors import ModelError

_ID_FORMAT = b"ragkit-tokenizer-1\0"  # part of every tokenizer_id; raised when the rules below change the ids
_BATCH_CHARACTERS = 4_000_000  # bounds the memory of one parallel batch


class ModelTokenizer:
    """A `TextTokenizer` over one `tokenizer.json`.

    Attributes:
        folder: the model folder it was loaded from.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        content = _content(folder / "tokenizer.json")
        self._raw = _parsed(content, folder / "tokenizer.json")
        self._text = _as_text_only(self._raw, folder)
        self._digest = hashlib.sha256(_ID_FORMAT + content).hexdigest()

    @property
    def tokenizer_id(self) -> str:
        """Hex digest of everything that changes the ids."""
        return self._digest

    @cached_property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included."""
        size: int = self._template.get_vocab_size(with_added_tokens=True)
        return size

    def agrees_with(self, other: ModelTokenizer) -> bool:
        """Return whether every id that both have is the same token, and what only one has are added tokens.

        The files need not be equal: another format of the same model says the same in other words, and models of a
        family may have added tokens of their own.
        """
        if self._digest == other._digest:
            return True
        both = [tokenizer._template.get_vocab(with_added_tokens=True) for tokenizer in (self, other)]
        own, others = ({index: token for token, index in vocabulary.items()} for vocabulary in both)
        if any(others.get(index, token) != token for index, token in own.items()):
            return False
        added = {*self._template.get_added_tokens_decoder(), *other._template.get_added_tokens_decoder()}
        return own.keys() ^ others.keys() <= added

    @cached_property
    def control_ids(self) -> frozenset[int]:
        """Ids of the tokens that document text never yields."""
        added = self._template.get_added_tokens_decoder()
        return frozenset(token for token, entry in added.items() if entry.special)

    @cached_property
    def words_add_up(self) -> bool:
        """Whether a text has as many tokens as its words, cut at white space, have together, and white space none.

        So it is for the tokenizers of BERT: the pre-tokenizer drops white space, and no rule reaches across it.
        """
        kinds = {part: (self._raw.get(part) or {}).get("type") for part in ("normalizer", "pre_tokenizer", "model")}
        added = self._raw.get("added_tokens") or ()
        return (
            kinds["model"] == "WordPiece"
            and kinds["pre_tokenizer"] == "BertPreTokenizer"
            and kinds["normalizer"] in (None, "BertNormalizer")
            and all(str(token.get("content", "")).strip() for token in added)
        )

    def encode(self, text: str) -> list[int]:
        """Return the token ids of `text` as plain text, without special tokens."""
        ids: list[int] = self._text.encode(_checked(text), add_special_tokens=False).ids
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text, computed in parallel."""
        return [list(encoding.ids) for batch in _batches(texts) for encoding in self._encode(batch)]

    def count_batch(self, texts: Sequence[str]) -> list[int]:
        """Return the number of tokens of each text, computed in parallel."""
        return [len(encoding) for batch in _batches(texts) for encoding in self._encode(batch)]

    def offsets(self, text: str) -> list[tuple[int, int]]:
        """Return the half-open code point span of each token of `text`.

        Spans ascend and include the space that a token begins with. Tokens that share one code point (a character
        of several bytes) all have its span.
        """
        spans: list[tuple[int, int]] = self._text.encode(_checked(text), add_special_tokens=False).offsets
        return spans

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Return what `encode` and `offsets` return, for the time of one."""
        encoding = self._text.encode(_checked(text), add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def encode_batch_with_offsets(self, texts: Sequence[str]) -> Iterator[tuple[list[int], list[tuple[int, int]]]]:
        """Yield what `encode` and `offsets` return for each text, computed in parallel."""
        for batch in _batches(texts, _BATCH_CHARACTERS // 4):  # with its places, a token takes some hundred bytes
            for encoding in self._text.encode_batch(batch, add_special_tokens=False):
                yield encoding.ids, encoding.offsets

    def encode_template(self, text: str) -> list[int]:
        """Return the token ids of chat-template text, control tokens parsed. Never for text of users or documents."""
        ids: list[int] = self._template.encode(_checked(text), add_special_tokens=False).ids
        return ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of `token_ids`, special tokens left out."""
        text: str = self._template.decode(list(token_ids), skip_special_tokens=True)
        return text

    def token_id(self, token: str) -> int | None:
        """Return the id of the vocabulary entry `token`, or None where there is none."""
        found: int | None = self._template.token_to_id(token)
        return found

    @cached_property
    def _template(self) -> Tokenizer:
        # Built on first use: chunking never needs it, and building takes as long as the other view's.
        return _tokenizer(self._raw, self.folder)

    def _encode(self, batch: list[str]) -> list[Any]:
        encodings: list[Any] = self._text.encode_batch_fast(batch, add_special_tokens=False)
        return encodings


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise ModelError(
            f"{path.parent} holds no tokenizer.json; ragkit reads that format alone: "
            "save the model's fast tokenizer there"
        ) from error
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from error


def _parsed(content: bytes, path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(content)
    except ValueError as error:
        raise ModelError(f"{path} cannot be read as a tokenizer: {error}") from error
    if not isinstance(raw, dict) or "model" not in raw:
        raise ModelError(f"{path} is no tokenizer of the tokenizers library: it has no model")
    return raw


def _tokenizer(raw: dict[str, Any], folder: Path) -> Tokenizer:
    try:
        # Post-processors add special tokens and trim spaces off offsets; truncation and padding would hide text.
        return Tokenizer.from_str(json.dumps({**raw, "post_processor": None, "truncation": None, "padding": None}))
    except Exception as error:  # the library raises plain Exception
        raise ModelError(f"{folder / 'tokenizer.json'} cannot be loaded as a tokenizer: {error}") from error


def _as_text_only(raw: dict[str, Any], folder: Path) -> Tokenizer:
    # Added tokens are matched before anything else. Those that are not runs of whitespace are markup, whether the
    # file calls them special or not (<|fim_prefix|>, <tool_call>, ...), and a document must not be able to write
    # markup. They stay in the vocabulary, because leaving them out would move the ids of those that follow.
    added = [
        {**token, "special": bool(str(token.get("content", "")).strip())} for token in raw.get("added_tokens") or ()
    ]
    tokenizer = _tokenizer({**raw, "added_tokens": added}, folder)
    tokenizer.encode_special_tokens = True  # the library's name for reading special tokens as plain text
    return tokenizer


def _checked(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ModelError(
            f"text holds the lone surrogate {text[error.start]!a} at character {error.start}; decode it properly first"
        ) from error
    return text


def _batches(texts: Sequence[str], most: int = 0) -> list[list[str]]:
    batches: list[list[str]] = []
    most = most or _BATCH_CHARACTERS
    size = most
    for text in texts:
        if size >= most:
            batches.append([])
            size = 0
        batches[-1].append(_checked(text))
        size += len(text)
    return batches
