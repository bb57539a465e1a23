"""ragkit's engine as a LlamaIndex language model.

Text of prompts and messages is encoded as plain text inside the model's chat template, so that no document can write
control tokens. Only `complete(..., formatted=True)`, a prompt that already went through a template, has them parsed.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from llama_index.core.base.llms.types import ChatMessage, ChatResponse, CompletionResponse, LLMMetadata, MessageRole
from llama_index.core.bridge.pydantic import Field, PrivateAttr
from llama_index.core.llms import CustomLLM
from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback

from ragkit.async_stream import AsyncAnswerStream
from ragkit.config import Device, GenerationConfig, PipelineConfig
from ragkit.errors import UsageError
from ragkit.pipeline import Pipeline
from ragkit.types import Prompt

_DEFAULTS = GenerationConfig()
_ROLES = {MessageRole.SYSTEM: "system", MessageRole.DEVELOPER: "system", MessageRole.USER: "user"}
_ROLES |= {MessageRole.ASSISTANT: "assistant", MessageRole.MODEL: "assistant", MessageRole.CHATBOT: "assistant"}
_OPTIONS = {"max_tokens": "max_new_tokens"} | {
    name: name for name in ("max_new_tokens", "temperature", "top_p", "seed")
}


class RagkitLLM(CustomLLM):  # type: ignore[misc]
    """Generates with one of ragkit's models; `Settings.tokenizer = llm.encode` makes LlamaIndex count its tokens.

    Calls take `max_tokens`, `temperature`, `top_p` and `seed` for one request; other arguments are refused.

    Args:
        model_name: a bundled name, a folder or a Hugging Face id.
        max_new_tokens, temperature, top_p, seed: decoding; temperature 0 is greedy.
        device: auto, cpu or cuda.
        offline: fetch nothing.

    Raises:
        ConfigError: a setting is impossible; raised with the first request.
    """

    model_name: str = Field(default=_DEFAULTS.model, description="Name, folder or hub id of the generator.")
    max_new_tokens: int = Field(default=_DEFAULTS.max_new_tokens, description="Most tokens of an answer.")
    temperature: float = Field(default=_DEFAULTS.temperature, description="0 is greedy.")
    top_p: float = Field(default=_DEFAULTS.top_p, description="Share of the probability that is drawn from.")
    seed: int = Field(default=_DEFAULTS.seed, description="Seed of drawing.")
    device: str = Field(default=str(Device.AUTO), description="Where the model runs: auto, cpu or cuda.")
    offline: bool = Field(default=False, description="Fetch nothing.")

    _pipeline: Pipeline | None = PrivateAttr(default=None)
    _template: Any = PrivateAttr(default=None)

    @classmethod
    def class_name(cls) -> str:
        """Return the name that LlamaIndex serialises the model by."""
        return "RagkitLLM"

    @classmethod
    def from_pipeline(cls, pipeline: Pipeline, **fields: Any) -> RagkitLLM:
        """Return the generator of a pipeline, loaded once for both, with its settings where `fields` has none."""
        own = pipeline.config.generation
        settings = {name: getattr(own, name) for name in ("max_new_tokens", "temperature", "top_p", "seed")}
        model = cls(model_name=own.model, **{**settings, **fields})
        model._pipeline = pipeline
        return model

    @property
    def metadata(self) -> LLMMetadata:
        """The model's window and name."""
        return LLMMetadata(
            context_window=self._loaded().engine.max_context,
            num_output=self.max_new_tokens,
            is_chat_model=True,
            model_name=self.model_name,
        )

    def encode(self, text: str) -> list[int]:
        """Return the model's token ids of a text."""
        return self._loaded().tokenizer.encode(text)

    @llm_completion_callback()  # type: ignore[untyped-decorator]
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """Return the whole answer to `prompt`, as to one message of a user."""
        return _last(self._steps(self._prompt(prompt, formatted), kwargs))

    @llm_completion_callback()  # type: ignore[untyped-decorator]
    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> Iterator[CompletionResponse]:
        """Return the growing answer to `prompt`; dropping the iterator frees the request's memory."""
        return self._steps(self._prompt(prompt, formatted), kwargs)

    @llm_chat_callback()  # type: ignore[untyped-decorator]
    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """Return the whole answer to a conversation."""
        return _as_chat(_last(self._steps(self._chat_prompt(messages), kwargs)))

    @llm_chat_callback()  # type: ignore[untyped-decorator]
    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> Iterator[ChatResponse]:
        """Return the growing answer to a conversation."""
        return (_as_chat(step) for step in self._steps(self._chat_prompt(messages), kwargs))

    @llm_completion_callback()  # type: ignore[untyped-decorator]
    async def acomplete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """Return what `complete` returns; the event loop goes on meanwhile, and cancelling ends the generation."""
        return await _alast(self._asteps(lambda: self._prompt(prompt, formatted), kwargs))

    @llm_completion_callback()  # type: ignore[untyped-decorator]
    async def astream_complete(
        self, prompt: str, formatted: bool = False, **kwargs: Any
    ) -> AsyncIterator[CompletionResponse]:
        """Return what `stream_complete` returns, for asyncio."""
        return self._asteps(lambda: self._prompt(prompt, formatted), kwargs)

    @llm_chat_callback()  # type: ignore[untyped-decorator]
    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """Return what `chat` returns, for asyncio."""
        return _as_chat(await _alast(self._asteps(lambda: self._chat_prompt(messages), kwargs)))

    @llm_chat_callback()  # type: ignore[untyped-decorator]
    async def astream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> AsyncIterator[ChatResponse]:
        """Return what `stream_chat` returns, for asyncio."""
        steps = self._asteps(lambda: self._chat_prompt(messages), kwargs)
        return (_as_chat(step) async for step in steps)

    def _loaded(self) -> Pipeline:
        if self._pipeline is None:
            config = PipelineConfig(
                device=Device(self.device), offline=self.offline, generation=replace(_DEFAULTS, model=self.model_name)
            )
            self._pipeline = Pipeline(Path(), config)  # for its models alone: no store is opened
        return self._pipeline

    def _prompt(self, prompt: str, formatted: bool) -> Prompt:
        if not formatted:
            return self._chat_prompt([ChatMessage(role=MessageRole.USER, content=prompt)])
        from ragkit.generation.chat_prompt import formatted_prompt

        return formatted_prompt(self._loaded().engine.tokenizer, prompt)

    def _chat_prompt(self, messages: Sequence[ChatMessage]) -> Prompt:
        engine = self._loaded().engine
        from ragkit.generation.chat_prompt import chat_prompt
        from ragkit.models.chat_template import ChatTemplate

        if self._template is None:
            self._template = ChatTemplate(engine.folder)
        return chat_prompt(engine.tokenizer, self._template, [_message(message) for message in messages])

    def _steps(self, prompt: Prompt, options: dict[str, Any]) -> Iterator[CompletionResponse]:
        from ragkit.generation.sampling import SamplingConfig

        engine, own = self._loaded().engine, self._sampling(options)
        sampling = SamplingConfig(own.max_new_tokens, own.temperature, own.top_p, own.seed)
        text = ""
        for step in engine.generate(prompt, sampling):
            if step.piece:
                text += step.piece
                yield CompletionResponse(text=text, delta=step.piece)
        if not text:
            yield CompletionResponse(text="", delta="")

    def _sampling(self, options: dict[str, Any]) -> GenerationConfig:
        unknown = sorted(set(options) - set(_OPTIONS))
        if unknown:
            raise UsageError(f"generation takes {', '.join(_OPTIONS)}, got {', '.join(unknown)}")
        own = GenerationConfig(
            self.model_name, _DEFAULTS.dtype, self.max_new_tokens, self.temperature, self.top_p, self.seed
        )
        given = {_OPTIONS[name]: value for name, value in options.items() if value is not None}
        return replace(own, **given)

    async def _asteps(self, prompt: Any, options: dict[str, Any]) -> AsyncIterator[CompletionResponse]:
        text = ""
        stream = AsyncAnswerStream(lambda: cast(Any, _Pieces(self._steps(prompt(), options))))
        async with stream:
            async for piece in stream:
                text += piece
                yield CompletionResponse(text=text, delta=piece)
        if not text:
            yield CompletionResponse(text="", delta="")


