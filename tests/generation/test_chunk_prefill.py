import pytest

from ragkit.errors import KVCacheError
from ragkit.generation.chunk_prefill import ChunkPrefill, expected_cost
from ragkit.generation.rotary_cache import RotaryCache
from ragkit.kvcache.kv_key import ContextKind, KVRecipe

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
