"""What a job is: its rows, settings, model and store. Going on with another one is refused with the difference."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from enum import Enum
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ragkit.config import DraftMode
from ragkit.errors import JobError

if TYPE_CHECKING:
    from ragkit.parts import Parts

FORMAT = 1
_SHOWN = 5
_SECTIONS = ("generation", "blend", "retrieval", "answers", "pages")
_KV_SETTINGS = ("codec", "context", "neighbour_tokens")


def manifest_of(parts: Parts, *, rows: int, sha256: str, output: str) -> dict[str, Any]:
    """Return the manifest of a job over `parts`; `sha256` is that of its rows. No model is loaded that is here."""
    config = asdict(parts.config)
    settings = {section: config[section] for section in _SECTIONS}
    settings["kv"] = {name: config["kv"][name] for name in _KV_SETTINGS}
    settings["batch"] = {"chunk_order": config["batch"]["chunk_order"]}
    draft = parts.config.draft
    if draft.drafter != "none" and draft.mode is DraftMode.TRANSFER:  # other drafts leave answers what they are
        settings["draft"] = config["draft"]
    manifest = {
        "format": FORMAT,
        "rows": {"count": rows, "sha256": sha256},
        "settings": _flat(settings),
        "model": {"generator": _weights(parts), "embedder": parts.store.meta.embedder_id},
        "store": {"folder": str(parts.folder.absolute()), "generation": parts.store.generation},
        "output": output,
    }
    return dict(json.loads(json.dumps(manifest)))  # as it will be read


def read_manifest(content: bytes, folder: str) -> dict[str, Any]:
    """Return the manifest in `content`.

    Raises:
        JobError: it cannot be read, or was written by another version of ragkit.
    """
    try:
        manifest = json.loads(content)
        known = manifest["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise JobError(
            f"the job of {folder} is damaged: its manifest cannot be read; --overwrite begins anew"
        ) from error
    if known != FORMAT:
        raise JobError(f"the job of {folder} was begun by another version of ragkit; --overwrite begins anew")
    return dict(manifest)


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return what differs between two jobs, apart from their rows: a line each."""
    keys = ("settings", "model")
    old, new = (_flat({key: manifest[key] for key in keys}) for manifest in (before, now))
    old["store"], new["store"] = before["store"]["folder"], now["store"]["folder"]
    old["output"], new["output"] = before["output"], now["output"]
    return [
        f"{name.removeprefix('settings.')} was {old.get(name)!r} and is {new.get(name)!r}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]


def row_differences(before: Path, now: Path) -> list[str]:
    """Return which rows differ, the first ones by their ids."""
    changed: list[str] = []
    count = [0, 0]
    differing = 0
    with before.open("rb") as old_file, now.open("rb") as new_file:
        for old, new in zip_longest(old_file, new_file):
            count[0] += old is not None
            count[1] += new is not None
            if old is not None and new is not None and old != new:
                differing += 1
                if len(changed) < _SHOWN:
                    changed.append(_row_difference(json.loads(old), json.loads(new)))
    if differing > len(changed):
        changed.append(f"{differing - len(changed):,} more rows")
    if count[0] != count[1]:
        changed.insert(0, f"the input had {count[0]:,} rows and has {count[1]:,}")
    return changed


def _row_difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    names = [name for name in ("id", "question", "changes", "error") if old.get(name) != new.get(name)]
    shown = ", ".join("options" if name == "changes" else name for name in names)
    return f"row {old['number'] + 1} (id {old['id']!r}) has another {shown}"


def _weights(parts: Parts) -> str:
    from ragkit.models import local_folder, weights_fingerprint

    folder = None if parts.is_loaded("engine") else local_folder(parts.config.generation.model)
    return weights_fingerprint(folder or parts.engine.folder)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value.value if isinstance(value, Enum) else value
    return flat
