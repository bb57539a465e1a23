"""The options that every command takes which answers questions, and the settings that they stand for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

from ragkit.answers.options import require_ratio_use
from ragkit.cli.common import flag
from ragkit.config import AUTO, DraftMode, Strategy
from ragkit.errors import UsageError
from ragkit.settings import Flag, Settings

TopKOption = Annotated[int | None, typer.Option("-k", min=1, metavar="N", help="Chunks to retrieve.")]
StrategyOption = Annotated[Strategy | None, typer.Option("--strategy", help="How the prompt is prefilled.")]
RatioOption = Annotated[
    str | None,
    typer.Option(
        "--ratio", metavar="R", help="Part of the chunks' tokens that blend recomputes, from 0 to 1, or auto."
    ),
]
DocumentOption = Annotated[
    str | None, typer.Option("--document", metavar="URI", help="Answer from this document only.")
]
SystemPromptOption = Annotated[
    str | None, typer.Option("--system-prompt", metavar="TEXT", help="Instructions for the model.")
]
MaxNewTokensOption = Annotated[
    int | None, typer.Option("--max-new-tokens", min=1, metavar="N", help="Most tokens of the answer.")
]
TemperatureOption = Annotated[
    float | None, typer.Option("--temperature", metavar="T", help="0 takes the likeliest token each time.")
]
TopPOption = Annotated[
    float | None, typer.Option("--top-p", metavar="P", help="Sample from the likeliest tokens of this mass.")
]
SeedOption = Annotated[int | None, typer.Option("--seed", metavar="N", help="Makes sampling repeatable.")]
FilterOption = Annotated[
    list[str] | None,
    typer.Option(
        "--filter", metavar="K=V", help="Only documents whose metadata K is V (uri takes a glob). Repeatable."
    ),
]
DraftOption = Annotated[
    str | None,
    typer.Option(
        "--draft", metavar="NAME", help="What proposes tokens, verified together: none, auto, self, lookup or a model."
    ),
]
ExactOption = Annotated[
    bool | None,
    typer.Option(
        "--exact/--transfer", help="Drafts leave the answer what it is, or move the model towards the drafter."
    ),
]
GeneratorOption = Annotated[
    str | None, typer.Option("--generator", metavar="NAME", help="Language model: a name, folder or hub id.")
]


def answer_settings(
    k: int | None,
    strategy: Strategy | None,
    ratio: str | None,
    system_prompt: str | None,
    max_new_tokens: int | None,
    temperature: float | None,
    top_p: float | None,
    seed: int | None,
    generator: str | None,
) -> dict[str, Flag | None]:
    """Return the settings that these options stand for, None where one was not given."""
    return {
        "retrieval.k": flag(k, "-k"),
        "generation.strategy": flag(strategy, "--strategy"),
        "blend.ratio": flag(_ratio(ratio), "--ratio"),
        "generation.system_prompt": flag(system_prompt, "--system-prompt"),
        "generation.max_new_tokens": flag(max_new_tokens, "--max-new-tokens"),
        "generation.temperature": flag(temperature, "--temperature"),
        "generation.top_p": flag(top_p, "--top-p"),
        "generation.seed": flag(seed, "--seed"),
        "generation.model": flag(generator, "--generator"),
    }


def draft_settings(draft: str | None, exact: bool | None) -> dict[str, Flag | None]:
    """Return the settings that the options of drafting stand for, None where one was not given."""
    mode = None if exact is None else DraftMode.EXACT if exact else DraftMode.TRANSFER
    option = "--exact" if exact else "--transfer"
    if draft == "none" and mode is None:
        mode, option = DraftMode.EXACT, "--draft"  # what drafts may do where others are drafted plays no part
    return {"draft.drafter": flag(draft, "--draft"), "draft.mode": flag(mode, option)}


def check_draft_mode(exact: bool | None, settings: Settings) -> None:
    """Raise `UsageError` where an option says what drafts may do and nothing drafts."""
    if exact is not None and settings.config.draft.drafter == "none":
        raise UsageError("--exact and --transfer say what drafts may do: name a drafter with --draft")


def check_ratio(ratio: str | None, settings: Settings) -> None:
    """Raise `UsageError` where `--ratio` was given and the strategy recomputes no part of the chunks."""
    if ratio is not None:
        require_ratio_use(settings.config.generation.strategy)


def parse_filters(filters: Sequence[str] | None) -> dict[str, str] | None:
    """Return `K=V` options as a mapping; None where there are none.

    Raises:
        UsageError: an option has no `=` or no key, or a key comes twice.
    """
    parsed: dict[str, str] = {}
    for text in filters or ():
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise UsageError(f"--filter takes KEY=VALUE, got {text!r}")
        if key in parsed:
            raise UsageError(f"--filter {key} was given twice: {parsed[key]!r} and {value!r}; a document has one")
        parsed[key] = value
    return parsed or None


def _ratio(text: str | None) -> float | str | None:
    """Return `--ratio` as settings take it; its range is theirs to check."""
    if text is None or text == AUTO:
        return text
    try:
        return float(text)
    except ValueError as error:
        raise UsageError(f"--ratio takes a number from 0 to 1 or auto, got {text!r}") from error
