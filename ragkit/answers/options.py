"""What holds for one question: the configuration, and what its asker changes of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from ragkit import setting_checks
from ragkit.config import (
    AnswerConfig,
    BlendConfig,
    DraftConfig,
    DraftMode,
    GenerationConfig,
    RetrievalConfig,
    Strategy,
)
from ragkit.errors import ConfigError, UsageError
from ragkit.progress import Progress, Silent
from ragkit.readers.file_systems import is_url, stored_name
from ragkit.types import MetadataValue

if TYPE_CHECKING:
    from ragkit.parts import Parts


class QuestionOptions(TypedDict, total=False):
    """What an asker may say beside a question, alone or in a batch. What is left out is as configured.

    Attributes:
        k: how many chunks are put before the model.
        strategy: how the prompt is prefilled: full, blend, pages (of `document`, read whole), or auto, which takes
            pages for a document that is longer than the model's window, and blends where that pays.
        ratio: part of the chunks' tokens that blending computes anew, or auto: as many as the question asks for.
        filter: metadata that a chunk's document must have; `uri` takes a glob.
        document: only this source or document, by URI.
        system_prompt: replaces the default instructions.
        max_new_tokens, temperature, top_p, seed: decoding; temperature 0 is greedy.
        draft: what proposes tokens that are verified several at a time: none, auto, self, lookup or a model.
        draft_mode: exact leaves the answer what it is; transfer moves the model towards its drafter.
    """

    k: int | None
    strategy: Strategy | str | None
    ratio: float | Literal["auto"] | None
    filter: Mapping[str, MetadataValue] | None
    document: str | None
    system_prompt: str | None
    max_new_tokens: int | None
    temperature: float | None
    top_p: float | None
    seed: int | None
    draft: str | None
    draft_mode: DraftMode | str | None


@dataclass(frozen=True, slots=True)
class QuestionChanges:
    """What an asker has changed of the configuration: `QuestionOptions`, with None for what was left out."""

    k: int | None = None
    strategy: Strategy | str | None = None
    ratio: float | Literal["auto"] | None = None
    filter: Mapping[str, MetadataValue] | None = None
    document: str | None = None
    system_prompt: str | None = None
    max_new_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    draft: str | None = None
    draft_mode: DraftMode | str | None = None

    @classmethod
    def of(cls, options: QuestionOptions) -> QuestionChanges:
        """Return what keyword arguments of the SDK say."""
        return cls(**options)


def require_options(call: str, options: Mapping[str, object]) -> None:
    """Raise `TypeError` where `call` was given a keyword that is no option, as Python does for a named one."""
    for name in options:
        if name not in QuestionOptions.__annotations__:
            names = ", ".join(QuestionOptions.__annotations__)
            raise TypeError(f"{call}() got an unexpected keyword argument {name!r}; its options are {names}")


@dataclass(frozen=True, slots=True)
class QueryOptions:
    """The configuration of one question, after the caller's changes.

    `filters` restrict the documents, `document` is the URI of the only one that is meant, `progress` hears of what
    takes long before the answer, and `is_ratio_given` tells a ratio that the asker gave from a configured one.
    """

    generation: GenerationConfig
    blend: BlendConfig
    retrieval: RetrievalConfig
    answers: AnswerConfig
    draft: DraftConfig = field(default_factory=DraftConfig)
    filters: Mapping[str, MetadataValue] = field(default_factory=dict)
    document: str | None = None
    progress: Progress = field(default_factory=Silent)
    is_ratio_given: bool = False

    @property
    def retrieval_filters(self) -> dict[str, MetadataValue]:
        """What restricts retrieval: the filters and the document."""
        return {**self.filters, **({} if self.document is None else {"uri": self.document})}

    def ratio_warnings(self, strategy: Strategy) -> tuple[str, ...]:
        """Return a warning where the asker gave a ratio and the chosen `strategy` recomputes no part."""
        if not self.is_ratio_given or strategy is Strategy.BLEND:
            return ()
        return (f"the ratio {self.blend.ratio} had no part: the strategy was {strategy}",)

    def chosen_strategy(self, chunk_tokens: int) -> Strategy:
        """Return the strategy for a prompt with so many tokens of chunks.

        What is stored plays no part: a question gets the same answer from a cold cache as from a warm one.
        """
        asked = self.generation.strategy
        if chunk_tokens == 0 or (asked is Strategy.AUTO and chunk_tokens < self.blend.min_tokens):
            return Strategy.FULL
        return Strategy.BLEND if asked is Strategy.AUTO else asked


def query_options(parts: Parts, changes: QuestionChanges, progress: Progress | None = None) -> QueryOptions:
    """Return the options of one question over `parts`.

    Raises:
        UsageError: an impossible value, a ratio for a strategy that has none, or a document that the store does not
            hold.
    """
    config = parts.config
    require_text("document", changes.document or "")
    for name, value in (changes.filter or {}).items():
        require_text(f"the filter {name!a}", f"{name}{value}")
    wanted: dict[str, Any] = {
        "strategy": None if changes.strategy is None else _strategy(changes.strategy),
        "system_prompt": changes.system_prompt,
        "max_new_tokens": changes.max_new_tokens,
        "temperature": changes.temperature,
        "top_p": changes.top_p,
        "seed": changes.seed,
    }
    generation = replace(config.generation, **{name: value for name, value in wanted.items() if value is not None})
    if changes.ratio is not None:
        require_ratio_use(generation.strategy)
    return QueryOptions(
        generation,
        config.blend if changes.ratio is None else replace(config.blend, ratio=changes.ratio),
        config.retrieval if changes.k is None else replace(config.retrieval, k=changes.k),
        config.answers,
        _draft(config.draft, changes),
        dict(changes.filter or {}),
        None if changes.document is None else document_uri(parts, changes.document),
        progress or Silent(),
        changes.ratio is not None,
    )


def require_text(name: str, text: str) -> None:
    """Raise `UsageError` where `text` is none, as `setting_checks.text` does of a setting."""
    try:
        setting_checks.text(name, text)
    except ConfigError as error:
        raise UsageError(str(error)) from None


def require_ratio_use(strategy: Strategy) -> None:
    """Raise `UsageError` where a ratio is given for a strategy that recomputes no part of the chunks."""
    if strategy not in (Strategy.BLEND, Strategy.AUTO):
        raise UsageError(
            f"the ratio says how much the strategy blend computes anew, and the strategy is {strategy}: leave the "
            "ratio out, or take the strategy blend or auto"
        )


def document_uri(parts: Parts, document: str) -> str:
    """Return the stored URI that a user means: as given, as a path relative to the working folder, or as a signed URL.

    Raises:
        UsageError: the store holds no such document.
    """
    if document.startswith("-") or not parts.has_store():
        return document
    if parts.store.rows_where({"uri": document}).size:
        return document
    stored = stored_name(document)
    if parts.store.rows_where({"uri": stored}).size:
        return stored
    shown = stored if is_url(document) else document
    raise UsageError(f"the store holds no document {shown!r}; `ragkit ls` lists what it holds")


def _draft(config: DraftConfig, changes: QuestionChanges) -> DraftConfig:
    wanted: dict[str, Any] = {} if changes.draft is None else {"drafter": changes.draft}
    if changes.draft_mode is not None:
        try:
            wanted["mode"] = DraftMode(changes.draft_mode)
        except ValueError:
            raise UsageError(
                f"there is no draft mode {changes.draft_mode!r}; take one of {', '.join(DraftMode)}"
            ) from None
    if wanted.get("drafter", config.drafter) == "none":
        if changes.draft_mode is not None:
            raise UsageError(f"the draft mode {changes.draft_mode} says what drafts may do: name a drafter with draft")
        wanted["mode"] = DraftMode.EXACT  # what drafts may do where others are drafted plays no part
    return replace(config, **wanted) if wanted else config


def _strategy(name: Strategy | str) -> Strategy:
    try:
        return Strategy(name)
    except ValueError:
        raise UsageError(f"there is no strategy {name!r}; take one of {', '.join(Strategy)}") from None
