"""The engine: one loaded model with its KV pool, which generates answers and computes losses and KV."""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from ragkit.config import Device
from ragkit.errors import CacheCapacityError, GenerationError
from ragkit.generation.admission import Admission
from ragkit.generation.attention import StandaloneAttention
from ragkit.generation.contiguous_decode import ContiguousDecodeRunner
from ragkit.generation.contiguous_verify import ContiguousVerifier
from ragkit.generation.decode import decode
from ragkit.generation.decode_runner import DecodeRunner
from ragkit.generation.decode_state import DecodeState, StepRunner
from ragkit.generation.decoder import Decoder
from ragkit.generation.draft_costs import Costs, MeasuredCosts
from ragkit.generation.full_prefill import FullPrefill
from ragkit.generation.placement import kv_tokens_that_fit, resolve_device, resolve_dtype
from ragkit.generation.prompt import PromptBuilder
from ragkit.generation.rotary_cache import RotaryCache
from ragkit.generation.sampling import SamplingConfig
from ragkit.generation.speculative_decode import Drafting, SpeculativeRequest, speculative_decode
from ragkit.generation.steps import Finished, GenerationStep
from ragkit.generation.strategy import PrefillRequest, PrefillStrategy
from ragkit.generation.verification import Verifier
from ragkit.generation.verify_runner import VerifyRunner
from ragkit.kvcache.coverage import Ratio
from ragkit.kvcache.pool import BLOCK_SIZE, KVPool
from ragkit.kvcache.request_kv import RequestKV
from ragkit.models.chat_template import ChatTemplate
from ragkit.models.fingerprint import weights_stamp
from ragkit.models.resolve import resolve
from ragkit.models.tokenizer import ModelTokenizer
from ragkit.progress import Progress
from ragkit.types import CausalOutput, DraftUse, Prompt, TokenUsage

_log = logging.getLogger(__name__)
_LOSS_ROWS = 512  # rows of logits held at once while losses are computed
_KEPT_BUILDERS = 8  # rendering and tokenising the chat template takes milliseconds


