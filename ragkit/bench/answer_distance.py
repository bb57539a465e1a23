"""How far an answer that starts from a blended prompt is from the one that full prefill gives.

Both are followed along the same tokens, full prefill's own greedy answer, so that one early difference does not count
once a token (teacher forcing).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ragkit.errors import GenerationError
from ragkit.generation.decoder import Decoder
from ragkit.generation.rotary_cache import RotaryCache
from ragkit.generation.strategy import PrefillRequest, PrefillResult, PrefillStrategy
from ragkit.kernels.rope_write_kv import rope_write_kv
from ragkit.kernels.selected_attention import selected_attention
from ragkit.kvcache.pool import KVPool
from ragkit.kvcache.request_kv import RequestKV, pack_rows
from ragkit.kvcache.rope import RotaryTable
from ragkit.types import Prompt

ANSWER_TOKENS = 16
#: Rows that a request needs behind its prompt.
ROOM_BEHIND = 64


@dataclass(frozen=True, slots=True)
class PrefillOutcome:
    """What one prefill leads to.

    Attributes:
        along: (answer tokens, vocab) fp32 logits before each token of `answer`.
        answer: the tokens that were followed, stop tokens included.
        nll: nats a token of the gold answer; None where there is none.
        recomputed: part of the chunks' tokens that was computed.
    """

    along: Tensor
    answer: tuple[int, ...]
    nll: float | None
    recomputed: float


@dataclass(frozen=True, slots=True)
class AnswerDistance:
    """How far one prefill is from full prefill on one prompt.

    Attributes:
        kl_first: KL divergence, in nats, of the first answer token's distribution from full prefill's.
        kl_mean: the mean of it over the answer's tokens.
        same_first: 1 where both have the same likeliest first token, else 0.
        nll, nll_full: nats a token of the gold answer, and full prefill's; None where there is no gold answer.
        recomputed: part of the chunks' tokens that was computed.
        largest_logit_difference: of the first answer token.
    """

    kl_first: float
    kl_mean: float
    same_first: float
    nll: float | None
    nll_full: float | None
    recomputed: float
    largest_logit_difference: float


class AnswerScorer:
    """Follows answers of one model.

    Args:
        decoder: the model.
        rotary: its rotary tables.
        pool: has room for a prompt and `ROOM_BEHIND` tokens.
    """

    def __init__(self, decoder: Decoder, rotary: RotaryCache, pool: KVPool) -> None:
        self.decoder = decoder
        self.rotary = rotary
        self.pool = pool

    @torch.inference_mode()
    def outcome(
        self, strategy: PrefillStrategy, prompt: Prompt, gold: Sequence[int] = (), answer: Sequence[int] | None = None
    ) -> PrefillOutcome:
        """Return what `strategy` leads to, along `answer`, or along its own greedy answer of `ANSWER_TOKENS` tokens.

        Raises:
            GenerationError: the prefill was not done as configured.
        """
        with RequestKV(self.pool) as kv:
            total = len(prompt) + ROOM_BEHIND
            rotary = self.rotary.table(total, len(prompt))
            result = strategy.prefill(self.decoder, PrefillRequest(prompt, kv, rotary, answer_tokens=ROOM_BEHIND))
            if result.warnings:
                raise GenerationError(f"a prefill is not what was to be measured: {'; '.join(result.warnings)}")
            behind = _BehindPrompt(self.decoder, kv, rotary)
        first = result.logits.float()
        followed = _greedy(behind, first) if answer is None else tuple(answer)
        along = torch.cat((first.unsqueeze(0), behind.logits(followed[:-1])))
        nll = _nats_of(gold, torch.cat((first.unsqueeze(0), behind.logits(gold[:-1])))) if gold else None
        return PrefillOutcome(along, followed, nll, _recomputed_share(prompt, result))


class _BehindPrompt:
    """Passes over tokens behind a prompt, whose keys are rotated once for all of them.

    Args:
        decoder: the model.
        kv: the request that holds the prompt; it may end afterwards.
        rotary: its rotary table, with `ROOM_BEHIND` positions behind the prompt.
    """

    def __init__(self, decoder: Decoder, kv: RequestKV, rotary: RotaryTable) -> None:
        self._decoder = decoder
        self._rotary = rotary
        self._prompt = kv.num_tokens
        self._start, self._positions = 0, torch.empty(0)  # of the pass that runs
        self._layers: list[tuple[Tensor, Tensor]] = []
        packed = pack_rows([kv]).to(decoder.device)
        for layer in range(decoder.config.num_layers):
            keys, values = kv.rows(layer, packed)
            room = (ROOM_BEHIND, *keys.shape[1:])
            rotated = rotary.rotate(keys, packed.positions)
            self._layers.append(
                (torch.cat((rotated, keys.new_empty(room))), torch.cat((values, values.new_empty(room))))
            )

    def logits(self, token_ids: Sequence[int], kept: int = 0) -> Tensor:
        """Return (tokens, vocab) fp32 after each of `token_ids`, which stand behind `kept` tokens of earlier passes."""
        if not token_ids:
            return torch.empty((0, self._decoder.config.vocab_size), device=self._decoder.device)
        self._start = self._prompt + kept
        self._positions = torch.arange(self._start, self._start + len(token_ids), device=self._decoder.device)
        return self._decoder.logits(self._decoder.run(list(token_ids), self._attend)).float()

    def _attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        stored_keys, stored_values = self._layers[layer]
        rope_write_kv(
            queries, keys, values, self._positions, self._positions, self._rotary.cos, self._rotary.sin,
            stored_keys.unsqueeze(0), stored_values.unsqueeze(0), rotate_keys=True,
        )  # fmt: skip
        stop = self._start + len(keys)
        stored_keys[self._start : stop] = keys  # written un-rotated, and rotated in place after that
        positions = self._positions.to(torch.int32)
        scale = self._decoder.scale
        return selected_attention(queries, stored_keys[:stop], stored_values[:stop], positions, scale=scale)


def _greedy(behind: _BehindPrompt, first: Tensor) -> tuple[int, ...]:
    tokens = [int(first.argmax())]
    while len(tokens) < ANSWER_TOKENS:
        tokens.append(int(behind.logits(tokens[-1:], kept=len(tokens) - 1)[-1].argmax()))
    return tuple(tokens)


def _nats_of(gold: Sequence[int], logits: Tensor) -> float:
    targets = torch.tensor(list(gold), device=logits.device).unsqueeze(1)
    return float(-logits.log_softmax(-1).gather(1, targets).mean())


def distance_between(got: PrefillOutcome, reference: PrefillOutcome) -> AnswerDistance:
    """Return how far `got` is from `reference`, full prefill's outcome; both follow the same answer."""
    theirs, mine = reference.along.log_softmax(-1), got.along.log_softmax(-1)
    divergence = (theirs.exp() * (theirs - mine)).sum(-1)
    return AnswerDistance(
        kl_first=float(divergence[0]),
        kl_mean=float(divergence.mean()),
        same_first=float(mine[0].argmax() == theirs[0].argmax()),
        nll=got.nll,
        nll_full=reference.nll,
        recomputed=got.recomputed,
        largest_logit_difference=float((got.along[0] - reference.along[0]).abs().max()),
    )


def _recomputed_share(prompt: Prompt, result: PrefillResult) -> float:
    chunk_tokens = sum(len(one.token_ids) for one in prompt.segments if one.chunk_id is not None)
    beside = len(prompt) - chunk_tokens if result.reused == 0 else len(prompt.segments[-1].token_ids)
    return (result.recomputed - beside) / max(chunk_tokens, 1)
