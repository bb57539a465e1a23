import pytest
import torch
from kv_samples import key_of, ref_of

from ragkit.errors import KVCacheError
from ragkit.kvcache.chunk_kv import ChunkKV, EncodedKV


@pytest.mark.parametrize(
    ("keys", "values"), [((4, 2, 8), (4, 2, 8)), ((3, 2, 8), (3, 2, 4)), ((3, 16), (3, 16)), ((3, 2, 8), (4, 2, 8))]
)
def test_padded_or_uneven_layers_are_refused(keys, values):
    with pytest.raises(KVCacheError, match="layer 1 of a chunk of 3 tokens"):
        ChunkKV(
            key_of("a"),
            (1, 2, 3),
            ((torch.zeros(3, 2, 8), torch.zeros(3, 2, 8)), (torch.zeros(keys), torch.zeros(values))),
        )


def test_packed_layers_come_back_and_start_aligned():
    layers = [torch.arange(70, dtype=torch.uint8), torch.empty(0, dtype=torch.uint8), torch.ones(3, dtype=torch.uint8)]
    encoded = EncodedKV.pack(ref_of("a"), "codec", layers)
    assert encoded.extents == ((0, 70), (128, 128), (128, 131))
    assert encoded.nbytes == 131
    assert all(torch.equal(encoded.layer(index), layer) for index, layer in enumerate(layers))
