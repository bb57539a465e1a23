"""The target drafts for itself, from the best of the retrieved chunks: same weights, a fraction of the context.

RAPID's drafter (arXiv 2502.20330, section 3.1). On a long prompt a step mostly reads keys and values, which the short
prompt has few of. Its rows come from the chunk store where chunks are blended. Cheaper still: chunks dealt out to
several prompts whose drafts are one tree (after arXiv 2407.08223, which drafts whole answers so), weights of 4 bits,
and layers without attention (arXiv 2406.15786), which lose acceptance and never the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from ragkit.errors import ConfigError
from ragkit.generation.attention import StandaloneAttention
from ragkit.generation.decoder import Activations, Attend, Decoder
from ragkit.generation.draft_model import DraftModel
from ragkit.generation.drafter_model import ModelDrafter
from ragkit.generation.strategy import PrefillStrategy
from ragkit.kernels.add_rms_norm import add_rms_norm
from ragkit.kernels.silu_mul import silu_mul
from ragkit.types import Prompt, Segment

if TYPE_CHECKING:
    from ragkit.generation.engine import Engine

SELF = "self"


def self_drafter(
    engine: Engine,
    *,
    context_tokens: int = 4096,
    width: int = 1,
    strategy: PrefillStrategy | None = None,
    decoder: Decoder | None = None,
    reader: Decoder | None = None,
) -> ModelDrafter:
    """Return the drafter `self`.

    Args:
        engine: the target.
        context_tokens: most tokens of chunks in one prompt.
        width: prompts that the chunks are dealt out to; each is one branch of the tree.
        strategy: brings the short prompt's rows into the pool; None computes it in full.
        decoder: a cheaper variant of the weights; None takes the target's own.
        reader: computes prompts for the variant; None has it do so itself (`DraftModel.of`).
    """
    model = DraftModel.of(engine, decoder, strategy, reader)
    return ModelDrafter(SELF, model, engine, lambda prompt: short_prompts(prompt, context_tokens, width), width)


def short_prompts(prompt: Prompt, context_tokens: int, width: int = 1) -> list[Prompt]:
    """Return at most `width` prompts with the best chunks of `prompt`, dealt out in turn, in the order that they had.

    The best chunk stands last in a prompt. What is no chunk, template and question, is in all of them.

    Args:
        prompt: the target's.
        context_tokens: most tokens of chunks in each; a chunk that does not fit ends the choice.
        width: how many prompts; fewer where there are fewer chunks.

    Raises:
        ConfigError: a number is below 1.
    """
    if context_tokens < 1 or width < 1:
        raise ConfigError(f"drafting takes at least 1 token and 1 prompt, got {context_tokens} and {width}")
    chunks = [index for index, segment in enumerate(prompt.segments) if segment.chunk_id is not None]
    best_first = chunks[::-1]
    prompts = []
    for start in range(min(width, max(1, len(chunks)))):
        kept: set[int] = set()
        left = context_tokens
        for index in best_first[start::width]:
            left -= len(prompt.segments[index].token_ids)
            if left < 0:
                break
            kept.add(index)
        prompts.append(Prompt(tuple(_kept(prompt.segments, kept))))
    return prompts


class AttentionDroppingDecoder(Decoder):
    """A decoder without attention in some layers, whose feed-forward parts stay. Shares the other's weights.

    Args:
        decoder: whose weights.
        dropped: layers without attention; not the first, whose rows tell how long a request is.

    Raises:
        ConfigError: a layer is not there, or is the first.
    """

    def __init__(self, decoder: Decoder, dropped: Sequence[int]) -> None:
        super().__init__(decoder.config, decoder.weights)
        self.dropped = frozenset(dropped)
        if not self.dropped <= set(range(1, decoder.config.num_layers)):
            raise ConfigError(
                f"attention can be dropped in the layers 1 to {decoder.config.num_layers - 1}, got {sorted(dropped)}"
            )

    def layer(self, index: int, activations: Activations, attend: Attend) -> Activations:
        """Return the activations after layer `index`; of a dropped one attention adds nothing."""
        if index not in self.dropped:
            return super().layer(index, activations, attend)
        weights = self.weights.layers[index]
        normed, residual = add_rms_norm(
            activations.hidden, activations.residual, weights.feed_forward_norm, self.config.rms_norm_eps
        )
        return Activations(weights.down(silu_mul(weights.gate_up(normed))), residual)


@torch.inference_mode()
def redundant_attention(engine: Engine, token_ids: Sequence[int], count: int) -> tuple[int, ...]:
    """Return the `count` layers whose attention changes the residual stream least, as `token_ids` show, ascending.

    The measure is the mean cosine between the stream before and after attention (arXiv 2406.15786, equation 3).
    """
    decoder = engine.decoder
    attend = StandaloneAttention(engine.rotary.table(len(token_ids), len(token_ids)), decoder.scale, keep=False)
    activations, alike = decoder.embed(list(token_ids)), []
    for index in range(decoder.config.num_layers):
        projected = decoder.project(index, activations)
        attended = attend(index, projected.queries, projected.keys, projected.values)
        before = projected.residual.float()
        after = before + decoder.weights.layers[index].output(attended.flatten(1)).float()
        alike.append(float(functional.cosine_similarity(before, after, dim=-1).mean()))
        activations = decoder.complete(index, attended, projected.residual)
    best = sorted(range(1, len(alike)), key=alike.__getitem__, reverse=True)
    return tuple(sorted(best[:count]))


def _kept(segments: Sequence[Segment], kept: set[int]) -> list[Segment]:
    return [segment for index, segment in enumerate(segments) if segment.chunk_id is None or index in kept]
