"""Small chunk KVs with known numbers."""

import hashlib

import numpy as np
import torch

from ragkit.kvcache.chunk_kv import ChunkKV, ChunkRef
from ragkit.kvcache.codec import encode_chunk
from ragkit.kvcache.kv_key import KVKey
from ragkit.kvcache.layout import KVLayout, LayerSpec
from ragkit.models.model_config import ModelConfig, RopeConfig
from ragkit.store import IndexedDocument, SourceUpdate, Store
from ragkit.types import Chunk, Document, chunk_id_of

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


def store_of(folder, count=40):
    """A store with `count` chunks, and their ids."""
    text = "".join(f"chunk {number:03d}\n" for number in range(count))
    document = Document.from_text(text, "a.txt")
    spans = [(10 * number, 10 * number + 10) for number in range(count)]
    chunks = [
        Chunk(chunk_id_of(document.doc_id, *span), document.doc_id, index, text[slice(*span)], *span, 3)
        for index, span in enumerate(spans)
    ]
    store = Store.create(folder)
    with store.writer() as writer:
        writer.configure(embedder_id="e", dim=2, chunker="c", chunker_fingerprint="f", tokenizer_id="t")
        indexed = IndexedDocument(document, chunks, np.zeros((count, 2), np.float32))
        writer.commit([SourceUpdate("a.txt", "0" * 64, len(text), 1, documents=(indexed,))])
    return store, [chunk.chunk_id for chunk in chunks]


def encoded_of(codec, ref, recompute_ms=1.0):
    return encode_chunk(codec, chunk_of(ref, codec.layout), ref.chunk_id, recompute_ms)
