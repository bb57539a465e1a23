"""A sentence-transformers folder with a random BERT of two layers, made in a millisecond."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

HIDDEN, INNER, LAYERS, HEADS, WINDOW = 32, 48, 2, 4, 16
WORDS = ["the", "cat", "sat", "mat", "a", "dog", "ran", "far", "##s", "##ing", "éclair", "猫", "."]


def make_bert_folder(folder: Path) -> None:
    """Write the folder: a window of 16 tokens, mean pooling, normalised."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS, *letters, *(f"##{letter}" for letter in letters)]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    write_tokenizer(folder, vocabulary)
    write_weights(folder, len(vocabulary))
    config = {
        "model_type": "bert", "architectures": ["BertModel"], "hidden_size": HIDDEN, "intermediate_size": INNER,
        "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "hidden_act": "gelu", "layer_norm_eps": 1e-12,
        "vocab_size": len(vocabulary), "max_position_embeddings": 2 * WINDOW, "type_vocab_size": 2, "pad_token_id": 0,
    }  # fmt: skip
    write_json(folder / "config.json", config)
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": WINDOW, "do_lower_case": False})
    write_json(folder / "1_Pooling" / "config.json", pooling_config("mean"))
    write_json(folder / "modules.json", modules_json(normalise=True))


def pooling_config(mode: str) -> dict:
    legacy = {"mean": "mean_tokens", "cls": "cls_token", "mean_sqrt_len_tokens": "mean_sqrt_len_tokens"}
    flags = {f"pooling_mode_{name}": mode == key for key, name in legacy.items()}
    return {"word_embedding_dimension": HIDDEN, "pooling_mode_max_tokens": mode == "max"} | flags


def modules_json(normalise: bool) -> list[dict]:
    names = [("", "Transformer"), ("1_Pooling", "Pooling")] + ([("2_Normalize", "Normalize")] if normalise else [])
    return [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{name}"}
        for index, (path, name) in enumerate(names)
    ]


def write_json(path: Path, value: object) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value))


def write_tokenizer(folder: Path, vocabulary: dict[str, int]) -> None:
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True, strip_accents=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])],
    )
    tokenizer.enable_truncation(8)  # real folders carry such left-overs, which must not count
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(folder / "tokenizer.json"))
    specials = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": WINDOW}
    write_json(folder / "tokenizer_config.json", settings | specials)


def write_weights(folder: Path, vocabulary: int) -> None:
    generator = np.random.default_rng(0)

    def matrix(*shape: int) -> np.ndarray:
        return (0.3 * generator.standard_normal(shape)).astype(np.float32)

    tensors = {
        "embeddings.word_embeddings.weight": matrix(vocabulary, HIDDEN),
        "embeddings.position_embeddings.weight": matrix(2 * WINDOW, HIDDEN),
        "embeddings.token_type_embeddings.weight": matrix(2, HIDDEN),
        "embeddings.LayerNorm.weight": 1 + matrix(HIDDEN),
        "embeddings.LayerNorm.bias": matrix(HIDDEN),
    }
    shapes = {
        "attention.self.query": (HIDDEN, HIDDEN), "attention.self.key": (HIDDEN, HIDDEN),
        "attention.self.value": (HIDDEN, HIDDEN), "attention.output.dense": (HIDDEN, HIDDEN),
        "intermediate.dense": (INNER, HIDDEN), "output.dense": (HIDDEN, INNER),
    }  # fmt: skip
    for layer in range(LAYERS):
        for name, shape in shapes.items():
            tensors[f"encoder.layer.{layer}.{name}.weight"] = matrix(*shape)
            tensors[f"encoder.layer.{layer}.{name}.bias"] = matrix(shape[0])
        for name in ("attention.output.LayerNorm", "output.LayerNorm"):
            tensors[f"encoder.layer.{layer}.{name}.weight"] = 1 + matrix(HIDDEN)
            tensors[f"encoder.layer.{layer}.{name}.bias"] = matrix(HIDDEN)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
