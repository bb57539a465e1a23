"""What a sentence-transformers folder says about its model, read without importing torch or sentence-transformers.

The folder holds modules.json (the chain of modules), config.json of the transformer, one config of the pooling and,
where the module is there, the normalisation. https://sbert.net/docs/sentence_transformer/usage/custom_models.html
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ragkit.errors import ModelError
from ragkit.models.fingerprint import file_sha256, weights_fingerprint

_QUERY_PROMPTS = ("query",)
_DOCUMENT_PROMPTS = ("document", "passage", "corpus")
_POOLING_KEYS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}


@dataclass(frozen=True)
class ModelFolder:
    """A sentence-transformers folder.

    Attributes:
        path: the folder.
        modules: short class names of the chain, `("Transformer", "Pooling", "Normalize")` for instance.
        config: the transformer's config.json.
        pooling: names of the pooling modes, in the order in which they are concatenated.
        max_tokens: the window in the model's own tokens, special tokens included; None where nothing bounds it.
        lowercases: the folder asks for lower-casing outside its tokenizer.
        prompts: texts put before queries and documents, by the names that sentence-transformers gives them.
        default_prompt: name of the prompt for texts of no stated kind.
    """

    path: Path
    modules: tuple[str, ...]
    config: Mapping[str, Any]
    pooling: tuple[str, ...]
    max_tokens: int | None
    lowercases: bool = False
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt: str | None = None

    @property
    def weights(self) -> list[Path]:
        """All safetensors files of the folder, sorted."""
        return sorted(self.path.rglob("*.safetensors"))

    @property
    def query_prompt(self) -> str:
        """The text put before a query."""
        return self._prompt(_QUERY_PROMPTS)

    @property
    def document_prompt(self) -> str:
        """The text put before a document."""
        return self._prompt(_DOCUMENT_PROMPTS)

    @property
    def averages_tokens(self) -> bool:
        """Whether a text's vector is the mean of its token states, but for its length."""
        only_pooling = self.modules in (("Transformer", "Pooling"), ("Transformer", "Pooling", "Normalize"))
        return only_pooling and self.pooling in (("mean",), ("mean_sqrt_len_tokens",))

    @cached_property
    def embedder_id(self) -> str:
        """`TYPE-DIM@DIGEST` over the content of weights, tokenizer, configs, pooling, window and prompts.

        The folder's name and place do not count: the same model has the same identity wherever it lies.
        """
        digest = hashlib.sha256(b"ragkit embedder 1")
        for folder in sorted({path.parent for path in self.weights}):
            _update(digest, folder.relative_to(self.path).as_posix(), weights_fingerprint(folder))
        for name in ("tokenizer.json", "vocab.txt", "sentencepiece.bpe.model"):
            if (self.path / name).is_file():
                _update(digest, name, file_sha256(self.path / name))
        ignored = {"_name_or_path", "transformers_version", "architectures", "torch_dtype", "dtype"}
        facts = {
            "config": {key: value for key, value in self.config.items() if key not in ignored},
            "modules": self.modules,
            "pooling": self.pooling,
            "max_tokens": self.max_tokens,
            "lowercases": self.lowercases,
            "prompts": [self.query_prompt, self.document_prompt],
        }
        _update(digest, "facts", json.dumps(facts, sort_keys=True))
        kind = f"{self.config.get('model_type', 'model')}-{self.config.get('hidden_size', 'any')}"
        return f"{kind}@{digest.hexdigest()[:32]}"

    def _prompt(self, names: tuple[str, ...]) -> str:
        for name in names:
            if name in self.prompts:
                return self.prompts[name]
        return self.prompts.get(self.default_prompt or "", "")


def read_model_folder(path: Path) -> ModelFolder:
    """Return what the folder `path` says about its model.

    Raises:
        ModelError: a file is missing or unreadable, or there are no safetensors weights.
    """
    modules = _read_json(path / "modules.json")
    if not isinstance(modules, list) or not all(isinstance(item, dict) and "type" in item for item in modules):
        raise ModelError(f"{path / 'modules.json'} does not list modules; is this a sentence-transformers folder?")
    classes = tuple(str(item["type"]).rsplit(".", 1)[-1] for item in modules)
    transformer = path / str(modules[0].get("path", "")) if modules else path
    config = _read_json(transformer / "config.json")
    sentence = _read_json(transformer / "sentence_bert_config.json", optional=True)
    outer = _read_json(path / "config_sentence_transformers.json", optional=True)
    pooling: tuple[str, ...] = ()
    for item, name in zip(modules, classes, strict=True):
        if name == "Pooling":
            pooling = _pooling_modes(_read_json(path / str(item.get("path", "")) / "config.json"))
    folder = ModelFolder(
        path=path,
        modules=classes,
        config=config,
        pooling=pooling,
        max_tokens=_window(config, sentence, _read_json(transformer / "tokenizer_config.json", optional=True)),
        lowercases=bool(sentence.get("do_lower_case", False)),
        prompts={str(key): str(value) for key, value in (outer.get("prompts") or {}).items()},
        default_prompt=outer.get("default_prompt_name"),
    )
    if not folder.weights:
        raise ModelError(f"{path} holds no *.safetensors weights; other formats are not loaded")
    return folder


def _pooling_modes(config: Mapping[str, Any]) -> tuple[str, ...]:
    named = config.get("pooling_mode")
    if isinstance(named, str):
        return (named,)
    if isinstance(named, list):
        return tuple(str(mode) for mode in named)
    return tuple(mode for key, mode in _POOLING_KEYS.items() if config.get(key)) or ("mean",)


def _window(*configs: Mapping[str, Any]) -> int | None:
    keys = ("max_seq_length", "max_position_embeddings", "model_max_length")
    model, sentence, tokenizer = configs
    if isinstance(sentence.get(keys[0]), int):
        return int(sentence[keys[0]])
    bounds = [config.get(key) for config, key in ((model, keys[1]), (tokenizer, keys[2]))]
    known = [int(bound) for bound in bounds if isinstance(bound, int) and 0 < bound < 10**6]
    return min(known) if known else None


def _read_json(path: Path, optional: bool = False) -> Any:
    if optional and not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read {path}: {error}; is this a sentence-transformers folder?") from error


def _update(digest: Any, name: str, value: str) -> None:
    digest.update(f"\0{name}\0{value}".encode())
