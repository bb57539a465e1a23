"""The decoding loop of one request: sample, stream, step, stop."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

from torch import Tensor

from ragkit.generation.decode_state import DecodeState, StepRunner
from ragkit.generation.sampling import Sampler, SamplingConfig
from ragkit.generation.steps import FinishReason, GeneratedToken
from ragkit.generation.text_stream import TextStream
from ragkit.kvcache.request_kv import RequestKV
from ragkit.kvcache.rope import RotaryTable
from ragkit.types import TextTokenizer


@dataclass(frozen=True, slots=True)
class Decoded:
    """What the loop returns at its end: the held-back text, the reason, and the tokens without the stopping one."""

    piece: str
    reason: FinishReason
    token_ids: tuple[int, ...]


def decode(
    runner: StepRunner,
    kv: RequestKV,
    rotary: RotaryTable,
    logits: Tensor,
    sampling: SamplingConfig,
    stop_token_ids: frozenset[int],
    tokenizer: TextTokenizer,
) -> Generator[GeneratedToken, None, Decoded]:
    """Yield one `GeneratedToken` a token and return how it ended.

    Args:
        runner: runs the steps.
        kv: the request, its prompt in place and rows reserved for `sampling.max_new_tokens` more.
        rotary: the request's rotary table.
        logits: (vocab_size,) after the prompt.
        sampling: how tokens are chosen.
        stop_token_ids: tokens that end the answer.
        tokenizer: turns tokens into text.
    """
    sampler, stream = Sampler(sampling), TextStream(tokenizer)
    token_ids: list[int] = []
    state: DecodeState | None = None
    while True:
        token = sampler.next(logits)
        if token in stop_token_ids:
            return Decoded(stream.close(), FinishReason.STOP_TOKEN, tuple(token_ids))
        token_ids.append(token)
        yield GeneratedToken(token, stream.push(token))
        if len(token_ids) == sampling.max_new_tokens:
            return Decoded(stream.close(), FinishReason.LENGTH, tuple(token_ids))
        if state is None:  # not before: it may copy the whole KV, which the first token need not wait for
            state = runner.begin(kv, rotary)
        logits = runner.step([state], [token])[0]
