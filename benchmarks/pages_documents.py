"""What `pages_speed.py` measures over: a random model, pages of random codes, and attention to all of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from prefill_decode import SHAPE_8B
from torch import Tensor

from ragkit.config import PagesConfig
from ragkit.generation.decoder import Decoder
from ragkit.generation.paged_prefill import PagedPrefill
from ragkit.generation.weights import assemble_weights
from ragkit.kernels.gather_pages import PageLists
from ragkit.kernels.selected_pages_attention import selected_pages_attention
from ragkit.kvcache.kv_pages import KVPages
from ragkit.kvcache.resident_pages import ResidentPages
from ragkit.models.model_config import model_config


@dataclass(frozen=True)
class Sizes:
    """What is measured: the model's shape, the documents, and the longest one's codec."""

    shape: Mapping[str, float]
    lengths: tuple[int, ...]
    compared: int
    dtype: torch.dtype
    config: PagesConfig


LARGE = Sizes(
    SHAPE_8B, (8192, 131072, 524288, 1048576), 524288, torch.bfloat16, PagesConfig(codec="int4", gpu_mb=1 << 20)
)
TINY = Sizes(
    {**SHAPE_8B, "vocab_size": 500, "hidden_size": 128, "intermediate_size": 200, "num_hidden_layers": 2,
     "num_attention_heads": 4, "num_key_value_heads": 2},
    (2048, 4096), 4096, torch.float32,
    PagesConfig(codec="int4", budget_tokens=512, local_tokens=256, window_tokens=256, gpu_mb=1 << 20),
)  # fmt: skip


class FullAttention:
    """Attention of one token over every page of a document, by the kernel that attends to listed pages."""

    def __init__(self, pages: KVPages, scale: float, prefill: PagedPrefill) -> None:
        device, size = pages.device, pages.page_size
        listed = torch.arange(pages.num_pages, dtype=torch.int32, device=device).unsqueeze(0)
        self._lists = PageLists(listed, listed * size)
        self._last = torch.full((1,), pages.num_tokens - 1, dtype=torch.int32, device=device)
        self._rotary = prefill._rotary._build(pages.num_tokens, 0)
        self._pages = pages
        self._scale = scale

    def __call__(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Return the attention output."""
        key_blocks, value_blocks = self._pages.resident.blocks(layer)
        return selected_pages_attention(
            queries, key_blocks, value_blocks, self._lists, self._last, self._rotary.cos, self._rotary.sin,
            scale=self._scale,
        )  # fmt: skip


def random_decoder(sizes: Sizes, device: torch.device) -> Decoder:
    """Return a model with random weights."""
    config = model_config({"model_type": "llama", "rms_norm_eps": 1e-5, "architectures": ["LlamaForCausalLM"],
                           "tie_word_embeddings": False, "hidden_act": "silu", **sizes.shape})  # fmt: skip
    torch.manual_seed(0)
    shapes = weight_shapes(sizes.shape)

    def tensor(name: str) -> Tensor:
        kind = name.split(".")[-2]
        shape = shapes[kind]
        if len(shape) == 1:
            return torch.ones(shape, dtype=sizes.dtype, device=device)
        return torch.randn(shape, dtype=sizes.dtype, device=device) * 0.02

    return Decoder(config, assemble_weights(tensor, config))


def weight_shapes(shape: Mapping[str, float]) -> dict[str, tuple[int, ...]]:
    """Return the shape of every kind of weight."""
    hidden, inner, vocab = int(shape["hidden_size"]), int(shape["intermediate_size"]), int(shape["vocab_size"])
    kv = hidden * int(shape["num_key_value_heads"]) // int(shape["num_attention_heads"])
    return {
        "q_proj": (hidden, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden), "o_proj": (hidden, hidden),
        "gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner),
        "embed_tokens": (vocab, hidden), "lm_head": (vocab, hidden), "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,), "norm": (hidden,),
    }  # fmt: skip


def fill(resident: ResidentPages, decoder: Decoder) -> None:
    """Put random codes of numbers around zero into every page."""
    for layer in range(decoder.config.num_layers):
        for blocks in resident.blocks(layer):
            if isinstance(blocks, Tensor):
                blocks.normal_()
                continue
            blocks.codes.random_(0, 256)
            most = 2**blocks.bits - 1
            blocks.scales.fill_(4.0 / most)
            blocks.zeros.fill_(-2.0)
