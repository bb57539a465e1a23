"""Values of settings: from TOML or text to the type that a dataclass field declares."""

from __future__ import annotations

import types
import typing
from collections.abc import Callable
from enum import Enum
from typing import Any, Literal

from ragkit.errors import ConfigError

_TRUE = frozenset({"1", "true", "yes", "on"})
_FALSE = frozenset({"0", "false", "no", "off"})


def convert(key: str, value: object, wanted: Any, origin: str) -> object:
    """Return `value` as the type `wanted`, or raise `ConfigError` naming key, value, origin and the type.

    A whole number does for a float and a list for a tuple; nothing else is bent.
    """
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(wanted, type) and issubclass(wanted, Enum):
        for member in wanted:
            if value in (member, member.value):
                return member
    elif typing.get_origin(wanted) is tuple:
        item_type = typing.get_args(wanted)[0]
        if isinstance(value, list | tuple):
            return tuple(convert(key, item, item_type, origin) for item in value)
    elif typing.get_origin(wanted) in (types.UnionType, typing.Union):
        if value is None and types.NoneType in typing.get_args(wanted):
            return None
        return _first_that_fits(key, value, wanted, origin, convert)
    elif typing.get_origin(wanted) is Literal:
        if value in typing.get_args(wanted):
            return value
    elif isinstance(value, wanted) and (wanted is bool or not isinstance(value, bool)):
        return value
    raise ConfigError(f"{key} must be {type_name(wanted)}, got {value!r} (set by {origin})")


def from_text(key: str, text: str, wanted: Any, origin: str) -> object:
    """Return the value that an environment variable holds. Lists are separated by commas, booleans are words.

    Raises:
        ConfigError: the text is no value of the type `wanted`.
    """
    if typing.get_origin(wanted) in (types.UnionType, typing.Union):
        if text == "" and types.NoneType in typing.get_args(wanted):
            return None
        return _first_that_fits(key, text, wanted, origin, from_text)
    if wanted is bool:
        word = text.strip().lower()
        return convert(key, True if word in _TRUE else False if word in _FALSE else text, bool, origin)
    if wanted in (int, float):
        try:
            return wanted(text)
        except ValueError as error:
            raise ConfigError(f"{key} must be {type_name(wanted)}, got {text!r} (set by {origin})") from error
    if typing.get_origin(wanted) is tuple:
        item_type = typing.get_args(wanted)[0]
        items = [item.strip() for item in text.split(",")]
        return tuple(from_text(key, item, item_type, origin) for item in items if item)
    return convert(key, text, wanted, origin)


def type_name(wanted: Any) -> str:
    """Return a type in words: `a whole number`, `one of auto, cpu, cuda`."""
    if isinstance(wanted, type) and issubclass(wanted, Enum):
        return "one of " + ", ".join(str(member.value) for member in wanted)
    if typing.get_origin(wanted) is tuple:
        return "a list, each " + type_name(typing.get_args(wanted)[0])
    if typing.get_origin(wanted) in (types.UnionType, typing.Union):
        return ", or ".join(type_name(item) for item in typing.get_args(wanted))
    if typing.get_origin(wanted) is Literal:
        return " or ".join(typing.get_args(wanted))
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", types.NoneType: "nothing"}
    return words[wanted]


def to_text(value: object) -> str:
    """Return a value as TOML writes it; nothing for None."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(to_text(item) for item in value) + "]"
    if isinstance(value, int | float):
        return str(value)
    if value is None:
        return ""
    escaped = str(value).replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


def _first_that_fits(
    key: str, value: Any, union: Any, origin: str, converted: Callable[[str, Any, Any, str], object]
) -> object:
    """Return `value` as the first type of a union that it can be, or raise `ConfigError` naming them all."""
    for wanted in typing.get_args(union):
        if wanted is not types.NoneType:
            try:
                return converted(key, value, wanted, origin)
            except ConfigError:
                continue
    raise ConfigError(f"{key} must be {type_name(union)}, got {value!r} (set by {origin})")
