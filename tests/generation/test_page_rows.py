"""The rows of pages in the buffer that attention reads: a choice brings those alone that stand where others stood."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from ragkit.config import PagePositions
from ragkit.errors import KVCacheError
from ragkit.generation.page_attention import _attend_one
from ragkit.generation.page_rows import CachedRows, _log_sums
from ragkit.generation.rotary_cache import RotaryCache

from .conftest import decoder_of, hf_model
from .test_paged_prefill import QUESTION, SMALL, TOKENS, read


@pytest.fixture(scope="module")
def llama():
    return decoder_of(hf_model("llama"))


def rows_like(attend):
    return torch.full((2, attend.layout.num_rows, 2, 8), torch.nan).unbind()


@pytest.mark.parametrize("positions", PagePositions)
@pytest.mark.parametrize("groups", [1, 2])
def test_rows_brought_where_others_stood_are_those_of_the_whole_list(llama, positions, groups, monkeypatch):
    options = replace(SMALL, positions=positions)
    pages, prefill = read(llama, TOKENS[:190])  # its last page holds 6 tokens
    layout = prefill.attention(pages, 20).layout
    source = CachedRows(pages, layout, options, RotaryCache(llama).table(256, 256))
    lists = [layout.listed(torch.tensor(chosen[:groups])).int() for chosen in (
        [[3, 8, 20], [2, 8, 19]], [[3, 9, 20], [2, 8, 20]], [[8, 9, 10], [3, 8, 20]],
    )]  # fmt: skip
    keys, values = rows_like(prefill.attention(pages, 20))
    turned = []
    rotate = type(source._rotary).rotate
    monkeypatch.setattr(
        type(source._rotary), "rotate", lambda self, heads, at: turned.append(len(at)) or rotate(self, heads, at)
    )
    before = None
    for listed in lists:
        turned.clear()
        source.load(1, listed, keys, values, before)
        if before is not None:
            changed = int((listed != before).any(dim=0).sum())
            assert turned[0] == 8 * changed < layout.num_rows
        whole = rows_like(prefill.attention(pages, 20))
        source.load(1, listed, *whole)
        assert torch.equal(keys, whole[0])
        assert torch.equal(values, whole[1])
        before = listed


def test_rows_that_could_not_be_brought_are_brought_anew(llama, monkeypatch):
    pages, prefill = read(llama, TOKENS[:300])
    attend = prefill.attention(pages, 20)
    with torch.inference_mode():
        attend.begin(len(QUESTION), choose=True)
        llama.run(QUESTION, attend)
        load, lists = CachedRows.load, []

        def failing(self, layer, listed, keys, values, before=None):
            lists.append(before)
            if len(lists) == 1:
                keys.fill_(torch.nan)
                raise KVCacheError("a page is gone")
            load(self, layer, listed, keys, values, before)

        monkeypatch.setattr(CachedRows, "load", failing)
        own = torch.tensor([len(QUESTION)])
        attend.begin_at(own, choose=True)
        with pytest.raises(KVCacheError):
            llama.run([5], attend)
        attend.begin_at(own, choose=True)
        logits = llama.logits(llama.run([5], attend))
    assert [one is None for one in lists] == [False, True, False, False]
    assert bool(logits.isfinite().all())


@pytest.mark.parametrize("spread", [0.1, 3.0, 40.0, 400.0])
def test_sums_of_exponentials_are_those_of_torch_also_where_most_vanish(spread):
    logits = spread * torch.randn((3, 6, 20, 64), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(_log_sums(logits), logits.logsumexp(dim=3), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rows", [1, 70, 700])
def test_one_query_in_bf16_attends_as_nearly_as_by_torch(rows):
    drawn = torch.Generator().manual_seed(2)
    queries, keys, values = (
        torch.randn((count, heads, 64), generator=drawn).bfloat16() for count, heads in ((1, 6), (rows, 2), (rows, 2))
    )
    exact = _attend_one(queries.double(), keys.double(), values.double(), 0.125)
    heads = (part.transpose(0, 1).unsqueeze(0) for part in (queries, keys, values))
    theirs = scaled_dot_product_attention(*heads, scale=0.125, enable_gqa=True)[0].transpose(0, 1)
    mine = _attend_one(queries, keys, values, 0.125)
    assert mine.shape == queries.shape
    assert mine.dtype == torch.bfloat16
    norm = float(exact.norm())
    assert float((mine - exact).norm()) / norm < 1.5 * float((theirs - exact).norm()) / norm + 1e-3 < 0.01
