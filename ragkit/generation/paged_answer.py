"""An answer over a paged document: the question is read over its pages, and token after token generated over them."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ragkit.errors import GenerationError
from ragkit.generation.decode import decode
from ragkit.generation.decoder import Activations
from ragkit.generation.engine import Engine
from ragkit.generation.page_attention import PageAttention
from ragkit.generation.page_decode import PageSteps
from ragkit.generation.paged_prefill import PagedPrefill
from ragkit.generation.sampling import SamplingConfig
from ragkit.generation.steps import Finished, GenerationStep
from ragkit.kvcache.kv_pages import KVPages
from ragkit.kvcache.request_kv import RequestKV
from ragkit.types import TokenUsage


class PagedAnswer:
    """One answer. Iterating over `steps` generates it.

    Args:
        engine: the model.
        prefill: how its pages are attended to.
        pages: the document, read to its end.
        question: token ids behind the document: the question, and whatever the model's template puts around it.
        sampling: how tokens are chosen; `max_new_tokens` is cut to what the window leaves.

    Attributes:
        times_chosen: how often each page was chosen by a key head's choice in a layer, sinks and local window apart.
        choices: how often pages were chosen.
    """

    def __init__(
        self,
        engine: Engine,
        prefill: PagedPrefill,
        pages: KVPages,
        question: Sequence[int],
        sampling: SamplingConfig | None = None,
    ) -> None:
        if not question:
            raise GenerationError("a question has at least one token")
        self._engine = engine
        self._prefill = prefill
        self._pages = pages
        self._question = list(question)
        self._sampling = self._within_window(sampling or SamplingConfig())
        self.times_chosen: Counter[int] = Counter()
        self.choices = 0

    @torch.inference_mode()
    def steps(self) -> Iterator[GenerationStep]:
        """Yield a `GeneratedToken` a token, and `Finished` at the end.

        Raises:
            KVCacheError: the document was not read to its end, or a page is damaged and cannot be computed again.
            CacheCapacityError: the pages of one layer do not fit the cache.
        """
        engine, pages, sampling = self._engine, self._pages, self._sampling
        started = time.perf_counter()
        with RequestKV(engine.pool) as nothing:
            before = pages.use()
            with pages.lock:  # never across a step that is given away: the next may be asked for by another thread
                attend = self._prefill.attention(pages, len(self._question) + sampling.max_new_tokens)
                logits = self._read_question(attend)
            timings = {"prefill": (time.perf_counter() - started) * 1e3}
            stops = frozenset(engine.decoder.config.stop_token_ids) | frozenset(sampling.stop_token_ids)
            tokens = decode(
                PageSteps.of(engine.decoder, attend, self._prefill.options.interval, len(self._question)),
                nothing,
                engine.rotary.table(1, 1),
                logits,
                sampling,
                frozenset() if sampling.ignore_stop_tokens else stops,
                engine.tokenizer,
            )
            while True:
                try:
                    step = next(tokens)
                except StopIteration as end:
                    ended = end.value
                    break
                timings.setdefault("first_token", (time.perf_counter() - started) * 1e3)
                yield step
            use = pages.use(before)
            self._note(attend)
        timings["total"] = (time.perf_counter() - started) * 1e3
        timings.setdefault("first_token", timings["total"])
        document = pages.total_tokens
        usage = TokenUsage(document + len(self._question), document, len(self._question), len(ended.token_ids))
        yield Finished(ended.piece, ended.reason, ended.token_ids, usage, timings, use)

    def _read_question(self, attend: PageAttention) -> Tensor:
        """Return (vocab_size,) logits after the question."""
        decoder, window = self._engine.decoder, self._prefill.options.window_tokens
        activations: Activations | None = None
        for start in range(0, len(self._question), window):
            part = self._question[start : start + window]
            attend.begin(len(part), choose=True)
            activations = decoder.run(part, attend)
        assert activations is not None, "a question has at least one token"
        return decoder.logits(activations.rows(slice(-1, None)))[0]

    def _note(self, attend: PageAttention) -> None:
        counts = attend.choices.times_chosen.cpu()
        pages = counts.nonzero().flatten()
        self.times_chosen.update(dict(zip(pages.tolist(), counts[pages].tolist(), strict=True)))
        self.choices += int(counts.sum()) // max(1, attend.layout.num_chosen)

    def _within_window(self, sampling: SamplingConfig) -> SamplingConfig:
        options, max_context = self._prefill.options, self._engine.max_context
        options.require_room(self._pages.total_tokens, len(self._question) + 1, max_context)
        room = max_context - options.positions_before(self._pages.total_tokens) - len(self._question)
        return dataclasses.replace(sampling, max_new_tokens=min(sampling.max_new_tokens, room))
