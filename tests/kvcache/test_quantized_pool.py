import math

import pytest
import torch

from ragkit.errors import CacheCapacityError, KernelInputError, KVCacheError
from ragkit.kernels.backend import Backend
from ragkit.kvcache.codec_quantized import QuantizedCodec
from ragkit.kvcache.layout import KVLayout, LayerSpec
from ragkit.kvcache.quantized_pool import QuantizedPool
from ragkit.kvcache.request_kv import RequestKV
from ragkit.models.model_config import RopeConfig

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LAYOUT = KVLayout((LayerSpec(3, 16, RopeConfig()), LayerSpec(2, 96, RopeConfig())), torch.float32)
KINDS = ((8, 64), (4, 32))  # bits and group of the int8 and int4 codecs


def _pool(bits, group, blocks=6):
    """A pool whose unwritten codes are the largest and whose unwritten scales are NaN."""
    pool = QuantizedPool(LAYOUT, blocks, DEVICE, bits=bits, group=group)
    for part in (*pool.keys, *pool.values):
        part.codes.fill_(255)
        part.scales.fill_(math.nan)
        part.zeros.fill_(math.nan)
    return pool


def _rows(layer, tokens, seed=0):
    spec, rng = LAYOUT.layers[layer], torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, tokens, spec.num_kv_heads, spec.head_dim, generator=rng)
    keys[..., 0] = keys[..., 0] * 9 + 60  # keys before RoPE have such channels
    return keys.to(DEVICE), values.to(DEVICE)


def _slots(pool, blocks, tokens):
    return pool.rows_of(blocks.tolist())[:tokens].to(DEVICE)


@pytest.mark.parametrize(("bits", "group"), KINDS)
def test_each_layer_has_blocks_of_its_own_shape(bits, group):
    pool = _pool(bits, group)
    assert [tuple(part.shape) for part in (*pool.keys, *pool.values)] == [(6, 64, 3, 16), (6, 64, 2, 96)] * 2
    assert [part.row_group for part in (*pool.keys, *pool.values)] == [group, group, 1, 1]
    assert [part.channel_group for part in (*pool.keys, *pool.values)] == [1, 1, 8, 16]


@pytest.mark.parametrize(("bits", "group", "bits_a_number"), [(8, 64, 8.5), (4, 32, 5.0), (4, 64, 4.5)])
def test_a_block_takes_its_codes_and_their_scales(bits, group, bits_a_number):
    layout = KVLayout((LayerSpec(8, 128, RopeConfig()),) * 3, torch.bfloat16)
    pool = QuantizedPool(layout, 2, DEVICE, bits=bits, group=group)
    assert pool.bytes_per_block == 3 * 2 * 64 * 8 * 128 * bits_a_number / 8


def test_blocks_are_handed_out_and_counted_as_in_any_pool():
    pool = _pool(8, 64)
    blocks = pool.allocate(5)
    pool.retain(blocks[:1])
    pool.release(blocks)
    assert (pool.num_free, pool.references(blocks[0])) == (5, 1)
    with pytest.raises(CacheCapacityError, match="asked for 6 KV blocks of 64 tokens, 5 of 6 are free"):
        pool.allocate(6)


@pytest.mark.parametrize("tokens", [1, 31, 33, 64, 100, 192])
@pytest.mark.parametrize(("bits", "group"), KINDS)
@pytest.mark.parametrize("layer", [0, 1])
def test_what_is_read_back_lies_within_half_a_step(layer, bits, group, tokens):
    pool, (keys, values) = _pool(bits, group), _rows(layer, tokens)
    blocks = torch.tensor([4, 1, 3], device=DEVICE)[: pool.blocks_for(tokens)]
    pool.write(layer, blocks, keys, values)
    got_keys, got_values = pool.rows(layer, _slots(pool, blocks, tokens))
    for start in range(0, tokens, group):  # a channel's step is its span over the group's rows
        own = keys[start : start + group]
        step = (own.amax(0) - own.amin(0)) / (2**bits - 1)
        assert bool(((got_keys[start : start + group] - own).abs() <= step * 0.51 + 0.002 * own.abs()).all())
    step = (values.amax(2) - values.amin(2)) / (2**bits - 1)
    assert bool(((got_values - values).abs() <= step.unsqueeze(2) * 0.51 + 1e-3).all())


