import dataclasses
import math
from pathlib import Path

import pytest
import torch
from kv_samples import LAYOUT, chunk_of, layers_of, ref_of

from ragkit.config import CodecName
from ragkit.errors import KVCacheError
from ragkit.kvcache.chunk_kv import ChunkKV
from ragkit.kvcache.codec import decode_chunk, encode_chunk, join_sections
from ragkit.kvcache.codec_drafted import DraftedCodec
from ragkit.kvcache.codecs import encoding_seconds, make_codec
from ragkit.kvcache.layout import KVLayout, LayerSpec
from ragkit.models.model_config import RopeConfig

CODECS = [name.value for name in CodecName]
LOSSY = ["int8", "int4", "entropy1", "entropy2", "entropy3"]


def layout_of(dtype=torch.float32, heads=2, head_dim=16, layers=3):
    return KVLayout((LayerSpec(heads, head_dim, RopeConfig()),) * layers, dtype)


def round_trip(name, layout, tokens=70):
    codec = make_codec(name, layout)
    chunk = chunk_of(ref_of("sample", tokens), layout)
    encoded = encode_chunk(codec, chunk, "chunk")
    return codec, chunk, encoded, decode_chunk(codec, encoded)


def relative_error(chunk, back):
    pairs = [(a, b) for mine, theirs in zip(chunk.layers, back.layers, strict=True) for a, b in zip(mine, theirs)]  # noqa: B905
    wrong = sum(float((a.double() - b.double()).square().sum()) for a, b in pairs)
    total = sum(float((a.double() - a.double().mean(0)).square().sum()) for a, _ in pairs)
    return (wrong / total) ** 0.5


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 31, 32, 70])
def test_every_number_is_within_the_stated_bound(name, dtype, tokens):
    codec, chunk, _, back = round_trip(name, layout_of(dtype), tokens)
    for original, decoded, bounds in zip(chunk.layers, back.layers, codec.error_bounds(chunk.layers), strict=True):
        for a, b, bound in zip(original, decoded, bounds, strict=True):
            assert b.dtype == dtype
            assert b.shape == a.shape
            assert bool(((a.double() - b.double()).abs() <= bound.double()).all())


@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_raw_codecs_are_exact_in_their_own_type(name):
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[name]
    _, chunk, _, back = round_trip(name, layout_of(dtype))
    assert all(torch.equal(a, b) for x, y in zip(chunk.layers, back.layers, strict=True) for a, b in zip(x, y))  # noqa: B905


@pytest.mark.parametrize(
    ("name", "most"), [("bf16", 0.005), ("int8", 0.01), ("int4", 0.13), ("entropy1", 0.2), ("entropy2", 0.3)]
)
def test_the_error_is_small_against_the_spread_of_the_numbers(name, most):
    _, chunk, _, back = round_trip(name, layout_of(torch.float32, 4, 32), 128)
    assert relative_error(chunk, back) <= most


@pytest.mark.parametrize("name", CODECS)
def test_the_same_bytes_decode_to_the_same_numbers_and_layer_by_layer(name):
    layout = layout_of()
    codec, _, encoded, back = round_trip(name, layout)
    again = decode_chunk(codec, encoded)
    for index, (keys, values) in enumerate(back.layers):
        ((own_keys, own_values),) = codec.decode([encoded.layer(index)], encoded.num_tokens, index)
        assert torch.equal(keys, own_keys)
        assert torch.equal(values, own_values)
        assert torch.equal(again.layers[index][0], keys)


@pytest.mark.parametrize("name", ["int8", "int4"])
@pytest.mark.parametrize("tokens", [1, 32, 70])
def test_layers_encoded_together_have_the_bytes_of_each_alone(name, tokens):
    codec = make_codec(name, layout_of())
    layers = layers_of(range(tokens), layout_of())
    alone = [join_sections([*codec._keys(keys), *codec._values(values)]) for keys, values in layers]
    assert all(torch.equal(one, other) for one, other in zip(codec.encode(layers), alone, strict=True))


@pytest.mark.parametrize("name", CODECS)
def test_encoding_twice_gives_the_same_bytes(name):
    first, second = (round_trip(name, layout_of())[2] for _ in range(2))
    assert torch.equal(first.data, second.data)


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp16", "int8", "int4"])
@pytest.mark.parametrize("tokens", [1, 33, 256])
def test_fixed_size_codecs_state_their_exact_bytes(name, tokens):
    codec, _, encoded, _ = round_trip(name, layout_of(head_dim=64), tokens)
    assert sum(stop - start for start, stop in encoded.extents) == codec.bytes_per_token(tokens) * tokens


