"""Lines of an OpenAI batch file (`/v1/chat/completions`): the question in them, and the line that answers one.

The shapes are those of OpenAI's Batch API reference: `{"custom_id", "method", "url", "body"}` in,
`{"id", "custom_id", "response": {"status_code", "request_id", "body"}, "error"}` out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ragkit.answers.json_form import answer_json
from ragkit.errors import UsageError

if TYPE_CHECKING:
    from ragkit.jobs.rows import RowOutcome

URL = "/v1/chat/completions"
_SAME_NAME = ("temperature", "top_p", "seed", "k", "strategy", "ratio", "filter", "document")
# Asked for as they are, these change nothing; asked for otherwise, they cannot be had.
_ONLY: Mapping[str, tuple[Any, ...]] = {
    "n": (1,),
    "stream": (False,),
    "stop": ([],),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}
_IGNORED = frozenset(
    {"model", "messages", "max_tokens", "max_completion_tokens", "user", "metadata", "store", "service_tier",
     "parallel_tool_calls", "stream_options", "safety_identifier", "prompt_cache_key"}
)  # fmt: skip


def is_openai(values: Mapping[str, Any]) -> bool:
    """Return whether a record is a line of an OpenAI batch file."""
    return "body" in values and ("custom_id" in values or "url" in values)


def openai_question(values: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """Return the row's values under ragkit's names, and the model that was asked for.

    Raises:
        UsageError: it asks for what a batch of questions does not do.
    """
    body = values["body"]
    if not isinstance(body, dict):
        raise UsageError(f"body must be an object, got {body!r}")
    if values.get("url", URL) != URL or values.get("method", "POST") != "POST":
        raise UsageError(f"a line must POST to {URL}, got {values.get('method')} {values.get('url')}")
    for name, allowed in _ONLY.items():
        if body.get(name) is not None and body[name] not in allowed:
            raise UsageError(f"{name} cannot be {body[name]!r} in a batch of questions; leave it out")
    question, system = _messages(body.get("messages"))
    row: dict[str, Any] = {name: body[name] for name in _SAME_NAME if name in body}
    row |= {name: value for name, value in body.items() if name not in _IGNORED and name not in _ONLY}
    row["question"] = question
    if system:
        row["system_prompt"] = system
    for name in ("max_completion_tokens", "max_tokens"):
        if body.get(name) is not None:
            row["max_new_tokens"] = body[name]
            break
    model = body.get("model")
    return row, model if isinstance(model, str) else ""


def openai_answer(outcome: RowOutcome, created: int) -> dict[str, Any]:
    """Return the line that answers one; what OpenAI's shape has no place for stands under `ragkit` in the body."""
    row_id = str(outcome.row.row_id)
    name = hashlib.sha256(f"{outcome.row.number}:{row_id}".encode("utf-8", "surrogatepass")).hexdigest()[:24]
    line: dict[str, Any] = {"id": f"batch_req_{name}", "custom_id": row_id, "response": None, "error": None}
    if outcome.answer is None:
        assert outcome.error is not None, "an outcome has an answer or an error"
        return line | {"error": {"code": outcome.error.code, "message": outcome.error.message}}
    answer = outcome.answer
    message = {"role": "assistant", "content": answer.text, "refusal": None}
    body = {
        "id": f"chatcmpl-{name}",
        "object": "chat.completion",
        "created": created,
        "model": answer.model,
        "choices": [
            {"index": 0, "message": message, "logprobs": None, "finish_reason": "length" if outcome.cut else "stop"}
        ],
        "usage": {
            "prompt_tokens": answer.tokens.prompt,
            "completion_tokens": answer.tokens.generated,
            "total_tokens": answer.tokens.prompt + answer.tokens.generated,
        },
        "ragkit": {key: value for key, value in answer_json(answer).items() if key not in ("answer", "model")},
    }
    return line | {"response": {"status_code": 200, "request_id": f"req_{name}", "body": body}}


def _messages(messages: Any) -> tuple[str, str]:
    """Return the question and the system prompt of a list of messages."""
    if not isinstance(messages, list) or not all(isinstance(one, dict) for one in messages):
        raise UsageError("messages must be a list of objects with a role and a content")
    system = [_content(one) for one in messages if one.get("role") in ("system", "developer")]
    asked = [one for one in messages if one.get("role") not in ("system", "developer")]
    if len(asked) != 1 or asked[0].get("role") != "user":
        raise UsageError(
            f"messages must hold one question, a single message of role user, got "
            f"{', '.join(str(one.get('role')) for one in asked) or 'none'}"
        )
    return _content(asked[0]), "\n\n".join(system)


def _content(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        return "".join(str(part.get("text", "")) for part in content)
    raise UsageError("the content of a message must be text")
