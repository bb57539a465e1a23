import pytest
import torch

from ragkit.generation.attention import causal_attention
from ragkit.generation.host_attention import (
    causal_host_attention,
    few_tokens_host_attention,
    one_token_host_attention,
    takes_few_tokens,
)


def _rows(tokens: int, heads: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((tokens, heads, 32), generator=generator).to(torch.bfloat16)


@pytest.mark.parametrize("scale", [0.2, 0.25])  # a power of two needs no rounding of scaled queries
@pytest.mark.parametrize(("tokens", "rows"), [(1, 1), (1, 70), (5, 64), (128, 128), (129, 300), (300, 300), (200, 777)])
def test_a_causal_pass_is_as_close_to_fp32_as_torch(tokens, rows, scale):
    queries, keys, values = _rows(tokens, 6, 0), _rows(rows, 2, 1), _rows(rows, 2, 2)
    expected = causal_attention(queries.float(), keys.float(), values.float(), scale)
    theirs = causal_attention(queries, keys, values, scale).float() - expected
    ours = causal_host_attention(queries, keys, values, scale).float() - expected
    # Twice rounded where the product is divided by the exponentials' sum: up to a unit of the last place, not half.
    assert float(ours.abs().max()) <= max(2 * float(theirs.abs().max()), 0.01)
    assert float(ours.norm()) <= max(1.1 * float(theirs.norm()), 0.004 * float(expected.norm()))


@pytest.mark.parametrize("factor", [0.0, 4.0, 40.0])
@pytest.mark.parametrize("common", [-90.0, -60.0, 0.0, 28.0, 60.0])
def test_scores_of_any_size_are_as_exact(common, factor):
    """Exponentials have no room for all of them: `common` is a part of every score, `factor` spreads them."""
    queries, keys, values = (factor * _rows(150, 6, 0)).contiguous(), _rows(400, 2, 1), _rows(400, 2, 2)
    queries[:, :, 0], keys[:, :, 0] = common, 4.0
    expected = causal_attention(queries.float(), keys.float(), values.float(), 0.25)
    ours = causal_host_attention(queries, keys, values, 0.25).float() - expected
    assert float(ours.norm()) <= 0.006 * float(expected.norm())


def test_one_token_sees_all_rows():
    queries, keys, values = _rows(1, 6, 0), _rows(90, 2, 1), _rows(90, 2, 2)
    expected = causal_attention(queries.float(), keys.float(), values.float(), 0.2)[0]
    got = one_token_host_attention(queries[0], keys.transpose(0, 1), values.transpose(0, 1), 0.2)
    torch.testing.assert_close(got.float(), expected, rtol=0, atol=0.01)


@pytest.mark.parametrize("scale", [0.2, 0.25])
@pytest.mark.parametrize(("tokens", "rows"), [(1, 64), (1, 90), (4, 128), (9, 2112)])
def test_a_few_tokens_behind_many_rows_are_as_close_to_fp32_as_torch(tokens, rows, scale):
    queries, keys, values = (_rows(count, heads, heads).transpose(0, 1) for count, heads in
                             ((3 * tokens, 2), (rows, 3), (rows, 4)))  # fmt: skip
    keys, values = keys[:2].contiguous(), values[:2].contiguous()
    seen = torch.rand((3 * tokens, 20), generator=torch.Generator().manual_seed(1)) < 0.5
    mask = torch.zeros(seen.shape).masked_fill_(~seen, -torch.inf)
    whole = torch.cat((torch.zeros((3 * tokens, rows - 20)), mask), dim=1)
    attend = torch.nn.functional.scaled_dot_product_attention
    expected = attend(queries.float()[None], keys.float()[None], values.float()[None], attn_mask=whole, scale=scale)[0]
    theirs = attend(queries[None], keys[None], values[None], attn_mask=whole.to(torch.bfloat16), scale=scale)[0]
    ours = few_tokens_host_attention(queries, keys, values, scale, seen.to(torch.bfloat16)).float() - expected
    # Shares are rounded before or after they are summed, which matters where they are few.
    assert float(ours.norm()) <= max(1.1 * float((theirs.float() - expected).norm()), 0.004 * float(expected.norm()))


def test_few_rows_and_other_numbers_are_left_to_torch():
    rows = torch.empty((2, 4096, 32), dtype=torch.bfloat16)
    assert takes_few_tokens(rows, 4096)
    assert not takes_few_tokens(rows, 4095)
    assert not takes_few_tokens(rows.float(), 4096)
