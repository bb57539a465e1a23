"""Which drafter a question gets, by its settings: made once for a pipeline, and told how to look for other chunks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ragkit.config import DraftMode, DraftWeights, Strategy
from ragkit.draft_config import DRAFTERS, DraftConfig
from ragkit.errors import ModelError

if TYPE_CHECKING:
    from ragkit.answers.options import QueryOptions
    from ragkit.answers.steps import PreparedQuestion
    from ragkit.generation.decoder import Decoder
    from ragkit.generation.drafter import Drafter, DraftPrice
    from ragkit.generation.speculative_decode import Drafting
    from ragkit.generation.strategy import PrefillStrategy
    from ragkit.parts import Parts
    from ragkit.types import Prompt

_log = logging.getLogger(__name__)
_BETTER = 1.05  # times as fast as looking up must `self` seem before `auto` takes it
_ANSWER_TOKENS = 64  # of the answer so far that other chunks are looked for with
_CALIBRATION_TOKENS = 512  # of the first prompt, by which attention that changes little is found
NO_PAGES = "not drafted: an answer from pages chooses what it attends to token by token"


def drafting_for(parts: Parts, prepared: PreparedQuestion) -> Drafting | None:
    """Return how a question is drafted; None where it is not.

    Raises:
        ModelError: the model that should draft cannot be loaded.
        ConfigError: it cannot draft for the generator.
    """
    config = prepared.options.draft
    if config.drafter == "none":
        return None
    from ragkit.generation.acceptance import Transfer
    from ragkit.generation.draft_control import DraftLimits
    from ragkit.generation.speculative_decode import Drafting

    blended = prepared.strategy is Strategy.BLEND
    is_moved = config.mode is DraftMode.TRANSFER and config.strength > 0  # with none of it the answer is the model's
    transfer = Transfer(config.strength) if is_moved else None
    if config.drafter == "auto":
        config = replace(config, drafter=chosen_by_auto(parts, prepared))
    drafter = parts.drafter(config, blended=blended, prompt=prepared.built.prompt)
    retrieve = _retrieve(parts, prepared) if config.retrieve_anew else None
    return Drafting(drafter, transfer, DraftLimits(config.depth), retrieve)


def chosen_by_auto(parts: Parts, prepared: PreparedQuestion) -> str:
    """Return `self` where it should bring more than `lookup`, and `lookup` elsewhere.

    What lookup brings is what it has brought so far; what `self` would, by what it reads (or measured times, once it
    has drafted) and by how much of its drafts has stood so far. Sampled answers are looked up: those of a seed are
    then the same with and without drafts, whatever was asked before.
    """
    from ragkit.generation.draft_control import DraftController, DraftLimits

    options, prompt = prepared.options, prepared.built.prompt
    config, costs = replace(options.draft, drafter="self"), parts.engine.draft_costs
    if options.generation.temperature > 0:
        return "lookup"
    price = _self_price(parts, config, prompt, blended=prepared.strategy is Strategy.BLEND)
    controller = DraftController(costs, DraftLimits(config.depth), config.prompts, "self")
    own = controller.expected_speed(price, len(prompt), options.generation.max_new_tokens)
    looked_up = max(1.0, costs.record("lookup").speed)
    _log.info("auto: self should be %.2f times as fast as no drafts, lookup %.2f", own, looked_up)
    return "self" if own > _BETTER * looked_up else "lookup"


def _self_price(parts: Parts, config: DraftConfig, prompt: Prompt, *, blended: bool) -> DraftPrice:
    """Return what `self` would cost for this prompt, without making it."""
    from ragkit.generation.drafter import DraftPrice
    from ragkit.generation.drafter_model import REUSED
    from ragkit.generation.drafter_self import short_prompts
    from ragkit.generation.weight_bytes import int4_copy_bytes, weight_bytes

    made = parts.made_drafter(config, blended=blended)
    if made is not None:
        return made.price(prompt)
    decoder = parts.engine.decoder
    prompts = short_prompts(prompt, config.context_tokens, config.prompts)
    row, tokens = decoder.layout.bytes_per_token, sum(map(len, prompts))
    own = int4_copy_bytes(decoder) if config.weights is DraftWeights.INT4 else weight_bytes(decoder)
    share = (own + tokens * row) / (weight_bytes(decoder) + len(prompt) * row)
    computed = round(tokens * (1 - REUSED)) if blended and not config.dropped_layers else tokens
    return DraftPrice(step_share=share, begin_tokens=computed)


def make_drafter(parts: Parts, config: DraftConfig, *, blended: bool, prompt: Prompt) -> Drafter:
    """Return the drafter that `config` names.

    Args:
        parts: the pipeline's models.
        config: the settings.
        blended: whether the question's prompt is blended; then what a drafter reads of it is, too.
        prompt: of the first question that it drafts for.
    """
    parts.engine.prepare_drafting()
    if config.drafter in ("auto", "lookup"):
        from ragkit.generation.drafter_lookup import LookupDrafter

        return LookupDrafter()
    if config.drafter == "self":
        return _self_drafter(parts, config, blended, prompt)
    from ragkit.generation.drafter_model import model_drafter

    try:
        engine = parts.draft_engine(config.drafter)
    except ModelError as error:
        known = ", ".join(DRAFTERS)
        raise ModelError(f"cannot draft with {config.drafter!r} (a drafter is {known} or a model): {error}") from error
    return model_drafter(config.drafter, engine, parts.engine)


def options_key(config: DraftConfig, *, blended: bool) -> tuple[object, ...]:
    """Return what two questions must share to share a drafter."""
    if config.drafter != "self":
        return (config.drafter,)
    return (config.drafter, config.context_tokens, config.prompts, config.weights, config.dropped_layers, blended)


def _self_drafter(parts: Parts, config: DraftConfig, blended: bool, prompt: Prompt) -> Drafter:
    from ragkit.generation.drafter_self import AttentionDroppingDecoder, redundant_attention, self_drafter

    engine = parts.engine
    decoder: Decoder | None = None
    reader: Decoder | None = None
    if config.weights is DraftWeights.INT4:
        decoder, reader = parts.int4_decoder, engine.decoder
    # Blended rows belong to all layers of the whole model, which a variant does not have.
    strategy: PrefillStrategy | None = parts.blending.prefill if blended and not config.dropped_layers else None
    if config.dropped_layers:
        sample, reader = prompt.token_ids[:_CALIBRATION_TOKENS], None
        dropped = redundant_attention(engine, sample, config.dropped_layers)
        decoder = AttentionDroppingDecoder(decoder or engine.decoder, dropped)
    return self_drafter(
        engine, context_tokens=config.context_tokens, width=config.prompts, strategy=strategy, decoder=decoder,
        reader=reader,
    )  # fmt: skip


def _retrieve(parts: Parts, prepared: PreparedQuestion) -> Callable[[Sequence[int]], Prompt | None]:
    options: QueryOptions = prepared.options

    def retrieve(token_ids: Sequence[int]) -> Prompt | None:
        answered = parts.engine.tokenizer.decode(list(token_ids[-_ANSWER_TOKENS:]))
        question = f"{prepared.question} {answered}"
        found = parts.retriever.retrieve(question, options.retrieval.k, options.retrieval_filters or None)
        if not found.chunks:
            return None
        generation = options.generation
        builder = parts.engine.prompt_builder(generation.system_prompt)
        return builder.build(
            prepared.question,
            [one.stored.chunk for one in found.chunks],
            max_new_tokens=generation.max_new_tokens,
            context_tokens=generation.context_tokens,
        ).prompt

    return retrieve
