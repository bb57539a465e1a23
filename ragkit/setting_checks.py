"""What settings are checked for: whole numbers, multiples, shares. Each names the setting and what was got."""

from __future__ import annotations

import math
from typing import Final

from ragkit.errors import ConfigError

#: The ratio of a blend that each request finds for itself.
AUTO: Final = "auto"


def at_least(name: str, value: int, low: int) -> None:
    """Raise `ConfigError` unless `value` is a whole number from `low` up."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ConfigError(f"{name} must be a whole number >= {low}, got {value!r}")


def random_seed(name: str, value: int) -> None:
    """Raise `ConfigError` unless `value` is a whole number of 64 bits, with a sign or without."""
    if isinstance(value, bool) or not isinstance(value, int) or not -(2**63) <= value < 2**64:
        raise ConfigError(f"{name} must be a whole number from -2^63 up to 2^64 - 1, got {value!r}")


def text(name: str, value: str) -> None:
    """Raise `ConfigError` unless `value` is a text: command lines and JSON can hold half a surrogate pair."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"{name} has {value[error.start]!r} at character {error.start}, which is half a surrogate pair and no "
            "text: write it in UTF-8"
        ) from None


def multiple(name: str, value: int, of: str, unit: int, *, least: int = 0) -> None:
    """Raise `ConfigError` unless `value` is a multiple of `unit`, which the setting `of` has, from `least` up."""
    at_least(name, value, least)
    if value % unit:
        raise ConfigError(f"{name} must be a multiple of {of} = {unit}, got {value}")


def share(name: str, value: float) -> None:
    """Raise `ConfigError` unless `value` lies in [0, 1]."""
    if not (math.isfinite(value) and 0 <= value <= 1):
        raise ConfigError(f"{name} must lie in [0, 1], got {value!r}")


def share_or_auto(name: str, value: float | str) -> None:
    """Raise `ConfigError` unless `value` lies in [0, 1] or is `AUTO`."""
    if value != AUTO and (isinstance(value, str) or not (math.isfinite(value) and 0 <= value <= 1)):
        raise ConfigError(f"{name} must lie in [0, 1] or be {AUTO}, got {value!r}")
