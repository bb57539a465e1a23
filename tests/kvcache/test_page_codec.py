import pytest
import torch

from ragkit.config import PAGE_CODECS
from ragkit.errors import KVCacheError
from ragkit.kvcache.layout import KVLayout, LayerSpec
from ragkit.kvcache.page_codec import PageCodec
from ragkit.kvcache.quantized_pool import QuantizedPool
from ragkit.models.model_config import RopeConfig

CPU = torch.device("cpu")
TOLERANCE = {"fp32": 0.0, "bf16": 2e-2, "fp16": 2e-3, "int8": 2e-2, "int4": 0.3}


def _layout(head_dim=16, dtype=torch.float32):
    return KVLayout((LayerSpec(2, head_dim, RopeConfig()), LayerSpec(3, head_dim, RopeConfig())), dtype)


def _rows(tokens, heads=2, head_dim=16, seed=0):
    return torch.randn(2, tokens, heads, head_dim, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("head_dim", [16, 80])
@pytest.mark.parametrize("name", PAGE_CODECS)
def test_pages_come_back_within_the_error_of_the_codec(name, head_dim):
    codec, (keys, values) = PageCodec(name, _layout(head_dim), 64), _rows(192, head_dim=head_dim)
    data = codec.encode(0, keys, values)
    assert data.shape == (3, codec.page_bytes(0))
    for mine, other in zip(codec.decode(0, data), (keys, values), strict=True):
        torch.testing.assert_close(mine.flatten(0, 1), other, rtol=0, atol=TOLERANCE[name])


@pytest.mark.parametrize("name", PAGE_CODECS)
def test_a_page_alone_has_the_bytes_and_numbers_that_it_has_among_others(name):
    codec, (keys, values) = PageCodec(name, _layout(), 32), _rows(96)
    data = codec.encode(0, keys, values)
    assert torch.equal(data[1:2], codec.encode(0, keys[32:64], values[32:64]))
    whole, alone = codec.decode(0, data), codec.decode(0, data[[2, 1]])
    assert torch.equal(whole[0][[2, 1]], alone[0])
    assert torch.equal(whole[1][[2, 1]], alone[1])
    assert torch.equal(codec.decode_keys(0, data), whole[0])


@pytest.mark.parametrize("name", PAGE_CODECS)
def test_a_page_that_is_not_full_ends_with_its_last_row(name):
    codec, (keys, values) = PageCodec(name, _layout(), 32), _rows(45)
    decoded = codec.decode(0, codec.encode(0, keys, values))
    for mine, other in zip(decoded, (keys, values), strict=True):
        torch.testing.assert_close(mine.flatten(0, 1)[:45], other, rtol=0, atol=TOLERANCE[name])
        torch.testing.assert_close(mine[1, 13:], mine[1, 12:13].expand(19, -1, -1))


@pytest.mark.parametrize(("name", "bits", "group"), [("int8", 8, 64), ("int4", 4, 32)])
def test_the_codes_of_a_page_are_those_of_a_block_of_the_quantised_pool(name, bits, group):
    layout, (keys, values) = _layout(), _rows(128)
    codec, pool = PageCodec(name, layout, 64), QuantizedPool(layout, 4, CPU, bits=bits, group=group)
    blocks = torch.tensor([3, 1])
    pool.place(0, blocks, *codec.codes(0, codec.encode(0, keys, values)))
    expected, decoded = pool.rows(0, pool.rows_of([3, 1])), codec.decode(0, codec.encode(0, keys, values))
    for mine, other in zip(decoded, expected, strict=True):
        assert torch.equal(mine.flatten(0, 1), other)


def test_what_rows_received_is_stored_beside_them():
    codec, (keys, values) = PageCodec("int8", _layout(), 16, with_received=True), _rows(40)
    received = torch.rand(40, 2, generator=torch.Generator().manual_seed(3))
    back = codec.received(0, codec.encode(0, keys, values, received))
    torch.testing.assert_close(back.flatten(0, 1)[:40], received, rtol=0, atol=1e-3)
    assert (
        PageCodec("int8", _layout(), 16).received(0, PageCodec("int8", _layout(), 16).encode(0, keys, values)) is None
    )
    assert codec.codec_id == "page16-int8-received"


def test_bytes_of_a_page_are_counted_over_the_layers():
    codec = PageCodec("int4", _layout(64), 64)
    # keys: 64 tokens of 2 heads of 64 numbers of half a byte, with 2 scales and zeros of 2 bytes for each channel
    keys, values = 64 * 2 * 64 // 2 + 2 * 2 * 2 * 2 * 64, 64 * 2 * 64 // 2 + 2 * 2 * 64 * 2 * 2
    assert codec.page_bytes(0) == keys + values
    assert codec.bytes_per_page == codec.page_bytes(0) + codec.page_bytes(1)
    assert codec.page_bytes(1) * 2 == codec.page_bytes(0) * 3


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_a_number_that_is_not_finite_is_refused(name):
    keys, values = _rows(16)
    keys[3, 1, 2] = float("nan")
    with pytest.raises(KVCacheError, match="not finite"):
        PageCodec(name, _layout(), 16).encode(0, keys, values)


def test_codecs_and_sizes_that_pages_cannot_have_are_refused():
    with pytest.raises(KVCacheError, match="cannot be stored by the codec 'entropy1'"):
        PageCodec("entropy1", _layout(), 64)
    with pytest.raises(KVCacheError, match="power of two of tokens, at least 8, got 48"):
        PageCodec("int8", _layout(), 48)


def test_bytes_of_another_size_are_refused():
    codec = PageCodec("bf16", _layout(), 16)
    with pytest.raises(KVCacheError, match="a page of layer 1 has 2048 bytes where 3072 were written"):
        codec.decode(1, codec.encode(0, *_rows(16))[:, :2048])
