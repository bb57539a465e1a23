"""What selectors keep of a document, stored beside its pages: a second question need not read every key again.

A record holds a section of windows in all layers, as safetensors, and is named by the selector and the keys of these
windows. What is missing or damaged is made again from the pages.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor

from ragkit.errors import KVCacheError
from ragkit.kvcache.backing_tier import BackingTier
from ragkit.kvcache.chunk_kv import ChunkRef, EncodedKV
from ragkit.kvcache.kv_key import KVKey
from ragkit.kvcache.kv_segment import KVMissError, MissReason
from ragkit.kvcache.page_records import PageRecords
from ragkit.kvcache.page_selector import PageSelector
from ragkit.kvcache.page_summaries import PageSummaries

SECTION_WINDOWS = 64

_CODEC = "page-summary-1"
_TYPES = {  # of safetensors
    "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "U8": torch.uint8, "I32": torch.int32,
    "I64": torch.int64,
}  # fmt: skip
_FITTED = "fitted"  # before the numbers of tensors that are of the document as a whole


class StoredSummary(NamedTuple):
    """What is stored of one layer of some windows: of the document as a whole, and of their pages."""

    fitted: list[Tensor]
    parts: list[Tensor]


class PageSummaryRecords:
    """The stored summaries of one document.

    Args:
        tier: where they are; None keeps nothing.
        refs: the document's windows.
        num_layers: layers of the model.
    """

    def __init__(self, tier: BackingTier | None, refs: Sequence[ChunkRef], num_layers: int) -> None:
        self._refs = tuple(refs)
        self._num_layers = num_layers
        self._records = PageRecords(tier, _CODEC, num_layers)

    def sections(self) -> list[range]:
        """Return the windows of each section of the whole document."""
        count = len(self._refs)
        return [range(start, min(start + SECTION_WINDOWS, count)) for start in range(0, count, SECTION_WINDOWS)]

    def known(self, selector: PageSelector) -> set[range]:
        """Return the sections that are stored, whole or not; none where the tier cannot be asked."""
        if self._records.tier is None:
            return set()
        keys = {self._ref(selector, section).key: section for section in self.sections()}
        try:
            return {keys[key] for key in self._records.tier.holds([*keys])}
        except KVCacheError:
            return set()

    def load(self, selector: PageSelector, windows: range, *, page_locked: bool) -> EncodedKV | None:
        """Return what is stored of a section, for `parsed`; None where it is not there, or damaged. Thread-safe.

        Args:
            selector: whose it is.
            windows: the section.
            page_locked: whether it goes to a GPU, which copies from such memory at full speed.
        """
        try:
            return self._records.load(self._ref(selector, windows), _page_locked if page_locked else None)
        except KVMissError:
            return None

    def parsed(self, encoded: EncodedKV) -> list[StoredSummary] | None:
        """Return what a stored section holds of every layer, where it lies; None where it makes no sense.

        Not for the threads that load: they would take turns at hundreds of small views.
        """
        try:
            return [self._parts(encoded, layer) for layer in range(self._num_layers)]
        except KVMissError:
            return None

    def write(self, summaries: PageSummaries, windows: range, first_page: int, stop_page: int) -> None:
        """Store a section of `summaries`, unless its last group of pages goes on behind it.

        Raises:
            KVCacheError: the tier could not be written.
        """
        if self._records.tier is None:
            return  # to bring gigabytes from the device for nobody takes as long as a tenth of reading
        layers = []
        for layer in range(self._num_layers):
            parts = summaries.between(layer, first_page, stop_page)
            if not parts:
                return
            named = [(_FITTED, summaries.fitted(layer)), ("", parts)]
            content = save({
                f"{name}{index}": part.contiguous().cpu() for name, some in named for index, part in enumerate(some)
            })  # fmt: skip
            layers.append(torch.frombuffer(bytearray(content), dtype=torch.uint8))
        self._records.write(EncodedKV.pack(self._ref(summaries.selector, windows), _CODEC, layers))

    def flush(self) -> None:
        """Write what waits.

        Raises:
            KVCacheError: the tier could not be written.
        """
        self._records.flush()

    def close(self) -> None:
        """End writing; what waits is lost."""
        self._records.close()

    def _parts(self, encoded: EncodedKV, layer: int) -> StoredSummary:
        try:
            found = _tensors(encoded.layer(layer))
            fitted = [
                found.pop(f"{_FITTED}{index}") for index in range(sum(name.startswith(_FITTED) for name in found))
            ]
            return StoredSummary(fitted, [found[str(index)] for index in range(len(found))])
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise KVMissError(MissReason.HEADER, f"a stored summary of pages makes no sense ({error})") from error

    def _ref(self, selector: PageSelector, windows: range) -> ChunkRef:
        digest = hashlib.sha256(f"page-summary:{selector.selector_id}".encode())
        for window in windows:
            digest.update(self._refs[window].key.digest.encode())
        return ChunkRef(KVKey(digest.hexdigest()), (), self._refs[windows.start].chunk_id)


def _page_locked(nbytes: int) -> Tensor:
    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)


def _tensors(data: Tensor) -> dict[str, Tensor]:
    """Return the tensors of safetensors bytes where they lie: its own reader copies them twice, a gigabyte and more."""
    start = 8 + int.from_bytes(data[:8].numpy().tobytes(), "little")
    header = json.loads(data[8:start].numpy().tobytes())
    found = {}
    for name, one in header.items():
        first, stop = one["data_offsets"]
        found[name] = data[start + first : start + stop].view(_TYPES[one["dtype"]]).view(one["shape"])
    return found
