import pytest
import torch

from ragkit.generation.attention import causal_attention
from ragkit.generation.host_attention import causal_host_attention, one_token_host_attention


def _rows(tokens: int, heads: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((tokens, heads, 32), generator=generator).to(torch.bfloat16)


@pytest.mark.parametrize(("tokens", "rows"), [(1, 1), (1, 70), (5, 64), (128, 128), (129, 300), (300, 300), (200, 777)])
def test_a_causal_pass_is_as_close_to_fp32_as_torch(tokens, rows):
    queries, keys, values = _rows(tokens, 6, 0), _rows(rows, 2, 1), _rows(rows, 2, 2)
    expected = causal_attention(queries.float(), keys.float(), values.float(), 0.2)
    theirs = causal_attention(queries, keys, values, 0.2).float() - expected
    ours = causal_host_attention(queries, keys, values, 0.2).float() - expected
    assert float(ours.abs().max()) <= max(1.5 * float(theirs.abs().max()), 0.01)
    assert float(ours.norm()) <= max(1.1 * float(theirs.norm()), 0.004 * float(expected.norm()))


def test_one_token_sees_all_rows():
    queries, keys, values = _rows(1, 6, 0), _rows(90, 2, 1), _rows(90, 2, 2)
    expected = causal_attention(queries.float(), keys.float(), values.float(), 0.2)[0]
    got = one_token_host_attention(queries[0], keys.transpose(0, 1), values.transpose(0, 1), 0.2)
    torch.testing.assert_close(got.float(), expected, rtol=0, atol=0.01)