@pytest.mark.parametrize("name", ["entropy1", "entropy2", "entropy3"])
def test_entropy_codecs_state_about_their_bytes_for_numbers_without_structure(name):
    layout = layout_of(head_dim=64)
    generator = torch.Generator().manual_seed(0)
    shape = (256, 2, 64)
    layers = tuple(tuple(torch.randn(shape, generator=generator) for _ in range(2)) for _ in layout.layers)
    codec = make_codec(name, layout)
    ref = ref_of("noise", 256)
    encoded = encode_chunk(codec, ChunkKV(ref.key, ref.token_ids, layers), "chunk")
    assert encoded.nbytes / 256 == pytest.approx(codec.bytes_per_token(256), rel=0.05)


def test_bytes_fall_from_codec_to_codec():
    layout = layout_of(torch.float32, 4, 64)
    sizes = [round_trip(name, layout, 256)[2].nbytes for name in CODECS if name != "fp16" and "+" not in name]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == 2 * sizes[1]


@pytest.mark.models
def test_the_finest_entropy_level_is_a_third_smaller_than_int4_at_equal_divergence_of_a_real_model():
    from ragkit.generation.attention import StandaloneAttention
    from ragkit.generation.engine import Engine

    engine = Engine.load("smollm2-135m-instruct", device="cpu", dtype="float32", offline=True, kv_tokens=64)
    text = (Path(__file__).resolve().parents[2] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    ids = engine.tokenizer.encode(text)[:448]
    question = engine.tokenizer.encode("\n\nIn a few words, what does the text above ask of contributors, and why?\n\n")
    decoder = engine.decoder
    rotary = engine.rotary.table(512, 512)

    def answers(past):
        attend = StandaloneAttention(rotary, decoder.scale, past)
        return decoder.logits(decoder.run(question, attend)).log_softmax(-1)

    with torch.inference_mode():
        own = StandaloneAttention(rotary, decoder.scale)
        decoder.run(ids, own)
        exact, ref = answers(own.kept), dataclasses.replace(ref_of("real"), token_ids=tuple(ids))
        size, divergence = {}, {}
        for name in ("int4", "entropy1"):
            codec = make_codec(name, decoder.layout)
            encoded = encode_chunk(codec, ChunkKV(ref.key, ref.token_ids, tuple(own.kept)), "chunk")
            got = answers(decode_chunk(codec, encoded).layers)
            size[name] = encoded.nbytes * 8 / sum(part.numel() for layer in own.kept for part in layer)
            divergence[name] = float((exact.exp() * (exact - got)).sum(-1).mean())
    # The divergence grows with the square of the error, and halving the error of a step takes one bit more.
    missing = math.log2(divergence["entropy1"] / divergence["int4"]) / 2
    assert size["int4"] / (size["entropy1"] + missing) >= 1.3


def test_the_mean_of_a_channel_much_narrower_than_its_step_is_kept():
    layout = layout_of(layers=1)
    keys, values = (torch.randn(64, 2, 16, generator=torch.Generator().manual_seed(0)) for _ in range(2))
    values[:, 0, 3] = 0.137 + values[:, 0, 3] / 100
    codec, ref = make_codec("entropy1", layout), ref_of("narrow", 64)
    encoded = encode_chunk(codec, ChunkKV(ref.key, ref.token_ids, ((keys, values),)), "chunk")
    decoded = decode_chunk(codec, encoded).layers[0][1][1:, 0, 3]
    assert float(decoded.std()) == 0
    assert float(decoded[0]) == pytest.approx(float(values[1:, 0, 3].mean()), abs=2e-4)


@pytest.mark.parametrize("name", ["entropy1", "entropy3"])
def test_the_first_token_of_an_entropy_coded_chunk_is_rounded_to_half_precision_alone(name):
    _, chunk, _, back = round_trip(name, layout_of())
    for original, decoded in zip(chunk.layers, back.layers, strict=True):
        for exact, got in zip(original, decoded, strict=True):
            assert torch.equal(got[0], exact[0].half().float())


@pytest.mark.parametrize(("name", "draft", "full"), [("int4+bf16", "int4", "bf16"), ("int4+int8", "int4", "int8")])
def test_a_drafted_chunk_holds_its_draft_and_then_what_the_other_codec_makes(name, draft, full):
    codec, _, encoded, back = round_trip(name, layout_of())
    low, high = (round_trip(part, layout_of())[2] for part in (draft, full))
    assert torch.equal(encoded.data[: low.nbytes], low.data)
    assert encoded.draft_extents == low.extents
    for index in range(3):
        assert torch.equal(encoded.layer(index), high.layer(index))
    exact = decode_chunk(make_codec(full, layout_of()), high)
    assert all(torch.equal(a, b) for x, y in zip(back.layers, exact.layers, strict=True) for a, b in zip(x, y))  # noqa: B905
    assert round(codec.bytes_per_token(70) * 70) == sum(b - a for a, b in (*encoded.draft_extents, *encoded.extents))


def test_a_draft_of_a_draft_is_refused():
    drafted = make_codec("int4+bf16", LAYOUT)
    with pytest.raises(KVCacheError, match="plain codecs of the same layout"):
        DraftedCodec(drafted, make_codec("fp32", LAYOUT))


@pytest.mark.parametrize("name", CODECS)
def test_an_empty_chunk_passes(name):
    _, _, _, back = round_trip(name, layout_of(), 0)
    assert back.layers[0][0].shape == (0, 2, 16)


@pytest.mark.parametrize("name", ["fp16", *LOSSY])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_numbers_that_no_scale_can_carry_are_refused(name, bad):
    layers = layers_of(range(20))
    layers[1][1][3, 2, 1] = bad
    ref = ref_of("bad", 20)
    with pytest.raises(
        KVCacheError, match=r"values of layer 1 hold a number that is not finite.* set kv\.codec to bf16"
    ):
        encode_chunk(make_codec(name, LAYOUT), ChunkKV(ref.key, ref.token_ids, layers), "chunk")


@pytest.mark.parametrize("name", LOSSY)
def test_constant_and_outlying_channels_survive(name):
    layout = layout_of()
    layers = tuple((torch.zeros(40, 2, 16), torch.zeros(40, 2, 16)) for _ in layout.layers)
    layers[0][0][..., 1] = 300.0
    layers[0][0][7, 0, 2] = 5e4
    layers[1][1][9, 1, 3] = -5e4
    codec, ref = make_codec(name, layout), ref_of("outlier", 40)
    chunk = ChunkKV(ref.key, ref.token_ids, layers)
    back = decode_chunk(codec, encode_chunk(codec, chunk, "chunk"))
    for original, decoded, bounds in zip(layers, back.layers, codec.error_bounds(layers), strict=True):
        for a, b, bound in zip(original, decoded, bounds, strict=True):
            assert bool(((a - b).abs() <= bound).all())
    assert float(back.layers[0][0][..., 1].sub(300).abs().max()) < 1


def test_layers_of_different_shapes_pass_through_the_entropy_codec():
    layout = KVLayout((LayerSpec(2, 16, RopeConfig()), LayerSpec(1, 8, RopeConfig()), LayerSpec(2, 16, RopeConfig())),
                      torch.float32)  # fmt: skip
    codec, chunk, _, back = round_trip("entropy1", layout)
    for original, decoded, bounds in zip(chunk.layers, back.layers, codec.error_bounds(chunk.layers), strict=True):
        assert all(bool(((a - b).abs() <= c).all()) for a, b, c in zip(original, decoded, bounds, strict=True))


def test_codecs_have_different_ids():
    assert len({make_codec(name, LAYOUT).codec_id for name in CODECS}) == len(CODECS)


def test_an_unknown_codec_is_refused():
    with pytest.raises(KVCacheError, match="no KV codec 'zip'; there are fp32, bf16"):
        make_codec("zip", LAYOUT)


def test_kv_of_another_model_or_codec_is_refused():
    chunk = chunk_of(ref_of("a"))
    with pytest.raises(KVCacheError, match="does not have the layers"):
        encode_chunk(make_codec("bf16", layout_of()), chunk, "chunk")
    encoded = encode_chunk(make_codec("bf16", LAYOUT), chunk, "chunk")
    with pytest.raises(KVCacheError, match="encoded by bf16 cannot be decoded by int8"):
        decode_chunk(make_codec("int8", LAYOUT), encoded)


@pytest.mark.parametrize("name", CODECS)
def test_bytes_of_another_size_are_refused(name):
    codec = make_codec(name, LAYOUT)
    encoded = encode_chunk(codec, chunk_of(ref_of("a")), "chunk")
    short = dataclasses.replace(encoded, extents=((0, 32), *encoded.extents[1:]))
    with pytest.raises(KVCacheError, match="bytes"):
        decode_chunk(codec, short)


def test_only_the_entropy_coder_is_expected_to_hold_up_computing():
    costs = {name: encoding_seconds(name) for name in CodecName}
    assert {name for name, cost in costs.items() if cost} == {"entropy1", "entropy2", "entropy3"}
    assert costs["entropy1"] * 65536 * 512 == pytest.approx(6.7, rel=0.1)  # a chunk at the shape of Llama 3 8B
