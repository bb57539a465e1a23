"""Settings from files, environment and flags: the `PipelineConfig`, the store, and where every value came from.

Rising precedence: defaults, `ragkit.toml` in the user's configuration folder, `./ragkit.toml` (or the file named by
`--config`), environment variables `RAGKIT_*`, flags. A key is written `section.name`; the variable of
`generation.model` is `RAGKIT_GENERATION_MODEL`. Unknown keys and variables are errors that name the nearest valid one.
"""

from __future__ import annotations

import difflib
import os
import tomllib
import typing
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ragkit.config import PipelineConfig
from ragkit.errors import ConfigError
from ragkit.setting_values import convert, from_text, type_name

CONFIG_NAME = "ragkit.toml"
STORE_KEY = "store"
DEFAULT_STORE = Path(".ragkit")

#: Variables that are not settings: data of benchmarks, debugging, fault injection, folders, the build.
RESERVED_VARIABLES = frozenset(
    {
        "RAGKIT_DATA",
        "RAGKIT_DEBUG",
        "RAGKIT_CRASH_AT",
        "RAGKIT_ENOSPC_AT",
        "RAGKIT_HOME",
        "RAGKIT_SQL_URL",
        "RAGKIT_VENV",
    }
)
_PREFIX = "RAGKIT_"
_OFFLINE_VARIABLES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")


@dataclass(frozen=True, slots=True)
class Flag:
    """A value from the command line and the option that carried it."""

    value: object
    option: str


