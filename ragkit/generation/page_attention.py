"""Attention over pages of a document: the first ones, those that a selector finds, the last ones, and one's own rows.

Keys are kept before RoPE, so pages can stand anywhere when they are attended to. Re-indexed they stand behind each
other in their order, as if nothing lay between them (LongHeads, arXiv 2402.10685; TokenSelect, arXiv 2411.02886);
clamped they all stand at one place, a local window before the first query (InfLLM, arXiv 2402.04617). With every page
chosen the re-indexed positions are the true ones, and this is full attention.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ragkit.config import PagePositions
from ragkit.generation.attention import causal_attention
from ragkit.generation.page_options import PageOptions
from ragkit.kvcache.kv_pages import KVPages, WindowRows
from ragkit.kvcache.page_selector import Election, Takes, best_pages
from ragkit.kvcache.rope import RotaryTable

_VOTERS = 8  # means of neighbouring queries that choose for a whole window
_MOST_VOTERS = 64  # up to here every query of a question votes


class PageRange(NamedTuple):
    """The pages that a pass may attend to: sinks up to `first`, candidates up to `stop`, local ones up to `end`."""

    first: int
    stop: int
    end: int


class PageAttention:
    """The `Attend` of passes over one document: of a window while it is read, or of a question and its answer.

    Rows of earlier passes of the same object stay and are attended to. Every pass chooses pages, unless it is told to
    keep those of the one before.

    Args:
        pages: the document.
        options: what is attended to.
        rotary: the rotary table, as long as the positions in use.
        scale: factor on the scores.
        num_tokens: tokens of the document that stand before, whole windows of it or all.
        keep_rows: whether to keep the rows of the pass in `rows`, for the document.

    Attributes:
        chosen: (groups, pages) int64 of each layer, the pages that its last choice found.
        rows: what the last pass gives for each layer.
        num_choices: how often a layer has chosen.
    """

    def __init__(
        self,
        pages: KVPages,
        options: PageOptions,
        rotary: RotaryTable,
        scale: float,
        num_tokens: int,
        *,
        keep_rows: bool = False,
    ) -> None:
        self._pages = pages
        self._options = options
        self._rotary = rotary
        self._scale = scale
        self._num_tokens = num_tokens
        self._keep_rows = keep_rows
        self._range = _page_range(num_tokens, options)
        candidates = self._range.stop - self._range.first
        scored = options.selector.takes is Takes.BEST and candidates > options.budget_pages
        self._summaries = pages.summaries(options.selector) if scored else None
        num_layers = pages.num_layers
        self.chosen: list[Tensor] = [torch.empty(0)] * num_layers
        self.rows: list[WindowRows] = []
        self._seen: list[_SeenRows | None] = [None] * num_layers
        self._choosers: list[Tensor | None] = [None] * num_layers  # the mean queries that made the choices
        self._chooses = True
        self.num_choices = 0

    def begin(self, *, choose: bool) -> None:
        """Begin a pass; `choose` says whether it chooses pages or keeps those of the pass before."""
        self._chooses = choose
        self.rows = []

    def __call__(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Return the attention output, as `Attend` says."""
        seen = self._seen[layer]
        if seen is None or (self._chooses and not self._stays(layer, queries)):
            self._choose(layer, queries)
            self._pages.prefetch((layer + 1) % self._pages.num_layers, self._listed(layer))
            seen = self._seen[layer] = self._gather(layer, seen)
        positions = seen.next_positions(len(keys))
        turned = self._rotary.rotate(queries, positions)
        seen.append(self._rotary.rotate(keys, positions), values)
        if not self._keep_rows:
            return _attend(turned, *seen.view(), self._scale)
        if self._pages.codec.with_received:
            out, received = attention_and_received(turned, *seen.view(), self._scale)
        else:
            out, received = _attend(turned, *seen.view(), self._scale), None
        self.rows.append(WindowRows(keys.clone(), values.clone(), received))
        self._seen[layer] = None  # of a window nobody asks again
        return out

    def _stays(self, layer: int, queries: Tensor) -> bool:
        """Return whether the queries are like those that made the layer's choice (TokenSelect's selection cache)."""
        if self._options.keep_similarity >= 1:
            return False
        mean, chooser = queries.float().mean(dim=0), self._choosers[layer]
        if chooser is not None:
            cosine = torch.nn.functional.cosine_similarity(mean.flatten(), chooser.flatten(), dim=0)
            if float(cosine) >= self._options.keep_similarity:
                return True
        self._choosers[layer] = mean
        return False

    def _choose(self, layer: int, queries: Tensor) -> None:
        options, (first, stop, _) = self._options, self._range
        if options.selector.takes is Takes.NOTHING:
            self.chosen[layer] = torch.empty((1, 0), dtype=torch.int64)
        elif self._summaries is None:
            self.chosen[layer] = torch.arange(first, stop).unsqueeze(0)
        elif layer % options.layer_interval:
            self.chosen[layer] = self.chosen[layer - 1]
        else:
            voters = _voters(queries, self._keep_rows)
            distance = torch.full((len(voters),), options.local_tokens, device=queries.device)
            turned = self._rotary.rotate(voters, distance)
            groups = self._pages.codec.layout.layers[layer].num_kv_heads if options.per_key_head else 1
            election = Election(options.vote, groups, self._scale)
            scores = options.selector.score(turned, self._summaries.of(layer), first, stop, election)
            self.chosen[layer] = best_pages(scores, first, options.budget_pages).cpu()
            self.num_choices += 1

    def _listed(self, layer: int) -> list[int]:
        """Return all pages that a layer attends to, ascending: those of all key heads together."""
        first, stop, end = self._range
        chosen = self.chosen[layer].unique().tolist()
        return [*range(first), *chosen, *range(stop, end)]

    def _gather(self, layer: int, before: _SeenRows | None) -> _SeenRows:
        """Return the rows of a layer's pages, turned to where they stand, and behind them the own rows of `before`."""
        pages = self._listed(layer)
        blocks = self._pages.bring(layer, pages)
        chosen = self.chosen[layer]
        pool = self._pages.cache.pool
        keys, values = pool.keys[layer], pool.values[layer]
        if len(chosen) == 1:
            at = blocks.to(pool.device)
            rows = keys[at].flatten(0, 1), values[at].flatten(0, 1)
        else:
            block_of = dict(zip(pages, blocks.tolist(), strict=True))
            at = torch.tensor([[block_of[page] for page in self._with_rest(own)] for own in chosen.tolist()])
            at = at.to(pool.device)
            heads = torch.arange(len(chosen), device=pool.device)
            # (heads, pages, page_size, head_dim), each head from its own pages
            rows = tuple(  # type: ignore[assignment]
                part.permute(2, 0, 1, 3)[heads.unsqueeze(1), at].flatten(1, 2).transpose(0, 1)
                for part in (keys, values)
            )
        count = self._rows_at_once(chosen.shape[1])
        positions, start = self._positions(layer, count)
        turned = self._turned(rows[0][:count], positions)
        seen = _SeenRows(turned, rows[1][:count], start)
        if before is not None:
            seen.append(*before.own())
        return seen

    def _with_rest(self, chosen: list[int]) -> list[int]:
        first, stop, end = self._range
        return [*range(first), *chosen, *range(stop, end)]

    def _rows_at_once(self, chosen: int) -> int:
        """Return how many rows hold tokens; only the last page can have some that do not."""
        first, stop, end = self._range
        return (first + chosen + end - stop) * self._pages.page_size - (-self._num_tokens % self._pages.page_size)

    def _positions(self, layer: int, count: int) -> tuple[Tensor, int]:
        """Return the positions of `count` rows, (rows,) or (kv_heads, rows), and that of the first own row."""
        options, size, stop = self._options, self._pages.page_size, self._range.stop
        if options.positions is PagePositions.TRUE:
            pages = torch.tensor([self._with_rest(own) for own in self.chosen[layer].tolist()], dtype=torch.int64)
            positions = (pages.unsqueeze(2) * size + torch.arange(size)).flatten(1)[:, :count]
            return (positions[0] if len(positions) == 1 else positions), self._num_tokens
        if options.positions is PagePositions.REINDEXED:
            return torch.arange(count), count
        local = self._num_tokens - stop * size
        start = options.local_tokens
        remote = torch.zeros(count - local, dtype=torch.int64)
        return torch.cat((remote, torch.arange(start - local, start))), start

    def _turned(self, keys: Tensor, positions: Tensor) -> Tensor:
        positions = positions.to(keys.device)
        if positions.dim() == 1:
            return self._rotary.rotate(keys, positions)
        heads = [self._rotary.rotate(keys[:, head : head + 1], at) for head, at in enumerate(positions)]
        return torch.cat(heads, dim=1)