class Engine:
    """A generator: model, tokenizer, pool and prefill strategies. Requests keep their state in their own objects.

    Attributes:
        model_name: the name it was loaded by.
        max_context: most tokens of prompt and answer.
        tokenizer: the model's tokenizer.
        decoder: the model.
        pool: its KV blocks.
        admission: who may take blocks, where several threads ask.
        draft_costs: what passes over drafts cost here.
        weights_stamp: `ragkit.models.weights_stamp` of the folder when the weights were loaded.
    """

    def __init__(
        self,
        model_name: str,
        decoder: Decoder,
        tokenizer: ModelTokenizer,
        folder: Path,
        *,
        kv_tokens: int = 0,
        strategies: Sequence[PrefillStrategy] = (FullPrefill(),),
        stamp: str = "",
    ) -> None:
        self.model_name = model_name
        self.decoder = decoder
        self.tokenizer = tokenizer
        self.folder = folder
        self.weights_stamp = stamp or weights_stamp(folder)
        self.max_context = decoder.config.max_context
        kv_tokens = kv_tokens or kv_tokens_that_fit(decoder)
        # One block more than the tokens take: the graph runner keeps one for unused places of a batch.
        self.pool = KVPool(decoder.layout, -(-kv_tokens // BLOCK_SIZE) + 1, decoder.device)
        self.admission = Admission(self.pool.num_blocks - 1, free=self.pool.free_after_reclaim)
        self._strategies: dict[str, PrefillStrategy] = {strategy.name: strategy for strategy in strategies}
        self.rotary = RotaryCache(decoder)
        self._builders: dict[str, PromptBuilder] = {}
        self._building = threading.Lock()
        self.draft_costs = MeasuredCosts(decoder.device.type)
        self._runner: StepRunner = (
            DecodeRunner(decoder, self.pool) if decoder.device.type == "cuda" else ContiguousDecodeRunner(decoder)
        )

    @classmethod
    def load(
        cls,
        name_or_folder: str | Path,
        device: str = "auto",
        dtype: str = "auto",
        offline: bool = False,
        *,
        kv_tokens: int = 0,
        progress: Progress | None = None,
    ) -> Engine:
        """Return an engine for a bundled name, folder, `.gguf` file or Hugging Face id.

        Args:
            name_or_folder: what `ragkit.models.resolve` takes.
            device: auto, cpu or cuda.
            dtype: auto, float32, bfloat16 or float16; `auto` is bfloat16 where the device multiplies it natively.
            offline: fetch nothing.
            kv_tokens: size of the KV pool in tokens; 0 takes the model's window, or what memory allows.
            progress: hears about downloads.

        Raises:
            OfflineError: the model would have to be fetched.
            ModelError: there is no such model, or it is not supported.
        """
        folder = resolve(str(name_or_folder), offline=offline, progress=progress)
        place = resolve_device(Device(device))
        stamp = weights_stamp(folder)  # before the weights: whoever replaces them meanwhile is noticed
        decoder = Decoder.load(folder, place, resolve_dtype(dtype, place))
        return cls(str(name_or_folder), decoder, ModelTokenizer(folder), folder, kv_tokens=kv_tokens, stamp=stamp)

    def prompt_builder(self, system_prompt: str = "") -> PromptBuilder:
        """Return the builder of this model's prompts, made once for each system prompt that is in use.

        Raises:
            ModelError: the model has no chat template.
        """
        with self._building:
            builder = self._builders.pop(system_prompt, None)
            if builder is None:
                builder = PromptBuilder(self.tokenizer, ChatTemplate(self.folder), self.max_context, system_prompt)
            self._builders[system_prompt] = builder  # now the last one to leave
            if len(self._builders) > _KEPT_BUILDERS:
                del self._builders[next(iter(self._builders))]
            return builder

    @property
    def strategies(self) -> Mapping[str, PrefillStrategy]:
        """The prefill strategies by name."""
        return self._strategies

    def add_strategy(self, strategy: PrefillStrategy) -> None:
        """Offer one more prefill strategy, before the first request."""
        self._strategies[strategy.name] = strategy

    @torch.inference_mode()
    def generate(
        self,
        prompt: Prompt,
        sampling: SamplingConfig | None = None,
        strategy: str | PrefillStrategy = "full",
        ratio: Ratio | None = None,
        drafting: Drafting | None = None,
    ) -> Iterator[GenerationStep]:
        """Yield a `GeneratedToken` a token, and `Finished` at the end.

        `strategy` is one of `strategies` by name, or any other. `ratio` is the part of reused tokens that is
        recomputed, or what that must cover, for strategies that reuse; None is the strategy's own.
        `drafting` has several tokens verified in one pass; None generates them one by one.
        `sampling.max_new_tokens` is cut to what the window leaves. The request's blocks are free again when the
        iterator ends or is closed.

        Raises:
            GenerationError: the prompt is empty or fills the window, or the strategy is unknown.
            CacheCapacityError: the pool has too few free blocks.
        """
        sampling = self.within_window(prompt, sampling or SamplingConfig())
        chosen = self.strategy(strategy) if isinstance(strategy, str) else strategy
        started = time.perf_counter()
        total = len(prompt) + sampling.max_new_tokens
        # Rows of chunks that are shared, or recomputed beside them, fill their last block only in part.
        blocks = self.pool.blocks_for(total) + len(prompt.segments)
        with self.admission.admitted(blocks) as admitted, RequestKV(self.pool) as kv, ExitStack() as ending:
            rotary = self.rotary.table(total, prompt_tokens=len(prompt))
            request = PrefillRequest(prompt, kv, rotary, ratio, sampling.max_new_tokens)
            prefilled = chosen.prefill(self.decoder, request)
            kv.reserve(total)
            admitted.has_taken()
            stops = frozenset(self.decoder.config.stop_token_ids) | frozenset(sampling.stop_token_ids)
            stops = frozenset() if sampling.ignore_stop_tokens else stops
            drafted = None if drafting is None else self.speculative_request(drafting, prompt, sampling, stops)
            if drafted is None:
                tokens = decode(self._runner, kv, rotary, prefilled.logits, sampling, stops, self.tokenizer)
            else:
                self._record_for([DecodeState(kv, rotary)])
                tokens = speculative_decode(
                    drafted, self._runner, self.verifier, kv, rotary, prefilled.logits, self.tokenizer
                )
            ending.callback(tokens.close)  # what drafts has blocks, too: nobody is let in before they are free
            timings = {"prefill": (time.perf_counter() - started) * 1e3, **prefilled.timings_ms}
            while True:
                try:
                    step = next(tokens)
                except StopIteration as end:
                    ended = end.value
                    break
                is_first = "first_token" not in timings
                timings.setdefault("first_token", (time.perf_counter() - started) * 1e3)
                yield step
                if is_first and prefilled.afterwards is not None:
                    prefilled.afterwards()
        timings["total"] = (time.perf_counter() - started) * 1e3
        timings.setdefault("first_token", timings["total"])
        usage = TokenUsage(len(prompt), prefilled.reused, prefilled.recomputed, len(ended.token_ids))
        yield Finished(
            ended.piece, ended.reason, ended.token_ids, usage, timings, prefilled.kv,
            prefilled.warnings + (() if drafted is None else drafted.warnings),
            DraftUse() if drafted is None else drafted.use(),
        )  # fmt: skip

    @property
    def step_runner(self) -> StepRunner:
        """What runs steps in which every request decodes one token."""
        return self._runner

    @cached_property
    def verifier(self) -> Verifier:
        """What verifies drafted tokens, over the states of the engine's decoding steps."""
        if isinstance(self._runner, DecodeRunner):
            return VerifyRunner(self.decoder, self.pool, self._runner.scratch_slot)
        return ContiguousVerifier(self.decoder)

    def record_ahead(self, record: Callable[[Sequence[DecodeState]], None]) -> None:
        """Have `record` record what requests with up to some thousand tokens replay, before there is one.

        Where no block is spare for that the first request's own are used.
        """
        try:
            with self.admission.spare(1) as spare, RequestKV(self.pool) as kv:
                kv.reserve(1)
                spare.has_taken()
                record([DecodeState(kv, self.rotary.table(1, prompt_tokens=1))])
        except CacheCapacityError as error:
            _log.info("nothing recorded ahead: %s", error)

    def prepare_drafting(self) -> None:
        """Record what drafted answers replay, plain steps included; longer requests record theirs as they begin."""
        self.record_ahead(self._record_for)

    def _record_for(self, states: Sequence[DecodeState]) -> None:
        verifier = self.verifier
        if isinstance(self._runner, DecodeRunner) and isinstance(verifier, VerifyRunner):
            self._runner.prepare(states)
            verifier.prepare(states)

    def speculative_request(
        self, drafting: Drafting, prompt: Prompt, sampling: SamplingConfig, stop_token_ids: frozenset[int],
        costs: Costs | None = None,
    ) -> SpeculativeRequest:  # fmt: skip
        """Return the state of a request that is drafted, whose drafts' lengths follow what passes cost here."""
        return SpeculativeRequest(drafting, prompt, sampling, stop_token_ids, costs or self.draft_costs)

    @torch.inference_mode()
    def forward(self, token_ids: Sequence[int], past: Sequence[tuple[Tensor, Tensor]] = ()) -> CausalOutput:
        """Return logits and KV of `token_ids` computed behind `past`, as `CausalModel` says."""
        attend = self._standalone(token_ids, past, keep=True)
        activations = self.decoder.run(token_ids, attend)
        logits = self.decoder.logits(activations.rows(slice(-1, None)))[0]
        return CausalOutput(logits, tuple(attend.kept))

    @torch.inference_mode()
    def token_losses(self, token_ids: Sequence[int], past: Sequence[tuple[Tensor, Tensor]] = ()) -> Tensor:
        """Return nats of each token but the first, as `CausalModel` says."""
        activations = self.decoder.run(token_ids, self._standalone(token_ids, past, keep=False))
        targets = torch.tensor(token_ids[1:], dtype=torch.int64).to(self.decoder.device)
        losses = [
            torch.nn.functional.cross_entropy(
                self.decoder.logits(activations.rows(slice(start, start + len(part)))).float(), part, reduction="none"
            )
            for start, part in zip(range(0, len(targets), _LOSS_ROWS), targets.split(_LOSS_ROWS), strict=False)
            if len(part)
        ]
        return torch.cat(losses) if losses else torch.empty(0, device=self.decoder.device)

    def strategy(self, name: str) -> PrefillStrategy:
        """Return one of `strategies`.

        Raises:
            GenerationError: there is none of that name.
        """
        if name not in self._strategies:
            raise GenerationError(f"there is no prefill strategy {name!r}; there are {', '.join(self._strategies)}")
        return self._strategies[name]

    def _standalone(
        self, token_ids: Sequence[int], past: Sequence[tuple[Tensor, Tensor]], *, keep: bool
    ) -> StandaloneAttention:
        total = len(token_ids) + (len(past[0][0]) if past else 0)
        if not token_ids or total > self.max_context:
            raise GenerationError(f"a pass takes 1 to {self.max_context} tokens, earlier ones included, got {total}")
        return StandaloneAttention(self.rotary.table(total, total), self.decoder.scale, past, keep=keep)

    def within_window(self, prompt: Prompt, sampling: SamplingConfig) -> SamplingConfig:
        """Return `sampling` with the answer cut to what the window leaves behind `prompt`.

        Raises:
            GenerationError: the prompt is empty or fills the window.
        """
        room = self.max_context - len(prompt)
        if len(prompt) == 0 or room < 1:
            raise GenerationError(
                f"the prompt has {len(prompt)} tokens, and {self.model_name} takes 1 to {self.max_context - 1}: "
                "give fewer chunks or a shorter question"
            )
        return dataclasses.replace(sampling, max_new_tokens=min(sampling.max_new_tokens, room))
