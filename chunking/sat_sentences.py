"""Sentence boundaries from a SaT model ("Segment any Text", arXiv 2406.16678), run by wtpsplit-lite on onnxruntime.

SaT says for every character how likely a sentence ends with it; above a threshold one does. White space behind it
belongs to the sentence, and a blank line always ends one. Runs on the CPU; a text of any length is read in blocks of
about 50,000 characters, whose edges lie between lines or words.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ragkit.chunking.boundaries import Boundary, boundary_offsets
from ragkit.errors import ChunkingError, MissingExtraError, ModelError

_FILES = ("config.json", "model_optimized.onnx", "tokenizer.json")
_SURROGATE = re.compile(r"[\ud800-\udfff]")
_BLOCK = 50_000
_EDGE = 2_000  # characters at the end of a block in which its edge is looked for


class SatSegmenter:
    """Finds sentences with the SaT model in `folder`. Implements `SentenceSegmenter`.

    Args:
        folder: holds config.json and model_optimized.onnx of a SaT model, and the tokenizer.json of
            xlm-roberta-base, which SaT models share and do not bring along.
        threshold: probability above which a sentence ends.

    Raises:
        ModelError: a file is missing, or the model cannot be loaded.
        MissingExtraError: wtpsplit-lite is not installed.
    """

    context = 256

    def __init__(self, folder: Path, threshold: float) -> None:
        missing = [name for name in _FILES if not (folder / name).is_file()]
        if missing:
            raise ModelError(
                f"{folder} is no folder of a SaT model: it has no {' and no '.join(missing)}; config.json and "
                "model_optimized.onnx are those of a model such as segment-any-text/sat-3l-sm, tokenizer.json that of "
                "xlm-roberta-base"
            )
        self._folder = folder
        self._threshold = threshold
        self._model = _load(folder)

    @property
    def fingerprint(self) -> str:
        """Hex digest of the model's files and the threshold."""
        from ragkit.models.fingerprint import file_sha256

        digest = hashlib.sha256(f"sat 1 {self._threshold}".encode())
        for name in _FILES:
            digest.update(file_sha256(self._folder / name).encode())
        return digest.hexdigest()

    def starts(self, text: str) -> list[int]:
        """Return the offset of the first code point of each sentence of `text`, ascending; the first is 0.

        Raises:
            ChunkingError: the model fails on the text or gives probabilities that are none.
        """
        if not text:
            return []
        found = {0, *boundary_offsets(text, Boundary.PARAGRAPH)}
        begin = 0
        while begin < len(text):
            stop = _block_stop(text, begin)
            ends = np.flatnonzero(self._probabilities(text[begin:stop]) > self._threshold)
            found.update(_after_space(text, begin + int(end) + 1) for end in ends)
            begin = stop
        found.discard(len(text))
        return sorted(found)

    def _probabilities(self, block: str) -> NDArray[np.float64]:
        """Return (characters,) the probability that a sentence ends with each."""
        if not any(char.isalnum() for char in block):  # maybe not one token, on which the model's code fails
            return np.zeros(len(block))
        plain = _SURROGATE.sub("\ufffd", block)  # the tokenizer takes none
        try:
            found = np.asarray(self._model.predict_proba(plain), dtype=np.float64)
        except Exception as error:  # whatever onnxruntime or the tokenizer raises
            raise ChunkingError(f"the SaT model in {self._folder} failed on {block[:40]!r}...: {error}") from error
        if found.shape != (len(block),) or not np.isfinite(found).all():
            raise ChunkingError(
                f"the SaT model in {self._folder} gave {int(np.isfinite(found).sum())} finite numbers in an array of "
                f"shape {found.shape} for {len(block)} characters, where each should have one; its weights are damaged"
            )
        return found


def _load(folder: Path) -> Any:
    try:
        from wtpsplit_lite import SaT
    except ImportError as error:
        raise MissingExtraError(
            "sentences by a SaT model need the package wtpsplit-lite, which is not installed; "
            "install it with: pip install 'ragkit[sat]'"
        ) from error
    try:
        return SaT(str(folder), tokenizer_name_or_path=str(folder), ort_providers=["CPUExecutionProvider"])
    except Exception as error:  # whatever onnxruntime and the tokenizer raise
        raise ModelError(f"the SaT model in {folder} cannot be loaded: {error}") from error


def _block_stop(text: str, begin: int) -> int:
    """Return where the block that begins at `begin` stops: behind its last line break or space, where one is near."""
    stop = begin + _BLOCK
    if stop >= len(text):
        return len(text)
    for space in ("\n", " "):
        at = text.rfind(space, stop - _EDGE, stop)
        if at >= 0:
            return at + 1
    return stop


def _after_space(text: str, at: int) -> int:
    while at < len(text) and text[at].isspace():
        at += 1
    return at
