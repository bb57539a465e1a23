import pytest
import torch

from ragkit.generation import int4_projection
from ragkit.generation.attention import StandaloneAttention
from ragkit.generation.int4_projection import GROUP, Int4Projection, int4_copy, int4_linear_of
from ragkit.generation.projection import Projection
from ragkit.generation.rotary_cache import RotaryCache
from ragkit.kernels.int4_linear import quantize_int4

from .conftest import decoder_of, hf_model


@pytest.fixture
def weight():
    return torch.randn(48, 128, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("features", [48, 41])  # torch's product on a CPU does not take 41
@pytest.mark.parametrize("tokens", [1, 16, 17])
def test_gives_the_product_with_the_rounded_weights_and_the_bias(tokens, features, weight):
    weight, bias, rows = weight[:features], torch.arange(features).float(), torch.randn(tokens, 128)
    expected = rows @ quantize_int4(weight, GROUP).numbers().T + bias
    torch.testing.assert_close(Int4Projection(weight, bias)(rows), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("tokens", "products"), [(16, 1), (17, 2), (64, 4), (65, 0)])
def test_the_codes_are_read_for_a_few_rows_at_a_time_and_made_numbers_for_many(tokens, products, weight, monkeypatch):
    made, product = [], int4_projection.int4_linear
    monkeypatch.setattr(int4_projection, "int4_linear", lambda *args: made.append(1) or product(*args))
    projection = Int4Projection(weight[:41])
    rows = torch.randn(tokens, 128)
    expected = rows @ quantize_int4(weight[:41], GROUP).numbers().T
    torch.testing.assert_close(projection(rows), expected, rtol=1e-4, atol=1e-4)
    assert len(made) == products


def test_takes_an_eighth_of_fp32_weights_and_their_scales(weight):
    assert Int4Projection(weight).nbytes == 48 * 128 // 2 + 48 * 128 // GROUP * 4


def test_columns_that_no_group_divides_keep_their_type(weight):
    assert isinstance(int4_linear_of(weight[:, :100].contiguous(), None), Projection)
    assert isinstance(int4_linear_of(weight, None), Int4Projection)


@torch.inference_mode()
def test_a_copy_of_a_model_gives_nearly_its_distribution(tmp_path):
    model = hf_model("llama", vocab_size=304, hidden_size=96, intermediate_size=96, initializer_range=0.05)
    model.save_pretrained(tmp_path)
    decoder = decoder_of(model)
    copy = int4_copy(decoder, tmp_path)
    assert copy.weights.embedding is decoder.weights.embedding
    assert copy.weights.head is decoder.weights.head
    assert isinstance(int4_copy(decoder, tmp_path, rounds_vocabulary=True).weights.head, Int4Projection)
    tokens = torch.randint(3, 300, (40,), generator=torch.Generator().manual_seed(2))
    logits = []
    for each in (decoder, copy):
        attend = StandaloneAttention(RotaryCache(each).table(64, 40), each.scale)
        logits.append(each.logits(each.run(tokens, attend)).log_softmax(-1))
    divergence = float((logits[0].exp() * (logits[0] - logits[1])).sum(-1).mean())
    assert 0 < divergence < 0.01
