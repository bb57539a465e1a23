"""From a model's name to the folder with its files: a bundled name, a local path, or a Hugging Face id."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from ragkit.errors import ModelError, OfflineError
from ragkit.models.cache import installing, models_home
from ragkit.models.catalogue import CATALOGUE, CatalogueEntry, ModelRole
from ragkit.models.fingerprint import file_sha256
from ragkit.models.pulling import pull
from ragkit.progress import Progress

_HUB_FILES = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.txt")


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """One bundled model as `ragkit models list` shows it.

    Attributes:
        name: the model's name.
        role: embedder or generator.
        path: its folder, or None where it was not pulled yet.
        bytes: size on disk where pulled, of the download where not.
        licence: SPDX identifier.
        source: where it comes from.
    """

    name: str
    role: ModelRole
    path: Path | None
    bytes: int
    licence: str
    source: str


def list_models() -> list[ModelInfo]:
    """Return every bundled model, pulled or not."""
    return [_info(entry) for entry in CATALOGUE.values()]


def resolve(name: str, *, offline: bool = False, progress: Progress | None = None) -> Path:
    """Return the folder with config, tokenizer and safetensors of the model `name`.

    Args:
        name: a bundled name (pulled on first use), a local folder, a local `.gguf` file (converted on first use),
            or a Hugging Face id `owner/name`.
        offline: fetch nothing.
        progress: hears about downloads.

    Raises:
        OfflineError: something would have to be fetched; names each missing file.
        ModelError: there is no such model, or it has no usable files.
    """
    if name in CATALOGUE:
        return _bundled(CATALOGUE[name], offline, progress)
    path = Path(name).expanduser()
    if path.is_dir():
        return _checked_folder(path)
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise ModelError(f"{path} is a file, but only a .gguf file can be a model; give the model's folder")
        return _converted(path)
    owner, slash, repository = name.partition("/")
    if slash and owner and repository and "/" not in repository and not name.startswith((".", "~")):
        return _from_hub(name, offline)
    raise ModelError(
        f"there is no model {name!r}: give a bundled name ({', '.join(CATALOGUE)}), an existing folder or .gguf "
        "file, or a Hugging Face id owner/name"
    )


def local_folder(name: str) -> Path | None:
    """Return the folder of the model `name` if it is here, without fetching or converting anything; else None."""
    if Path(name).suffix.lower() == ".gguf":
        return None  # the folder's name is the hash of a file of gigabytes
    try:
        return resolve(name, offline=True)
    except (ModelError, OfflineError):
        return None


def _info(entry: CatalogueEntry) -> ModelInfo:
    folder = models_home() / entry.name
    pulled = folder.is_dir()
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) if pulled else entry.download_bytes
    return ModelInfo(entry.name, entry.role, folder if pulled else None, size, entry.licence, entry.source)


def _bundled(entry: CatalogueEntry, offline: bool, progress: Progress | None) -> Path:
    folder = models_home() / entry.name
    if folder.is_dir():
        return folder
    if offline:
        raise OfflineError(f"{entry.name} was not pulled yet and fetching is off; {entry.how_to_get}")
    return pull(entry.name, progress)


def _checked_folder(folder: Path) -> Path:
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} holds no config.json, so it is no model folder")
    if not any(folder.glob("*.safetensors")):
        raise ModelError(f"{folder} holds no safetensors weights; other formats are not read")
    return folder


def _converted(gguf: Path) -> Path:
    from ragkit.models.gguf_convert import convert_gguf

    target = models_home() / f"gguf-{file_sha256(gguf)[:32]}"
    with installing(target) as folder:
        if folder is not None:
            convert_gguf(gguf, folder)
    return target


def _from_hub(name: str, offline: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    local = offline or os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}
    try:
        folder = Path(snapshot_download(name, allow_patterns=list(_HUB_FILES), local_files_only=local))
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise OfflineError(
            f"{name} is not complete in the Hugging Face cache and "
            f"{'fetching is off' if local else 'the hub cannot be reached'}; missing: config.json, tokenizer.json, "
            f"*.safetensors of {name}; run `hf download {name}` while connected"
        ) from error
    except HFValidationError as error:
        raise ModelError(f"{name!r} is no Hugging Face id: {error}") from error
    except (HfHubHTTPError, OSError) as error:
        first = str(error).strip().splitlines()
        raise ModelError(
            f"{name} could not be fetched from the Hugging Face hub: {first[0] if first else error}"
        ) from error
    return _checked_folder(folder)
