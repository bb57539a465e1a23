"""One-time conversion of a GGUF file to a folder of safetensors, config and tokenizer that every other part reads.

Weights are dequantised to float32, so nothing is lost. Tensor names follow the GGUF specification on the left and
the published Hugging Face checkpoints on the right. Weights are written in shards as they are read, so memory stays
bounded by a shard.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ragkit.errors import ModelError
from ragkit.models.gguf_tokenizer import tokenizer_json

_SHARD_BYTES = 1_000_000_000
_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
_TOP_LEVEL = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_IN_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_BLOCK = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")


def convert_gguf(source: Path, folder: Path, on_bytes: Callable[[int], None] = lambda count: None) -> None:
    """Write config, tokenizer and float32 safetensors of the GGUF file `source` into the existing `folder`.

    Args:
        source: the `.gguf` file.
        folder: where the model's files go; the caller renames it into place when this returns.
        on_bytes: called with the number of source bytes of each tensor done.

    Raises:
        ModelError: the file is damaged, or its architecture, tokenizer or a tensor is not known.
    """
    from gguf import GGUFReader

    try:
        reader = GGUFReader(source)
        fields = {name: field.contents() for name, field in reader.fields.items()}
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise ModelError(f"{source} cannot be read as GGUF: {error}") from error
    config = _config(fields, {tensor.name for tensor in reader.tensors}, source)
    tensors = ((tensor.name, tensor) for tensor in reader.tensors)
    _write_weights(_converted(tensors, config, source, on_bytes), folder)
    _write_json(folder / "tokenizer.json", tokenizer_json(fields))
    _write_json(folder / "tokenizer_config.json", _tokenizer_config(fields, config))
    eos = _stop_ids(fields)
    _write_json(folder / "generation_config.json", {"eos_token_id": eos})
    _write_json(folder / "config.json", {**config, "eos_token_id": eos[0] if eos else None})


def _config(fields: Mapping[str, Any], names: set[str], source: Path) -> dict[str, Any]:
    kind = fields.get("general.architecture")
    if kind not in _ARCHITECTURES:
        raise ModelError(f"{source} holds a {kind!r} model; ragkit reads GGUF of {', '.join(_ARCHITECTURES)}")

    def of(name: str) -> Any:
        try:
            return fields[f"{kind}.{name}"]
        except KeyError as error:
            raise ModelError(f"{source} does not state {kind}.{name}") from error

    heads = of("attention.head_count")
    return {
        "architectures": [_ARCHITECTURES[kind]],
        "model_type": kind,
        "hidden_act": "silu",
        "hidden_size": of("embedding_length"),
        "intermediate_size": of("feed_forward_length"),
        "num_hidden_layers": of("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": fields.get(f"{kind}.attention.head_count_kv", heads),
        "head_dim": fields.get(f"{kind}.attention.key_length", of("embedding_length") // heads),
        "max_position_embeddings": of("context_length"),
        "rms_norm_eps": float(np.float32(of("attention.layer_norm_rms_epsilon")).astype(str)),
        "rope_theta": fields.get(f"{kind}.rope.freq_base", 10000.0),
        "rope_scaling": _rope_scaling(fields, kind, source),
        "tie_word_embeddings": "output.weight" not in names,
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "bos_token_id": fields.get("tokenizer.ggml.bos_token_id"),
        "pad_token_id": fields.get("tokenizer.ggml.padding_token_id"),
        "torch_dtype": "float32",
    }


def _rope_scaling(fields: Mapping[str, Any], kind: str, source: Path) -> dict[str, Any] | None:
    scaling = fields.get(f"{kind}.rope.scaling.type", "none")
    if scaling == "none":
        return None
    if scaling == "linear":
        return {"rope_type": "linear", "factor": fields[f"{kind}.rope.scaling.factor"]}
    raise ModelError(f"{source} uses RoPE scaling {scaling!r}, which GGUF states in part only; use the safetensors")


def _converted(
    tensors: Iterator[tuple[str, Any]], config: Mapping[str, Any], source: Path, on_bytes: Callable[[int], None]
) -> Iterator[tuple[str, NDArray[np.float32]]]:
    from gguf.quants import dequantize

    for name, tensor in tensors:
        target = _target_name(name, source)
        try:
            weight = np.asarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        except (NotImplementedError, ValueError) as error:
            raise ModelError(f"{source}: tensor {name} of type {tensor.tensor_type.name}: {error}") from error
        # llama.cpp interleaves the two rotary halves of each head for this architecture.
        if config["model_type"] == "llama" and ".q_proj" in target:
            weight = _halves_apart(weight, config["num_attention_heads"])
        elif config["model_type"] == "llama" and ".k_proj" in target:
            weight = _halves_apart(weight, config["num_key_value_heads"])
        yield target, np.ascontiguousarray(weight)
        on_bytes(int(tensor.n_bytes))


def _target_name(name: str, source: Path) -> str:
    if name in _TOP_LEVEL:
        return _TOP_LEVEL[name]
    match = _BLOCK.fullmatch(name)
    if match is None or match[2] not in _IN_BLOCK:
        raise ModelError(f"{source} holds the tensor {name!r}, which no supported model has")
    return f"model.layers.{match[1]}.{_IN_BLOCK[match[2]]}.{match[3]}"


def _halves_apart(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    half = weight.shape[0] // heads // 2
    return weight.reshape(heads, half, 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def _write_weights(weights: Iterator[tuple[str, NDArray[np.float32]]], folder: Path) -> None:
    from safetensors.numpy import save_file

    places: dict[str, str] = {}
    shard: dict[str, NDArray[np.float32]] = {}
    total = 0
    number = 0

    def flush() -> None:
        nonlocal number
        if shard:
            number += 1
            file = f"model-{number:05d}.safetensors"
            save_file(shard, folder / file, metadata={"format": "pt"})
            places.update(dict.fromkeys(shard, file))
            shard.clear()

    for name, weight in weights:
        if sum(held.nbytes for held in shard.values()) + weight.nbytes > _SHARD_BYTES:
            flush()
        shard[name] = weight
        total += weight.nbytes
    flush()
    if number == 1:  # one shard goes by the name that needs no index
        (folder / "model-00001.safetensors").rename(folder / "model.safetensors")
    else:
        index = {"metadata": {"total_size": total}, "weight_map": places}
        _write_json(folder / "model.safetensors.index.json", index)


def _stop_ids(fields: Mapping[str, Any]) -> list[int]:
    # GGUF states one end token; the base model's end of text ends an answer too.
    tokens = fields["tokenizer.ggml.tokens"]
    ends = [fields.get("tokenizer.ggml.eos_token_id"), fields.get("tokenizer.ggml.eot_token_id")]
    ends += [tokens.index(token) for token in ("<|endoftext|>", "<|eot_id|>") if token in tokens]
    return list(dict.fromkeys(int(end) for end in ends if end is not None))


def _tokenizer_config(fields: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    tokens = fields["tokenizer.ggml.tokens"]
    names = {"bos_token": "bos_token_id", "eos_token": "eos_token_id", "pad_token": "padding_token_id"}
    named = {
        name: tokens[fields[f"tokenizer.ggml.{field}"]]
        for name, field in names.items()
        if f"tokenizer.ggml.{field}" in fields
    }
    return {
        **named,
        "chat_template": fields.get("tokenizer.chat_template"),
        "clean_up_tokenization_spaces": False,
        "model_max_length": config["max_position_embeddings"],
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")
