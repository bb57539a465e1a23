"""The tokenizer that a GGUF file carries, as the `tokenizer.json` of the tokenizers library.

Byte-level BPE only (`tokenizer.ggml.model` = gpt2). `tokenizer.ggml.pre` names how text is split before merging;
GGUF stores the name alone, so the splits are a table here, each checked against the published tokenizer it names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ragkit.errors import ModelError

_CONTROL, _USER_DEFINED, _UNUSED = 3, 4, 5  # tokenizer.ggml.token_type

_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _byte_level(use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _split(pattern: str) -> list[dict[str, Any]]:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return [split, _byte_level(use_regex=False)]


# name -> (normalizer, pre-tokenizers, whether a whole word that is in the vocabulary skips the merges)
_PRE_TOKENIZERS: Mapping[str, tuple[str | None, list[dict[str, Any]], bool]] = {
    "smollm": (None, [{"type": "Digits", "individual_digits": True}, _byte_level(use_regex=True)], False),
    "qwen2": ("NFC", _split(rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}"), False),
    "llama-bpe": (None, _split(rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}"), True),
}


def tokenizer_json(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of `tokenizer.json` for the metadata `fields` of a GGUF file.

    Raises:
        ModelError: the file carries a tokenizer of another kind.
    """
    model, pre = fields.get("tokenizer.ggml.model"), str(fields.get("tokenizer.ggml.pre"))
    if model != "gpt2" or pre not in _PRE_TOKENIZERS:
        raise ModelError(
            f"the GGUF file carries a tokenizer of kind {model!r} with splitting {pre!r}; ragkit reads gpt2 with "
            f"{', '.join(sorted(_PRE_TOKENIZERS))}: use the model's safetensors folder instead"
        )
    tokens: Sequence[str] = fields["tokenizer.ggml.tokens"]
    kinds: Sequence[int] = fields["tokenizer.ggml.token_type"]
    normalizer, pre_tokenizers, ignore_merges = _PRE_TOKENIZERS[pre]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            _added(index, token, special=kind == _CONTROL)
            for index, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
            if kind in (_CONTROL, _USER_DEFINED)
        ],
        "normalizer": {"type": normalizer} if normalizer else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": pre_tokenizers},
        "post_processor": None,
        "decoder": _byte_level(use_regex=True),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": ignore_merges,
            "vocab": {
                token: index for index, (token, kind) in enumerate(zip(tokens, kinds, strict=True)) if kind != _UNUSED
            },
            "merges": list(fields["tokenizer.ggml.merges"]),
        },
    }


def _added(index: int, token: str, *, special: bool) -> dict[str, Any]:
    return {
        "id": index,
        "content": token,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": special,
    }
