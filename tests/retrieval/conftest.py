"""A tiny BERT folder and an empty store, shared by the tests of retrieval."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tiny_bert import make_bert_folder, modules_json, pooling_config, write_json

from ragkit.store.store import Store


@pytest.fixture(scope="session")
def bert_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentence-transformers folder with a random BERT of two layers, a window of 16 tokens, mean pooling."""
    folder = tmp_path_factory.mktemp("bert")
    make_bert_folder(folder)
    return folder


@pytest.fixture
def variant(bert_folder: Path, tmp_path: Path) -> Callable[..., Path]:
    """Copies of the folder with another pooling, without normalisation, or with other configs."""

    def make(name: str = "variant", pooling: str = "mean", normalise: bool = True, **configs: dict) -> Path:
        folder = tmp_path / name
        shutil.copytree(bert_folder, folder)
        write_json(folder / "1_Pooling" / "config.json", pooling_config(pooling))
        write_json(folder / "modules.json", modules_json(normalise))
        for stem, changes in configs.items():
            path = folder / f"{stem}.json"
            known = json.loads(path.read_text()) if path.exists() else {}
            write_json(path, known | changes)
        return folder

    return make


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """An empty store."""
    with Store.create(tmp_path / "store") as opened:
        yield opened