@dataclass(frozen=True, slots=True)
class Setting:
    """One value in force. `origin` reads as the end of a sentence: `default`, `./ragkit.toml line 3`, `--store`."""

    key: str
    value: object
    origin: str


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything that was set: the store's folder, the configuration, and each value with its origin.

    `warnings` name variables that start with `RAGKIT_` and mean nothing to ragkit.
    """

    store: Path
    config: PipelineConfig
    values: tuple[Setting, ...]
    warnings: tuple[str, ...] = ()


def load_settings(
    flags: Mapping[str, Flag] | None = None,
    *,
    config_file: Path | None = None,
    environ: Mapping[str, str] | None = None,
    folder: Path | None = None,
    user_folder: Path | None = None,
) -> Settings:
    """Return the settings in force.

    Args:
        flags: values of command-line options by key.
        config_file: read instead of `./ragkit.toml`; must exist.
        environ: the environment; the process's own by default.
        folder: where `./ragkit.toml` is looked for; the working folder by default.
        user_folder: where the user's own `ragkit.toml` is looked for.

    Raises:
        ConfigError: an unknown key or variable, a value of the wrong type or range, or a file that cannot be read.
    """
    environ = os.environ if environ is None else environ
    found: dict[str, Setting] = {}
    for path in _config_paths(config_file, folder, user_folder or user_config_folder(environ)):
        found.update(_from_file(path))
    from_environment, warnings = _from_environment(environ)
    found.update(from_environment)
    for key, flag in (flags or {}).items():
        found[key] = Setting(key, convert(key, flag.value, _types()[key], flag.option), flag.option)
    store = found.get(STORE_KEY, Setting(STORE_KEY, DEFAULT_STORE, "default"))
    config = _build(found)
    values = [store, *(found.get(key, Setting(key, _lookup(config, key), "default")) for key in _config_keys())]
    return Settings(Path(str(store.value)).expanduser(), config, tuple(values), warnings)


def setting_keys() -> tuple[str, ...]:
    """Return every valid key, in the order of the dataclasses."""
    return (STORE_KEY, *_config_keys())


def variable_of(key: str) -> str:
    """Return the environment variable that sets `key`."""
    return _PREFIX + key.replace(".", "_").upper()


def type_of(key: str) -> str:
    """Return the type of `key` in words, enum members spelled out."""
    return type_name(_types()[key])


def user_config_folder(environ: Mapping[str, str]) -> Path:
    """Return the user's configuration folder: `RAGKIT_HOME` where set, else the platform's."""
    if home := environ.get("RAGKIT_HOME"):
        return Path(home)
    from platformdirs import user_config_path

    return user_config_path("ragkit", appauthor=False)


def forbid_network(environ: MutableMapping[str, str]) -> None:
    """Tell the Hugging Face libraries to stay offline. They read this when imported, so call it before."""
    for name in _OFFLINE_VARIABLES:
        environ[name] = "1"


def _config_paths(config_file: Path | None, folder: Path | None, user_folder: Path) -> list[Path]:
    paths = [user_folder / CONFIG_NAME]
    if config_file is None:
        paths.append((folder or Path()) / CONFIG_NAME)
    elif config_file.is_file():
        paths.append(config_file)
    else:
        raise ConfigError(f"--config needs an existing TOML file, got {str(config_file)!r}")
    return [path for path in paths if path.is_file()]


def _from_file(path: Path) -> dict[str, Setting]:
    try:
        text = path.read_text(encoding="utf-8")
        tables = tomllib.loads(text)
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as TOML: {error}") from error
    lines = _key_lines(text)
    found: dict[str, Setting] = {}
    for key, value in _flatten(tables):
        origin = f"{path} line {lines[key]}" if key in lines else str(path)
        if key not in _types():
            raise ConfigError(f"unknown setting {key!r} in {origin}; {_nearest(key, setting_keys())}")
        found[key] = Setting(key, convert(key, value, _types()[key], origin), origin)
    return found


def _flatten(tables: Mapping[str, Any]) -> list[tuple[str, object]]:
    """Return (key, value) pairs; of a table that is no section, the first key stands for the whole."""
    pairs: list[tuple[str, object]] = []
    for name, value in tables.items():
        if isinstance(value, dict) and name in _sections():
            pairs += [(f"{name}.{key}", item) for key, item in value.items()]
        elif isinstance(value, dict):
            pairs.append((".".join([name, *list(value)[:1]]), None))
        else:
            pairs.append((name, value))
    return pairs


def _key_lines(text: str) -> dict[str, int]:
    """Return the 1-based line of every `section.key` that is written plainly, one a line."""
    lines: dict[str, int] = {}
    section = ""
    for number, line in enumerate(text.splitlines(), start=1):
        line = line.strip()
        if line.startswith("[") and "]" in line and "=" not in line.split("]")[0]:
            section = line.strip("[").split("]")[0].strip() + "."
        elif "=" in line and not line.startswith("#"):
            lines.setdefault(section + line.split("=")[0].strip().strip("\"'"), number)
    return lines


def _from_environment(environ: Mapping[str, str]) -> tuple[dict[str, Setting], tuple[str, ...]]:
    by_variable = {variable_of(key): key for key in setting_keys()}
    section_prefixes = tuple(variable_of(section) + "_" for section in _sections())
    found: dict[str, Setting] = {}
    warnings: list[str] = []
    for name in sorted(environ):
        if not name.startswith(_PREFIX) or name in RESERVED_VARIABLES:
            continue
        if name in by_variable:
            key = by_variable[name]
            value = from_text(key, environ[name], _types()[key], name)
            found[key] = Setting(key, value, name)
        elif name.startswith(section_prefixes) or difflib.get_close_matches(name, by_variable, 1, 0.85):
            raise ConfigError(f"unknown setting in the environment: {name}; {_nearest(name, tuple(by_variable))}")
        else:
            warnings.append(f"{name} is set but means nothing to ragkit")
    return found, tuple(warnings)


def _nearest(name: str, candidates: tuple[str, ...]) -> str:
    close = difflib.get_close_matches(name, candidates, 1, 0.5)
    return f"did you mean {close[0]}?" if close else "`ragkit config show` lists them all"


@cache
def _sections() -> dict[str, type]:
    hints = typing.get_type_hints(PipelineConfig)
    return {item.name: hints[item.name] for item in fields(PipelineConfig) if is_dataclass(hints[item.name])}


@cache
def _types() -> dict[str, Any]:
    """Return the annotation of every key."""
    types: dict[str, Any] = {STORE_KEY: str}
    for name, hint in typing.get_type_hints(PipelineConfig).items():
        if name in _sections():
            types |= {f"{name}.{key}": value for key, value in typing.get_type_hints(hint).items()}
        else:
            types[name] = hint
    return types


def _config_keys() -> tuple[str, ...]:
    return tuple(key for key in _types() if key != STORE_KEY)


def _lookup(config: PipelineConfig, key: str) -> object:
    value: object = config
    for name in key.split("."):
        value = getattr(value, name)
    return value


def _build(found: Mapping[str, Setting]) -> PipelineConfig:
    top: dict[str, Any] = {}
    try:
        for section, section_class in _sections().items():
            given = {key.partition(".")[2]: item.value for key, item in found.items() if key.startswith(section + ".")}
            top[section] = section_class(**given)
        top |= {key: item.value for key, item in found.items() if "." not in key and key != STORE_KEY}
        return PipelineConfig(**top)
    except ConfigError as error:
        named = [item.origin for key, item in found.items() if key in str(error)]
        if not named:
            raise
        raise ConfigError(f"{error} (set by {' and '.join(named)})") from error
