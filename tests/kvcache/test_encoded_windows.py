import pytest
import torch
from kv_samples import key_of
from page_doubles import RecordsInMemory

from ragkit.kvcache.chunk_kv import ChunkRef, EncodedKV, packed_extents
from ragkit.kvcache.encoded_windows import EncodedWindows
from ragkit.kvcache.layout import KVLayout, LayerSpec
from ragkit.kvcache.page_codec import PageCodec
from ragkit.kvcache.page_grid import PageGrid
from ragkit.kvcache.page_memory import PageMemory
from ragkit.kvcache.page_records import PageRecords
from ragkit.kvcache.page_window import DamagedWindowError
from ragkit.kvcache.resident_pages import ResidentPages
from ragkit.models.model_config import RopeConfig

CPU = torch.device("cpu")
LAYOUT = KVLayout(tuple(LayerSpec(2, dim, RopeConfig()) for dim in (16, 24)), torch.float32)
CODEC = PageCodec("int8", LAYOUT, 16)
TOKENS, WINDOW = 75, 32  # a last window of one page
REFS = tuple(
    ChunkRef(key_of(start), tuple(range(start, min(start + WINDOW, TOKENS))), "chunk")
    for start in range(0, TOKENS, WINDOW)
)
GRID = PageGrid(TOKENS, WINDOW, 16)


def pieces_of(window):
    generator = torch.Generator().manual_seed(window)
    made = []
    for layer, spec in enumerate(LAYOUT.layers):
        shape = (len(REFS[window].token_ids), spec.num_kv_heads, spec.head_dim)
        made.append(CODEC.encode(layer, *(torch.randn(shape, generator=generator) for _ in range(2))))
    return made


@pytest.fixture
def tier():
    return RecordsInMemory()


@pytest.fixture
def windows(tier):
    def opened(memory_bytes=1 << 20):
        records = PageRecords(tier, CODEC.codec_id, 2)
        return EncodedWindows(CODEC, REFS, GRID, PageMemory(memory_bytes), records)

    first = opened()
    for window in range(len(REFS)):
        first.add(window, pieces_of(window), 0.0)
    first.flush()
    return opened


def arrived(windows, span=range(3)):
    """The pieces of each window as they came whole."""
    found = {}
    for some, data, extents in windows.whole(span, CPU):
        for window, row in zip(some, data, strict=True):
            found[window] = [
                row[start:stop].view(-1, CODEC.page_bytes(layer)).clone() for layer, (start, stop) in enumerate(extents)
            ]
    return found


def test_whole_windows_have_the_bytes_of_their_pieces_also_the_last_shorter_one(windows):
    found = arrived(windows())
    assert list(found) == [0, 1, 2]
    for window, layers in found.items():
        assert all(map(torch.equal, layers, pieces_of(window)))
    assert list(arrived(windows(), range(2, 3))) == [2]
    assert list(arrived(windows(), range(1))) == [0]


def test_whole_windows_are_counted_where_they_were_found(windows):
    of = windows()
    arrived(of)
    assert of.nbytes == {"ram": 0, "disk": sum(piece.nbytes for window in range(3) for piece in pieces_of(window))}
    for layer in range(2):
        of.piece(layer, 1)
    before = dict(of.nbytes)
    found = arrived(of, range(1, 2))
    assert all(map(torch.equal, found[1], pieces_of(1)))
    assert {place: of.nbytes[place] - before[place] for place in before} == {
        "ram": sum(piece.nbytes for piece in pieces_of(1)), "disk": 0,
    }  # fmt: skip


def test_a_record_whose_layers_lie_elsewhere_is_placed_as_the_others_are(windows, tier):
    flat = [piece.flatten() for piece in pieces_of(1)]
    starts = (128, 128 + len(flat[0]) + 64)
    data = torch.zeros(starts[1] + len(flat[1]), dtype=torch.uint8)
    extents = tuple((start, start + len(piece)) for start, piece in zip(starts, flat, strict=True))
    assert extents != packed_extents([len(piece) for piece in flat])
    for piece, (start, stop) in zip(flat, extents, strict=True):
        data[start:stop] = piece
    tier.save([EncodedKV(REFS[1], CODEC.codec_id, data, extents)])
    assert all(map(torch.equal, arrived(windows())[1], pieces_of(1)))


def test_layers_that_lie_elsewhere_in_as_many_bytes_do_not_write_over_each_other(tier):
    layout = KVLayout(tuple(LayerSpec(1, 9, RopeConfig()) for _ in range(4)), torch.float32)
    codec, grid = PageCodec("bf16", layout, 8), PageGrid(8, 8, 8)  # 288 bytes a layer: gaps of 32 follow
    ref = ChunkRef(key_of("narrow"), tuple(range(8)), "chunk")
    rows = torch.arange(72, dtype=torch.float32).view(8, 1, 9)
    flat = [codec.encode(layer, rows + 100 * layer, rows).flatten() for layer in range(4)]
    nbytes = packed_extents([len(piece) for piece in flat])[-1][1]
    close = tuple((start, start + len(flat[0])) for start in range(0, 4 * len(flat[0]), len(flat[0])))
    data = torch.cat((*flat, torch.zeros(nbytes - 4 * len(flat[0]), dtype=torch.uint8)))
    tier.save([EncodedKV(ref, codec.codec_id, data, close)])
    windows = EncodedWindows(codec, [ref], grid, PageMemory(0), PageRecords(tier, codec.codec_id, 4))
    ((_, rows, extents),) = list(windows.whole(range(1), CPU))
    for piece, (start, stop) in zip(flat, extents, strict=True):
        assert torch.equal(rows[0, start:stop], piece)


def test_a_whole_window_of_other_sizes_is_damaged(windows, tier):
    tier.save([EncodedKV.pack(REFS[1], CODEC.codec_id, [piece.flatten()[:-1] for piece in pieces_of(1)])])
    with pytest.raises(DamagedWindowError) as caught:
        arrived(windows())
    assert caught.value.window == 1


def test_windows_that_are_placed_together_lie_where_each_would_alone(windows):
    together, alone = (ResidentPages(CODEC, GRID.num_pages, CPU) for _ in range(2))
    for some, data, extents in windows().whole(range(3), CPU):
        together.put_windows(GRID.first_page(some.start), data, extents)
    for window in range(3):
        for layer, piece in enumerate(pieces_of(window)):
            alone.put(layer, GRID.first_page(window), piece)
    pages = torch.arange(GRID.num_pages)
    for layer in range(2):
        for mine, other in zip(together.parts(layer, pages), alone.parts(layer, pages), strict=True):
            assert torch.equal(mine, other)
