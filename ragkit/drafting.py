"""Which drafter a question gets, by its settings: made once for a pipeline, and told how to look for other chunks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from ragkit.config import DraftMode, Strategy
from ragkit.draft_config import DraftConfig

if TYPE_CHECKING:
    from ragkit.answers.options import QueryOptions
    from ragkit.answers.steps import PreparedQuestion
    from ragkit.generation.drafter import Drafter
    from ragkit.generation.speculative_decode import Drafting
    from ragkit.generation.strategy import PrefillStrategy
    from ragkit.parts import Parts
    from ragkit.types import Prompt

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
    transfer = Transfer(config.strength) if config.mode is DraftMode.TRANSFER else None
    drafter = parts.drafter(config, blended=blended, prompt=prepared.built.prompt)
    retrieve = _retrieve(parts, prepared) if config.retrieve_anew else None
    return Drafting(drafter, transfer, DraftLimits(config.depth), retrieve)


def make_drafter(parts: Parts, config: DraftConfig, *, blended: bool, prompt: Prompt) -> Drafter:
    """Return the drafter that `config` names.

    Args:
        parts: the pipeline's models.
        config: the settings.
        blended: whether the question's prompt is blended; then what a drafter reads of it is, too.
        prompt: of the first question that it drafts for.
    """
    # `auto` takes what costs nothing where it brings nothing: a lookup is a thousandth of a step, and is cut to what
    # its own record says is worth verifying. A model that drafts must win back its steps and the rows of its prompt.
    if config.drafter in ("auto", "lookup"):
        from ragkit.generation.drafter_lookup import LookupDrafter

        return LookupDrafter()
    if config.drafter == "self":
        return _self_drafter(parts, config, blended, prompt)
    from ragkit.generation.drafter_model import DraftModel, ModelDrafter

    engine = parts.draft_engine(config.drafter)
    return ModelDrafter(config.drafter, DraftModel.of(engine), parts.engine)


def options_key(config: DraftConfig, *, blended: bool) -> tuple[object, ...]:
    """Return what two questions must share to share a drafter."""
    if config.drafter != "self":
        return (config.drafter,)
    return (config.drafter, config.context_tokens, config.prompts, config.dropped_layers, blended)


def _self_drafter(parts: Parts, config: DraftConfig, blended: bool, prompt: Prompt) -> Drafter:
    from ragkit.generation.drafter_self import AttentionDroppingDecoder, redundant_attention, self_drafter

    engine = parts.engine
    decoder = None
    # Blended rows belong to all layers of the whole model, which a variant does not have.
    strategy: PrefillStrategy | None = parts.blending.prefill if blended and not config.dropped_layers else None
    if config.dropped_layers:
        sample = prompt.token_ids[:_CALIBRATION_TOKENS]
        decoder = AttentionDroppingDecoder(engine.decoder, redundant_attention(engine, sample, config.dropped_layers))
    return self_drafter(
        engine, context_tokens=config.context_tokens, width=config.prompts, strategy=strategy, decoder=decoder
    )


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