class _Pieces:
    """A generation as `AsyncAnswerStream` reads one; the responses themselves are the answer."""

    answer = None

    def __init__(self, steps: Iterator[CompletionResponse]) -> None:
        self._steps = steps

    def __iter__(self) -> Iterator[str]:
        return (step.delta for step in self._steps if step.delta)

    def close(self) -> None:
        self._steps.close()  # type: ignore[attr-defined]


def _message(message: ChatMessage) -> tuple[str, str]:
    role = _ROLES.get(message.role)
    if role is None:
        raise UsageError(f"a message of role {message.role.value!r} has no place in the chat template of this model")
    others = [block.block_type for block in message.blocks if block.block_type != "text"]
    if others:
        raise UsageError(f"this model reads text alone, and a message holds a block of type {others[0]!r}")
    return role, message.content or ""


def _as_chat(response: CompletionResponse) -> ChatResponse:
    message = ChatMessage(role=MessageRole.ASSISTANT, content=response.text)
    return ChatResponse(message=message, delta=response.delta)


def _last(steps: Iterator[CompletionResponse]) -> CompletionResponse:
    text = ""
    for step in steps:
        text = step.text
    return CompletionResponse(text=text)


async def _alast(steps: AsyncIterator[CompletionResponse]) -> CompletionResponse:
    text = ""
    async for step in steps:
        text = step.text
    return CompletionResponse(text=text)
