"""A model's chat template, rendered in Jinja's sandbox with a fixed date so that equal prompts give equal text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ragkit.errors import ModelError

if TYPE_CHECKING:
    from jinja2 import Template

FIXED_DATE = "26 Jul 2024"  # what Llama 3 templates assume where none is given; one date for ever keeps KV reusable


class ChatTemplate:
    """The chat template of a model folder (`chat_template.jinja`, or the key in `tokenizer_config.json`)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._config = _tokenizer_config(folder / "tokenizer_config.json")
        self.source = _source(folder, self._config)

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Return the text of `messages` up to where the assistant's answer begins.

        Raises:
            ModelError: the template fails, or refuses the messages.
        """
        from jinja2 import TemplateError

        try:
            text: str = self._template.render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=True,
                enable_thinking=False,  # Qwen3: answers without a reasoning block
                date_string=FIXED_DATE,
                tools=None,
                documents=None,
                **self._special_tokens,
            )
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise ModelError(f"the chat template of {self.folder} failed: {error}") from error
        return text

    @cached_property
    def _template(self) -> Template:
        from jinja2 import TemplateSyntaxError
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda form: FIXED_DATE
        try:
            return environment.from_string(self.source)
        except TemplateSyntaxError as error:
            raise ModelError(f"the chat template of {self.folder} is no Jinja template: {error}") from error

    @property
    def _special_tokens(self) -> dict[str, str]:
        tokens = {name: self._config.get(name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
        # Older files hold a token as an object with its text under "content".
        texts = {name: token.get("content") if isinstance(token, dict) else token for name, token in tokens.items()}
        return {name: text for name, text in texts.items() if isinstance(text, str)}


def _raise(message: str) -> None:
    from jinja2 import TemplateError

    raise TemplateError(message)


def _tokenizer_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise ModelError(f"{path} holds no object")
    return config


def _source(folder: Path, config: Mapping[str, Any]) -> str:
    file = folder / "chat_template.jinja"
    template = file.read_text(encoding="utf-8") if file.is_file() else config.get("chat_template")
    if isinstance(template, list):  # several named templates
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    if not isinstance(template, str):
        raise ModelError(
            f"{folder} has no chat template, so it is no instruction-tuned model; take one that is, "
            "or put its template into chat_template.jinja"
        )
    return template