@pytest.mark.parametrize("backend", [Backend.TORCH, Backend.TRITON])
@pytest.mark.parametrize(("bits", "group"), KINDS)
def test_other_blocks_and_layers_stay_as_they_are(bits, group, backend):
    pool, (keys, values) = _pool(bits, group), _rows(1, 70)
    pool.write(1, torch.tensor([4, 1], device=DEVICE), keys, values, backend=backend)
    assert bool(pool.rows(1, _slots(pool, torch.tensor([4, 1], device=DEVICE), 70))[0].isfinite().all())
    for part in (pool.keys[0], pool.values[0]):
        assert bool((part.codes == 255).all() and part.scales.isnan().all())
    for part in (pool.keys[1], pool.values[1]):
        assert bool((part.codes[[0, 2, 3, 5]] == 255).all() and part.scales[[0, 2, 3, 5]].isnan().all())
        assert bool((part.codes[1, 6:] == 255).all())
    assert bool(pool.values[1].scales[1, 6:].isnan().all())


@pytest.mark.parametrize(("bits", "group"), KINDS)
@pytest.mark.parametrize("tokens", [70, 128])
def test_rows_have_the_codes_that_the_codec_of_the_same_group_stores(bits, group, tokens):
    codec = QuantizedCodec("test", LAYOUT, bits, group)
    layers = [_rows(layer, tokens) for layer in range(2)]
    written, placed = _pool(bits, group), _pool(bits, group)
    blocks = torch.tensor([5, 2], device=DEVICE)
    for layer, data in enumerate(codec.encode(layers)):
        written.write(layer, blocks, *layers[layer])
        placed.place(layer, blocks, *codec.views(data, tokens, layer))
    for mine, theirs in zip((*written.keys, *written.values), (*placed.keys, *placed.values), strict=True):
        assert torch.equal(mine.codes, theirs.codes)
        assert torch.equal(mine.scales.nan_to_num(-1.0), theirs.scales.nan_to_num(-1.0))
        assert torch.equal(mine.zeros.nan_to_num(-1.0), theirs.zeros.nan_to_num(-1.0))


@pytest.mark.parametrize("tokens", [70, 128])
def test_decoding_the_codec_s_bytes_gives_the_rows_of_the_pool(tokens):
    codec = QuantizedCodec("test", LAYOUT, 4, 32)
    layers = [_rows(layer, tokens) for layer in range(2)]
    pool, blocks = _pool(4, 32), torch.tensor([0, 3], device=DEVICE)
    for layer, (keys, values) in enumerate(codec.decode(codec.encode(layers), tokens)):
        pool.write(layer, blocks, *layers[layer])
        got_keys, got_values = pool.rows(layer, _slots(pool, blocks, tokens))
        # A GPU multiplies and adds in one step, which rounds once less.
        assert torch.allclose(got_keys, keys, rtol=1e-6, atol=1e-5)
        assert torch.allclose(got_values, values, rtol=1e-6, atol=1e-6)


def test_a_request_lists_quantised_blocks_like_plain_ones():
    pool = _pool(8, 64)
    blocks = pool.allocate(2)
    with RequestKV(pool) as request:
        request.append_shared(blocks, 100)
        assert [pool.references(block) for block in blocks] == [2, 2]
    assert [pool.references(block) for block in blocks] == [1, 1]


def test_no_rows_take_no_blocks():
    pool = _pool(8, 64)
    pool.write(0, torch.empty(0, dtype=torch.int64, device=DEVICE), *_rows(0, 0))
    assert bool((pool.keys[0].codes == 255).all())


def test_a_wrong_number_of_blocks_is_refused():
    pool = _pool(8, 64)
    with pytest.raises(KVCacheError, match=r"65 rows take 2 blocks, got \(1,\)"):
        pool.write(0, torch.tensor([1], device=DEVICE), *_rows(0, 65))


def test_rows_of_another_layer_s_shape_are_refused():
    pool = _pool(8, 64)
    with pytest.raises(KernelInputError, match="out must be"):
        pool.write(0, torch.tensor([1], device=DEVICE), *_rows(1, 5))


def test_codes_of_another_group_are_refused():
    pool, codec = _pool(4, 32), QuantizedCodec("test", LAYOUT, 4, 64)
    data = codec.encode([_rows(0, 64), _rows(1, 64)])[0]
    with pytest.raises(KVCacheError, match="do not fit blocks of 4 bits in groups of 32"):
        pool.place(0, torch.tensor([1], device=DEVICE), *codec.views(data, 64, 0))


def test_groups_longer_than_a_block_are_refused():
    with pytest.raises(KernelInputError, match="groups of 64 rows do not divide blocks of 32"):
        QuantizedPool(LAYOUT, 2, DEVICE, bits=8, group=64, block_size=32)
