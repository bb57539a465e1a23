import math

import pytest
import torch

from ragkit.errors import KernelInputError
from ragkit.kernels import question_attention as module
from ragkit.kernels.backend import Backend
from ragkit.kernels.question_attention import question_attention, question_attention_torch
from ragkit.kernels.testing import assert_matches, guarded

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _inputs(first_position, tokens, q_heads, kv_heads, head_dim, dtype, device, rng, spare=0):
    """Queries as a view over a fused projection; `spare` rows of NaN behind the question's own."""
    qkv = guarded(torch.randn(tokens, q_heads + 2, head_dim, device=device, generator=rng).to(dtype))
    qkv[:, q_heads:] = math.nan
    end = first_position + tokens
    keys, values = (
        torch.randn(end + spare, kv_heads, head_dim, device=device, generator=rng).to(dtype) for _ in range(2)
    )
    keys[end:], values[end:] = math.nan, math.nan
    angles = torch.rand(end, head_dim // 2, device=device, generator=rng) * 6
    tables = guarded(angles.cos()), guarded(angles.sin())
    return [qkv[:, :q_heads], guarded(keys), guarded(values), *tables]


def _compare(inputs, first_position, reduced=4):
    scale = inputs[0].shape[-1] ** -0.5
    out, mass = question_attention(*inputs, first_position=first_position, scale=scale, backend=Backend.TRITON)
    expected = question_attention_torch(
        *(tensor.float() for tensor in inputs), first_position=first_position, scale=scale
    )
    assert_matches(out, expected[0], reduced=reduced)
    # The mass is fp32 of scores whose operands were rounded: each weight moves by at most about their error.
    assert mass.dtype == torch.float32
    assert_matches(mass.to(out.dtype), expected[1], reduced=reduced)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("first_position", [0, 1, 63, 64, 65, 300])
@pytest.mark.parametrize("tokens", [1, 8, 17])
def test_matches_the_definition(dtype, first_position, tokens, device, rng):
    _compare(_inputs(first_position, tokens, 6, 2, 32, dtype, device, rng, spare=5), first_position)


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize(("q_heads", "kv_heads"), [(9, 3), (2, 2), (5, 1)])
def test_matches_the_definition_for_every_head_size(head_dim, q_heads, kv_heads, device, rng):
    _compare(_inputs(70, 5, q_heads, kv_heads, head_dim, torch.float32, device, rng), 70)


@pytest.mark.parametrize("tokens", [70, 200])
def test_a_long_question_is_complete(tokens, device, rng):
    _compare(_inputs(90, tokens, 4, 2, 16, torch.float32, device, rng), 90)


@pytest.mark.parametrize("backend", list(Backend))
def test_rows_are_read_where_they_lie(backend, device, rng):
    queries, keys, values, cos, sin = _inputs(90, 6, 4, 2, 16, torch.float32, device, rng)
    together = question_attention(queries, keys, values, cos, sin, first_position=90, scale=0.3, backend=backend)
    places = guarded(torch.randperm(200, device=device, generator=rng)[: len(keys)], 10**9)
    spread = [guarded(torch.full((200, 2, 16), math.nan, device=device)) for _ in range(2)]
    for there, rows in zip(spread, (keys, values), strict=True):
        there[places] = rows
    apart = question_attention(
        queries, *spread, cos, sin, first_position=90, scale=0.3, places=places, backend=backend
    )  # fmt: skip
    for got, expected in zip(apart, together, strict=True):
        assert_matches(got, expected)


def _formula(queries, keys, values, cos, sin, first_position, scale):
    queries, keys, values = queries.double(), keys.double(), values.double()
    out, mass = torch.zeros_like(queries), torch.zeros(len(keys), dtype=torch.float64, device=keys.device)
    group = queries.shape[1] // keys.shape[1]
    for token in range(queries.shape[0]):
        for head in range(queries.shape[1]):
            seen = first_position + token + 1
            first, second = keys[:seen, head // group].chunk(2, dim=-1)
            turned = torch.cat(
                (first * cos[:seen] - second * sin[:seen], second * cos[:seen] + first * sin[:seen]), dim=-1
            )
            weights = (turned @ queries[token, head] * scale).softmax(0)
            out[token, head] = weights @ values[:seen, head // group]
            mass[:seen] += weights
    return out, mass


@pytest.mark.parametrize("held", [1, 300, 1 << 24])
def test_the_definition_is_the_formula_however_few_scores_it_holds(held, device, rng, monkeypatch):
    monkeypatch.setattr(module, "_TORCH_SCORES", held)
    inputs = _inputs(20, 7, 6, 2, 16, torch.float32, device, rng, spare=3)
    out, mass = question_attention_torch(*inputs, first_position=20, scale=0.3)
    expected_out, expected_mass = _formula(*inputs, 20, 0.3)
    assert float((out - expected_out).abs().max()) < 1e-5
    assert float((mass - expected_mass).abs().max()) < 1e-5


@pytest.mark.parametrize("backend", list(Backend))
def test_the_mass_sums_to_the_number_of_queries_and_later_rows_get_none(backend, device, rng):
    inputs = _inputs(100, 9, 6, 2, 32, torch.float32, device, rng, spare=4)
    _, mass = question_attention(*inputs, first_position=100, scale=0.5, backend=backend)
    assert mass.shape == (113,)
    assert float(mass.sum()) == pytest.approx(54, rel=1e-5)
    assert torch.equal(mass[109:], torch.zeros(4, device=device))


@pytest.mark.parametrize("backend", list(Backend))
def test_a_token_does_not_see_the_tokens_after_it(backend, device, rng):
    inputs = _inputs(60, 9, 4, 2, 32, torch.float32, device, rng)
    whole, _ = question_attention(*inputs, first_position=60, scale=0.5, backend=backend)
    inputs[0] = inputs[0][:4]
    inputs[1][64:], inputs[2][64:] = math.nan, math.nan
    start, _ = question_attention(*inputs, first_position=60, scale=0.5, backend=backend)
    assert_matches(start, whole[:4], reduced=4)


@pytest.mark.parametrize("backend", list(Backend))
def test_a_row_that_all_queries_point_to_receives_all_mass(backend, device, rng):
    inputs = _inputs(80, 3, 4, 2, 16, torch.float32, device, rng)
    inputs[3].fill_(1.0)
    inputs[4].fill_(0.0)
    inputs[1].fill_(0.0)
    inputs[1][37] = inputs[0][0, 0]
    inputs[0].copy_(inputs[0][0, 0].expand_as(inputs[0]).clone())
    out, mass = question_attention(*inputs, first_position=80, scale=50.0, backend=backend)
    assert float(mass[37]) == pytest.approx(12, rel=1e-4)
    assert_matches(out[:, 0], inputs[2][37, 0].expand(3, 16))


@pytest.mark.parametrize("backend", list(Backend))
def test_without_mass_the_output_is_the_same_and_the_mass_empty(backend, device, rng):
    inputs = _inputs(70, 5, 4, 2, 32, torch.float32, device, rng)
    options = {"first_position": 70, "scale": 0.3, "backend": backend}
    out, mass = question_attention(*inputs, **options, with_mass=False)
    assert mass.shape == (0,)
    assert torch.equal(out, question_attention(*inputs, **options)[0])


@pytest.mark.parametrize("backend", list(Backend))
def test_no_tokens_give_no_output_and_no_mass(backend, device, rng):
    inputs = _inputs(30, 0, 4, 2, 32, torch.float32, device, rng)
    out, mass = question_attention(*inputs, first_position=30, scale=1.0, backend=backend)
    assert out.shape == (0, 4, 32)
    assert torch.equal(mass, torch.zeros(30, device=device))


def test_two_runs_give_the_same_bits(device, rng):
    inputs = _inputs(500, 20, 8, 2, 32, torch.bfloat16, device, rng)
    runs = [question_attention(*inputs, first_position=500, scale=0.2, backend=Backend.TRITON) for _ in range(2)]
    assert torch.equal(runs[0][0], runs[1][0])
    assert torch.equal(runs[0][1], runs[1][1])


def test_shapes_that_do_not_fit_are_refused(device, rng):
    inputs = _inputs(30, 5, 4, 2, 32, torch.float32, device, rng)
    for index, wrong, message in (
        (0, inputs[0][..., :16], "queries must be"),
        (0, inputs[0][:, :3], "3 query heads cannot share 2 key heads"),
        (1, inputs[1][:34], "keys and values must be"),
        (2, inputs[2].transpose(0, 1).contiguous().transpose(0, 1), "contiguous"),
        (3, inputs[3][:34], r"cos and sin must be \(35 or more, 16\)"),
        (4, inputs[4][:, :8], r"cos and sin must be \(35 or more, 16\)"),
    ):
        changed = [*inputs[:index], wrong, *inputs[index + 1 :]]
        with pytest.raises(KernelInputError, match=message):
            question_attention(*changed, first_position=30, scale=1.0)
    for first_position in (31, -1):
        with pytest.raises(KernelInputError, match="rows are needed, got 35"):
            question_attention(*inputs, first_position=first_position, scale=1.0)
