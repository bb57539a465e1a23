import pytest
import torch

from ragkit.errors import KVCacheError
from ragkit.generation.chunk_prefill import ChunkPrefill, expected_cost
from ragkit.generation.rotary_cache import RotaryCache
from ragkit.kvcache.kv_key import ContextKind, KVRecipe
from ragkit.types import Segment

from .conftest import decoder_of, hf_model


def test_computing_is_expected_to_take_the_products_of_all_layers_and_the_encoding_of_all_numbers():
    decoder = decoder_of(hf_model("llama"))
    sizes = decoder.config
    weights = sum(
        parameter.numel()
        for name, parameter in hf_model("llama").named_parameters()
        if name.startswith("model.layers") and parameter.dim() == 2
    )
    numbers = sizes.num_layers * 2 * sizes.num_kv_heads * sizes.head_dim
    plain, encoded = expected_cost(decoder), expected_cost(decoder, 1e-7)
    assert plain.per_unit == pytest.approx(2 * weights / 1e11)
    assert encoded.per_unit - plain.per_unit == pytest.approx(numbers * 1e-7)
    assert encoded.per_piece == plain.per_piece > 0


def test_kv_behind_neighbours_is_not_silently_that_behind_the_prefix():
    decoder = decoder_of(hf_model("llama"))
    recipe = KVRecipe("0" * 64, decoder.config, "tokens", decoder.dtype, "fp32")
    with pytest.raises(KVCacheError, match="needs to be told which"):
        ChunkPrefill(decoder, RotaryCache(decoder), recipe, (1, 2), ContextKind.NEIGHBOURS)


PREFIX = (1, 2)
CHUNK, BEFORE = Segment((7, 8, 9), "chunk"), Segment((4, 5), "before")


def chunks_behind(neighbours):
    decoder = decoder_of(hf_model("llama"))
    recipe = KVRecipe("0" * 64, decoder.config, "tokens", decoder.dtype, "fp32")
    return ChunkPrefill(decoder, RotaryCache(decoder), recipe, PREFIX, ContextKind.NEIGHBOURS, lambda _: neighbours)


def test_kv_is_computed_behind_the_neighbours_that_its_key_was_made_of():
    neighbours = [BEFORE]
    chunks = chunks_behind(neighbours)
    ref = chunks.ref(CHUNK)
    (before,) = chunks.compute([ref])
    neighbours[:] = [Segment((6,), "edited")]
    (after,) = chunks.compute([ref])
    assert torch.equal(before.layers[-1][1], after.layers[-1][1])
    (other,) = chunks.compute([chunks.ref(CHUNK)])
    assert chunks.ref(CHUNK).key != ref.key
    assert not torch.allclose(before.layers[-1][1], other.layers[-1][1])


def test_only_a_chunk_without_neighbours_is_exact_behind_the_prefix():
    alone, behind = (chunks_behind(neighbours) for neighbours in ([], [BEFORE]))
    assert alone.is_exact_behind(PREFIX, alone.ref(CHUNK))
    assert not alone.is_exact_behind((1, 2, 3), alone.ref(CHUNK))
    assert not behind.is_exact_behind(PREFIX, behind.ref(CHUNK))


def test_neighbours_that_make_the_same_tokens_make_the_same_key():
    split = [Segment((4,), "a"), Segment((5,), "b")]
    assert chunks_behind(split).ref(CHUNK).key == chunks_behind([BEFORE]).ref(CHUNK).key
