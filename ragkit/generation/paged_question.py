"""One question over an open paged document: its rows behind the pages, and what there is of its answer.

Whoever steps the model owns neither: a single answer and a batch read a question alike, give it the logits of its steps
and get the same tokens, because its choices of pages, random numbers and counts are its own.
"""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from ragkit.errors import GenerationError
from ragkit.generation.decoder import Activations
from ragkit.generation.engine import Engine
from ragkit.generation.page_attention import PageAttention
from ragkit.generation.page_lists import PageLayout
from ragkit.generation.paged_prefill import PagedPrefill
from ragkit.generation.sampling import Sampler, SamplingConfig
from ragkit.generation.steps import Finished, FinishReason, GeneratedToken
from ragkit.generation.text_stream import TextStream
from ragkit.kvcache.kv_pages import KVPages
from ragkit.types import KVUse, TokenUsage


class PagedQuestion:
    """The state of one question. Its time runs from `read` on.

    Args:
        engine: the model.
        prefill: how the document's pages are attended to.
        pages: the document, read to its end.
        token_ids: tokens behind the document: the question, and whatever the model's template puts around it.
        sampling: how tokens are chosen; `max_new_tokens` is cut to what the window leaves.

    Attributes:
        sampling: the same, cut.
        answer: its tokens so far, without one that stopped it.
        reason: why it ended; None while it goes on.
        times_chosen: how often each page was chosen by a key head's choice in a layer, sinks and local window apart;
            known at the end.
        choices: how often pages were chosen.

    Raises:
        GenerationError: there is no token, or pages and question do not fit the model's window.
    """

    def __init__(
        self,
        engine: Engine,
        prefill: PagedPrefill,
        pages: KVPages,
        token_ids: Sequence[int],
        sampling: SamplingConfig | None = None,
    ) -> None:
        if not token_ids:
            raise GenerationError("a question has at least one token")
        self._engine = engine
        self._prefill = prefill
        self._pages = pages
        self._token_ids = list(token_ids)
        self.sampling = self._within_window(sampling or SamplingConfig())
        stops = frozenset(engine.decoder.config.stop_token_ids) | frozenset(self.sampling.stop_token_ids)
        self._stops = frozenset() if self.sampling.ignore_stop_tokens else stops
        self._sampler, self._stream = Sampler(self.sampling), TextStream(engine.tokenizer)
        self._attend: PageAttention | None = None
        self._use = KVUse()
        self._started = 0.0
        self._timings: dict[str, float] = {}
        self.answer: list[int] = []
        self.reason: FinishReason | None = None
        self.times_chosen: Counter[int] = Counter()
        self.choices = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the rows that it attends to, in all layers, while it runs."""
        rows = PageLayout.of(self._pages.total_tokens, self._prefill.options).num_rows
        return (rows + self._own_tokens) * self._engine.decoder.layout.bytes_per_token

    @property
    def attend(self) -> PageAttention:
        """What it attends to, from `read` to `finished`."""
        assert self._attend is not None, "it was read and has not ended"
        return self._attend

    @property
    def next_row(self) -> int:
        """The place of the last token among its own rows, which the next step computes."""
        return len(self._token_ids) + len(self.answer) - 1

    @property
    def chooses(self) -> bool:
        """Whether the next step chooses pages: so many tokens of the answer share a choice."""
        return (len(self.answer) - 1) % self._prefill.options.interval == 0

    @torch.inference_mode()
    def read(self) -> Tensor:
        """Read the question over the pages and return (vocab_size,) logits after it.

        Raises:
            KVCacheError: the document was not read to its end, or a page is damaged and cannot be computed again.
            CacheCapacityError: the pages of one layer do not fit the cache.
        """
        self._started = time.perf_counter()
        decoder, window = self._engine.decoder, self._prefill.options.window_tokens
        activations: Activations | None = None
        with self._pages.lock:
            self._attend = attend = self._prefill.attention(self._pages, self._own_tokens)
            for start in range(0, len(self._token_ids), window):
                part = self._token_ids[start : start + window]
                attend.begin(len(part), choose=True)
                activations = decoder.run(part, attend)
            assert activations is not None, "a question has at least one token"
            logits = decoder.logits(activations.rows(slice(-1, None)))[0]
        self._timings["prefill"] = self._elapsed_ms()
        return logits

    def take(self, logits: Tensor, likeliest: int | None = None) -> GeneratedToken | None:
        """Choose the next token by (vocab_size,) logits, and return it; None where it is one that stops.

        Args:
            logits: after the last token.
            likeliest: the token that they say is likeliest, where it is known already.
        """
        is_known = likeliest is not None and self.sampling.temperature == 0
        token = likeliest if is_known and likeliest is not None else self._sampler.next(logits)
        self._timings.setdefault("first_token", self._elapsed_ms())
        if token in self._stops:
            self.reason = FinishReason.STOP_TOKEN
            return None
        self.answer.append(token)
        if len(self.answer) == self.sampling.max_new_tokens:
            self.reason = FinishReason.LENGTH
        return GeneratedToken(token, self._stream.push(token))

    def finished(self) -> Finished:
        """Return what it took, and let its rows go."""
        assert self.reason is not None, "it has ended"
        self._note()
        document, own = self._pages.total_tokens, len(self._token_ids)
        usage = TokenUsage(document + own, document, own, len(self.answer))
        timings = {**self._timings, "total": self._elapsed_ms()}
        return Finished(self._stream.close(), self.reason, tuple(self.answer), usage, timings, self._use)

    @property
    def _own_tokens(self) -> int:
        return len(self._token_ids) + self.sampling.max_new_tokens

    def _note(self) -> None:
        attend = self.attend
        self._attend, self._use = None, attend.use
        counts = attend.choices.times_chosen.cpu()
        pages = counts.nonzero().flatten()
        self.times_chosen.update(dict(zip(pages.tolist(), counts[pages].tolist(), strict=True)))
        self.choices += int(counts.sum()) // max(1, attend.layout.num_chosen)

    def _elapsed_ms(self) -> float:
        return (time.perf_counter() - self._started) * 1e3

    def _within_window(self, sampling: SamplingConfig) -> SamplingConfig:
        options, max_context = self._prefill.options, self._engine.max_context
        options.require_room(self._pages.total_tokens, len(self._token_ids) + 1, max_context)
        room = max_context - options.positions_before(self._pages.total_tokens) - len(self._token_ids)
        return dataclasses.replace(sampling, max_new_tokens=min(sampling.max_new_tokens, room))
