import pytest

from ragkit.generation.int4_projection import GROUP, Int4Projection, int4_copy
from ragkit.generation.weight_bytes import int4_copy_bytes, weight_bytes

from .conftest import decoder_of, hf_model


@pytest.fixture(scope="module")
def model():
    return hf_model("llama", vocab_size=304, hidden_size=96, intermediate_size=96)


def _products(model):
    parameters = {name: one for name, one in model.named_parameters() if one.dim() == 2 and "embed" not in name}
    head = 304 * 96
    return sum(one.numel() for name, one in parameters.items() if "lm_head" not in name), head


def test_a_step_reads_all_products_and_of_the_embedding_one_row(model):
    layers, head = _products(model)
    assert weight_bytes(decoder_of(model)) == 4 * (layers + head)


def test_a_copy_of_4_bits_reads_its_codes_scales_and_zeros_and_the_vocabulary_as_it_is(model, tmp_path):
    model.save_pretrained(tmp_path)
    decoder = decoder_of(model)
    copy, (layers, head) = int4_copy(decoder, tmp_path), _products(model)
    assert all(isinstance(layer.qkv, Int4Projection) for layer in copy.weights.layers)
    assert weight_bytes(copy) == layers * (0.5 + 4 / GROUP) + 4 * head
    assert int4_copy_bytes(decoder) == weight_bytes(copy)
    rounded = int4_copy(decoder, tmp_path, rounds_vocabulary=True)
    assert weight_bytes(rounded) == (layers + head) * (0.5 + 4 / GROUP)
