import pytest
import torch

from ragkit.kvcache.layout import KVLayout, LayerSpec
from ragkit.kvcache.page_codec import PageCodec
from ragkit.kvcache.resident_pages import ResidentPages
from ragkit.models.model_config import RopeConfig

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LAYOUT = KVLayout((LayerSpec(2, 16, RopeConfig()), LayerSpec(2, 96, RopeConfig())), torch.bfloat16)
PAGES, PLACED = 7, (4, 1, 2)


def _fused_rows(layer, tokens):
    """Keys and values as views of what a projection gives."""
    spec = LAYOUT.layers[layer]
    heads, rng = spec.num_kv_heads, torch.Generator().manual_seed(layer)
    fused = torch.randn(tokens, 4 * heads, spec.head_dim, generator=rng).to(DEVICE, LAYOUT.dtype)
    return fused[:, 2 * heads : 3 * heads], fused[:, 3 * heads :]


@pytest.mark.parametrize("codec", ["int8", "int4"])
@pytest.mark.parametrize("page_size", [16, 64, 128])
def test_pages_that_the_device_alone_knows_are_those_that_the_host_would_have_written(page_size, codec):
    codec = PageCodec(codec, LAYOUT, page_size)
    written, placed = (ResidentPages(codec, PAGES, DEVICE) for _ in range(2))
    at = torch.tensor(PLACED, device=DEVICE)
    coming = placed.coming(at)
    for layer in range(2):
        for blocks in placed.blocks(layer):
            blocks.codes.fill_(7)
        keys, values = _fused_rows(layer, len(PLACED) * page_size)
        placed.place(layer, coming, keys, values)
        for index, page in enumerate(PLACED):
            rows = slice(index * page_size, (index + 1) * page_size)
            written.write(layer, range(page, page + 1), keys[rows], values[rows])
        for mine, other in zip(placed.parts(layer, at), written.parts(layer, at), strict=True):
            assert torch.equal(mine, other)
        for blocks in placed.blocks(layer):
            assert bool((blocks.codes[[0, 3, 5, 6]] == 7).all())


@pytest.mark.parametrize("codec", ["int8", "int4"])
def test_the_parts_of_placed_pages_join_to_the_bytes_that_the_codec_stores(codec):
    codec, at = PageCodec(codec, LAYOUT, 64), torch.tensor(PLACED, device=DEVICE)
    resident = ResidentPages(codec, PAGES, DEVICE)
    for layer in range(2):
        keys, values = _fused_rows(layer, len(PLACED) * 64)
        resident.place(layer, resident.coming(at), keys, values)
        joined = torch.zeros(len(PLACED), codec.page_bytes(layer), dtype=torch.uint8, device=DEVICE)
        codec.join(resident.parts(layer, at), joined)
        assert torch.equal(joined, codec.encode(layer, keys, values))