class _SeenRows:
    """Keys, turned, and values that one layer attends to: those of pages, and behind them own ones, with room to grow.

    Args:
        keys, values: (rows, kv_heads, head_dim) of pages.
        start: position of the first own row.
    """

    def __init__(self, keys: Tensor, values: Tensor, start: int) -> None:
        self._keys, self._values = keys, values
        self._of_pages = self._length = len(keys)
        self._start = start

    def next_positions(self, tokens: int) -> Tensor:
        first = self._start + self._length - self._of_pages
        return torch.arange(first, first + tokens, device=self._keys.device)

    def append(self, keys: Tensor, values: Tensor) -> None:
        wanted = self._length + len(keys)
        if wanted > len(self._keys):
            room = max(wanted, self._length + 64)
            self._keys, self._values = (
                _grown(self._keys[: self._length], room),
                _grown(self._values[: self._length], room),
            )
        self._keys[self._length : wanted], self._values[self._length : wanted] = keys, values
        self._length = wanted

    def view(self) -> tuple[Tensor, Tensor]:
        return self._keys[: self._length], self._values[: self._length]

    def own(self) -> tuple[Tensor, Tensor]:
        return self._keys[self._of_pages : self._length], self._values[self._of_pages : self._length]


def attention_and_received(queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return what `causal_attention` returns, and (tokens, kv_heads) fp32: what the queries' own rows received.

    That is the mean weight over the query heads of a key head and over the queries that see the row.
    """
    tokens, rows, kv_heads = len(queries), len(keys), keys.shape[1]
    out = torch.empty_like(queries)
    received = queries.new_empty((tokens, kv_heads), dtype=torch.float32)
    hidden = torch.ones((tokens, tokens), dtype=torch.bool, device=queries.device).triu(1)
    seen_by = torch.arange(tokens, 0, -1, device=queries.device)
    for head, of_head in enumerate(queries.unflatten(1, (kv_heads, -1)).unbind(1)):
        group = of_head.shape[1]
        scores = torch.einsum("tgd,rd->gtr", of_head.float(), keys[:, head].float()) * scale
        scores[:, :, rows - tokens :].masked_fill_(hidden, float("-inf"))
        weights = scores.softmax(dim=-1)
        received[:, head] = weights[:, :, rows - tokens :].sum(dim=(0, 1)) / (group * seen_by)
        attended = torch.einsum("gtr,rd->tgd", weights, values[:, head].float())
        out[:, head * group : (head + 1) * group] = attended.to(out.dtype)
    return out, received


def _attend(queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    if len(queries) > 1:
        return causal_attention(queries, keys, values, scale)
    # The query heads of one key head stand as rows of one product: the keys are read once for all of them.
    grouped = queries[0].unflatten(0, (keys.shape[1], -1)).unsqueeze(0)
    stored, content = keys.transpose(0, 1).unsqueeze(0), values.transpose(0, 1).unsqueeze(0)
    attended = functional.scaled_dot_product_attention(grouped, stored, content, scale=scale)
    return attended[0].flatten(0, 1).unsqueeze(0)


def _page_range(num_tokens: int, options: PageOptions) -> PageRange:
    end = -(-num_tokens // options.page_size)
    first = min(options.sink_pages, end)
    return PageRange(first, max(first, end - options.local_pages), end)


def _voters(queries: Tensor, is_window: bool) -> Tensor:
    """Return the queries that choose: all of a short pass, else means of neighbours."""
    most = _VOTERS if is_window else _MOST_VOTERS
    if len(queries) <= most:
        return queries
    parts = torch.arange(len(queries), device=queries.device) * most // len(queries)
    means = queries.new_zeros((most, *queries.shape[1:]), dtype=torch.float32).index_add_(0, parts, queries.float())
    counts = torch.bincount(parts, minlength=most).view(-1, 1, 1)
    return (means / counts).to(queries.dtype)


def _grown(rows: Tensor, room: int) -> Tensor:
    grown = rows.new_empty((room, *rows.shape[1:]))
    grown[: len(rows)] = rows
    return grown
