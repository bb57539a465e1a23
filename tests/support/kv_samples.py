"""Small chunk KVs with known numbers."""

import hashlib

import torch

from ragkit.kvcache.chunk_kv import ChunkKV, ChunkRef
from ragkit.kvcache.kv_key import KVKey
from ragkit.kvcache.layout import KVLayout, LayerSpec
from ragkit.models.model_config import ModelConfig, RopeConfig

LAYOUT = KVLayout((LayerSpec(3, 8, RopeConfig()), LayerSpec(3, 8, RopeConfig())), torch.float32)

CONFIG = ModelConfig(
    family="llama",
    vocab_size=100,
    hidden_size=24,
    intermediate_size=48,
    num_layers=2,
    num_q_heads=3,
    num_kv_heads=3,
    head_dim=8,
    rms_norm_eps=1e-5,
    rope=RopeConfig(),
    qkv_bias=False,
    output_bias=False,
    qk_norm=False,
    tied_embeddings=True,
    max_context=128,
)


def key_of(name):
    return KVKey(hashlib.sha256(str(name).encode()).hexdigest())


def ref_of(name, tokens=20, chunk_id=None):
    """A chunk's reference; equal names have equal tokens."""
    seed = int.from_bytes(hashlib.sha256(str(name).encode()).digest()[:4], "little")
    token_ids = torch.randint(0, 100, (tokens,), generator=torch.Generator().manual_seed(seed)).tolist()
    return ChunkRef(key_of(name), tuple(token_ids), chunk_id or f"chunk-{name}")


def layers_of(token_ids, layout=LAYOUT, *, outliers=True):
    """The "model": KV that only depends on the tokens, correlated along the tokens, with outlier channels."""
    seed = int.from_bytes(hashlib.sha256(repr(tuple(token_ids)).encode()).digest()[:4], "little")
    generator = torch.Generator().manual_seed(seed)
    made = []
    for spec in layout.layers:
        shape = (len(token_ids), spec.num_kv_heads, spec.head_dim)
        keys = torch.randn(shape, generator=generator).cumsum(0) * 0.3 + torch.randn(shape[1:], generator=generator)
        values = torch.randn(shape, generator=generator)
        if outliers and len(token_ids):
            keys[..., 0] = keys[..., 0] * 5 + 40
            values[0] *= 20
        made.append((keys.to(layout.dtype), values.to(layout.dtype)))
    return tuple(made)


def chunk_of(ref, layout=LAYOUT):
    return ChunkKV(ref.key, ref.token_ids, layers_of(ref.token_ids, layout))
