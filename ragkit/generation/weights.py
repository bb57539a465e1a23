"""A decoder's weights, fused for fewer and larger matrix products, straight from safetensors."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ragkit.errors import ModelError
from ragkit.generation.projection import Linear, Projection
from ragkit.models.model_config import ModelConfig

MakeLinear = Callable[[Tensor, Tensor | None], Linear]  # of weights (out, in) and a bias (out,)


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer. `qkv` gives queries, keys and values behind each other, `gate_up` the gate and what it gates."""

    input_norm: Tensor
    qkv: Linear
    query_norm: Tensor | None
    key_norm: Tensor | None
    output: Linear
    feed_forward_norm: Tensor
    gate_up: Linear
    down: Linear


@dataclass(frozen=True, slots=True)
class DecoderWeights:
    """All weights of a decoder; with tied embeddings `head` multiplies by `embedding`."""

    embedding: Tensor
    layers: tuple[LayerWeights, ...]
    final_norm: Tensor
    head: Linear


def load_weights(
    folder: Path, config: ModelConfig, device: torch.device, dtype: torch.dtype, project: MakeLinear = Projection
) -> DecoderWeights:
    """Return the weights in the safetensors files of `folder`, as `dtype` on `device`; `project` keeps the products'.

    Raises:
        ModelError: a file or a tensor is missing, damaged or of another shape than the config says.
    """
    from safetensors import SafetensorError, safe_open

    files = _files(folder)
    with ExitStack() as stack:
        try:
            opened = [stack.enter_context(safe_open(file, framework="pt")) for file in files]
            holders = {name: file for file in opened for name in file.keys()}  # noqa: SIM118 (not a mapping)
        except (OSError, SafetensorError) as error:
            raise ModelError(f"the weights in {folder} cannot be read: {error}") from error

        def tensor(name: str) -> Tensor:
            try:
                loaded: Tensor = holders[name].get_tensor(name)
            except KeyError as error:
                raise ModelError(f"the weights in {folder} lack {name}") from error
            except SafetensorError as error:
                raise ModelError(f"{name} in {folder} cannot be read: {error}") from error
            return loaded.to(device=device, dtype=dtype)

        return assemble_weights(tensor, config, project)


def assemble_weights(
    tensor: Callable[[str], Tensor], config: ModelConfig, project: MakeLinear = Projection
) -> DecoderWeights:
    """Return fused weights, each taken by `tensor` under its Hugging Face name; `project` keeps those of products.

    Raises:
        ModelError: a tensor has another shape than `config` says.
    """
    hidden, head_dim = config.hidden_size, config.head_dim
    q_size, kv_size = config.num_q_heads * head_dim, config.num_kv_heads * head_dim

    def shaped(name: str, *shape: int) -> Tensor:
        found = tensor(name)
        if tuple(found.shape) != shape:
            raise ModelError(f"{name} is {tuple(found.shape)}, the config says {shape}")
        return found

    def layer(index: int) -> LayerWeights:
        at = f"model.layers.{index}"
        attention, feed_forward = f"{at}.self_attn", f"{at}.mlp"
        sizes = {"q": q_size, "k": kv_size, "v": kv_size}
        qkv = [shaped(f"{attention}.{part}_proj.weight", size, hidden) for part, size in sizes.items()]
        biases = [shaped(f"{attention}.{part}_proj.bias", size) for part, size in sizes.items() if config.qkv_bias]
        inner = config.intermediate_size
        gate_up = [shaped(f"{feed_forward}.{part}_proj.weight", inner, hidden) for part in ("gate", "up")]
        return LayerWeights(
            input_norm=shaped(f"{at}.input_layernorm.weight", hidden),
            qkv=project(torch.cat(qkv), torch.cat(biases) if biases else None),
            query_norm=shaped(f"{attention}.q_norm.weight", head_dim) if config.qk_norm else None,
            key_norm=shaped(f"{attention}.k_norm.weight", head_dim) if config.qk_norm else None,
            output=project(
                shaped(f"{attention}.o_proj.weight", hidden, q_size),
                shaped(f"{attention}.o_proj.bias", hidden) if config.output_bias else None,
            ),
            feed_forward_norm=shaped(f"{at}.post_attention_layernorm.weight", hidden),
            gate_up=project(torch.cat(gate_up), None),
            down=project(shaped(f"{feed_forward}.down_proj.weight", hidden, inner), None),
        )

    embedding = shaped("model.embed_tokens.weight", config.vocab_size, hidden)
    return DecoderWeights(
        embedding=embedding,
        layers=tuple(layer(index) for index in range(config.num_layers)),
        final_norm=shaped("model.norm.weight", hidden),
        head=project(
            embedding if config.tied_embeddings else shaped("lm_head.weight", config.vocab_size, hidden), None
        ),
    )


def _files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise ModelError(f"{folder} holds no safetensors weights")
        return files
    try:
        named = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ModelError(f"{index} cannot be read: {error!r}") from error
    missing = [name for name in named if Path(name).name != name or not (folder / name).is_file()]
    if missing:
        raise ModelError(f"{folder} lacks the weight files {', '.join(missing)}")
    return [folder / name for name in named]
