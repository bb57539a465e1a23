"""Attention over pages of a document: the first ones, those that a selector finds, the last ones, and one's own rows.

Keys are kept before RoPE, so pages can stand anywhere when they are attended to. Re-indexed they stand behind each
other in their order, as if nothing lay between them (LongHeads, arXiv 2402.10685; TokenSelect, arXiv 2411.02886);
clamped they all stand at one place, a local window before the first query (InfLLM, arXiv 2402.04617). With every page
chosen the re-indexed positions are the true ones, and this is full attention.

A selector finds pages by what it keeps of them; of `found_times` as many as are wanted those stay whose keys the
queries would attend to most. How many rows a layer attends to is the same for every choice. So the rows of its pages,
turned to where they stand, lie in a buffer of fixed size, own rows behind them, and a choice replaces the rows of pages
alone. Where the whole document lies on the device, a choice and what follows from it stay there, and the host waits for
nothing.
"""

from __future__ import annotations

import threading
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ragkit.generation.page_lists import PageLayout
from ragkit.generation.page_options import PageOptions
from ragkit.kernels.gather_pages import PageLists, gather_pages
from ragkit.kernels.page_top_k import page_top_k
from ragkit.kernels.rope_write_kv import rope_write_kv
from ragkit.kernels.selected_attention import selected_attention
from ragkit.kvcache.kv_pages import KVPages
from ragkit.kvcache.page_scoring import head_products
from ragkit.kvcache.page_selector import Election, Takes, pool_votes
from ragkit.kvcache.page_window import WindowRows
from ragkit.kvcache.rope import RotaryTable

_VOTERS = 8  # means of neighbouring queries that choose for a whole window
_MOST_VOTERS = 64  # up to here every query of a question votes


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
        own_tokens: most tokens of all passes together.
        keep_rows: whether to keep the rows of the pass in `rows`, for the document.

    Attributes:
        layout: which pages can be chosen, and where they stand.
        chosen: (groups, pages) int64 of each layer, the pages that its last choice found.
        times_chosen: (pages of the document,) int64, how often each page was chosen.
        rows: what the last pass gives for each layer.
    """

    def __init__(
        self,
        pages: KVPages,
        options: PageOptions,
        rotary: RotaryTable,
        scale: float,
        num_tokens: int,
        own_tokens: int,
        *,
        keep_rows: bool = False,
    ) -> None:
        self.layout = PageLayout.of(num_tokens, options)
        self._pages = pages
        self._options = options
        self._rotary = rotary
        self._scale = scale
        self._own_tokens = own_tokens
        self._keep_rows = keep_rows
        self._device = pages.device
        is_scored = options.selector.takes is Takes.BEST and self.layout.num_chosen < self.layout.num_candidates
        self._summaries = pages.summaries(options.selector) if is_scored else None
        num_layers = pages.num_layers
        self.chosen: list[Tensor] = [torch.empty(0)] * num_layers
        self.times_chosen = torch.zeros(max(1, self.layout.end), dtype=torch.int64, device=self._device)
        self.rows: list[WindowRows] = []
        self._seen: list[_SeenRows | None] = [None] * num_layers
        self._choosers: list[Tensor | None] = [None] * num_layers  # the mean queries that made the choices
        self._unturned = torch.empty(0)  # where keys are written before they are turned; nobody reads it
        self._chooses = True
        self._done = 0
        self._own = torch.empty(0, dtype=torch.int64)

    @property
    def lock(self) -> threading.RLock:
        """What a pass holds, so that passes over one document take turns."""
        return self._pages.lock

    @property
    def stays_on_device(self) -> bool:
        """Whether a pass needs nothing of the host but to be launched."""
        return self._pages.resident is not None and self._options.keep_similarity >= 1

    def begin(self, tokens: int, *, choose: bool) -> None:
        """Begin a pass over the next `tokens` tokens.

        Args:
            tokens: its tokens.
            choose: whether it chooses pages or keeps those of the pass before.
        """
        self.begin_at(torch.arange(self._done, self._done + tokens, device=self._device), choose=choose)
        self._done += tokens

    def begin_at(self, own: Tensor, *, choose: bool) -> None:
        """Begin a pass whose tokens stand at `own` (tokens,) int64 among the own ones, known on the device alone."""
        self._own = own
        self._chooses = choose
        self.rows = []

    def __call__(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Return the attention output, as `Attend` says."""
        seen = self._seen[layer]
        if seen is None or (self._chooses and not self._stays(layer, queries)):
            seen = seen or self._room(keys)
            self._choose(layer, queries)
            self._load(seen, *self._page_rows(layer))
        kept = (keys.clone(), values.clone()) if self._keep_rows else None
        slots = self._own + self.layout.num_rows
        rope_write_kv(
            queries, keys, values, self._own + self.layout.start, slots, self._rotary.cos, self._rotary.sin,
            self._unturned, seen.values.unsqueeze(0), rotate_keys=True,
        )  # fmt: skip
        seen.keys.index_copy_(0, slots, keys)
        if kept is None:
            self._seen[layer] = seen
            return self._attend(queries, seen, slots)
        # The rows of a window go to the document, and nobody asks behind them again.
        if self._pages.codec.with_received:
            out, received = attention_and_received(queries, *self._view(seen), self._scale)
        else:
            out, received = self._attend(queries, seen, slots), None
        self.rows.append(WindowRows(*kept, received))
        return out

    def _attend(self, queries: Tensor, seen: _SeenRows, slots: Tensor) -> Tensor:
        if len(queries) == 1 and self._device.type == "cpu":
            return _attend_one(queries, *self._view(seen), self._scale)
        return selected_attention(queries, seen.keys, seen.values, slots.int(), scale=self._scale)

    def _view(self, seen: _SeenRows) -> tuple[Tensor, Tensor]:
        length = self.layout.num_rows + int(self._own[-1]) + 1
        return seen.keys[:length], seen.values[:length]

    def _room(self, rows: Tensor) -> _SeenRows:
        shape = (self.layout.num_rows + self._own_tokens, *rows.shape[1:])
        if self._unturned.shape[1:] != shape:
            self._unturned = rows.new_empty((1, *shape))
        return _SeenRows(rows.new_empty(shape), rows.new_empty(shape))

    def _load(self, seen: _SeenRows, keys: Tensor, values: Tensor) -> None:
        count = self.layout.num_rows
        seen.keys[:count], seen.values[:count] = keys[:count], values[:count]

    def _stays(self, layer: int, queries: Tensor) -> bool:
        """Return whether the queries are like those that made the layer's choice (TokenSelect's selection cache)."""
        if self._options.keep_similarity >= 1:
            return False
        mean, chooser = queries.float().mean(dim=0), self._choosers[layer]
        if chooser is not None:
            cosine = functional.cosine_similarity(mean.flatten(), chooser.flatten(), dim=0)
            if float(cosine) >= self._options.keep_similarity:
                return True
        self._choosers[layer] = mean
        return False

    def _choose(self, layer: int, queries: Tensor) -> None:
        options, layout = self._options, self.layout
        if self._summaries is None:
            pages = torch.arange(layout.first, layout.first + layout.num_chosen, device=self._device)
            self.chosen[layer] = pages.unsqueeze(0)
        elif layer % options.layer_interval:
            self.chosen[layer] = self.chosen[layer - 1]
            return
        else:
            turned = self._turned_alike(_voters(queries, self._keep_rows))
            groups = self._pages.codec.layout.layers[layer].num_kv_heads if options.per_key_head else 1
            election = Election(options.vote, groups, self._scale)
            # Sinks and the local window are scored as well, although they need not be chosen: a head that looks there
            # gives little of its weight to others, and so has little say among them.
            scores = options.selector.score(turned, self._summaries.of(layer), 0, layout.end, election)
            best, _ = page_top_k(scores[:, layout.first : layout.stop].contiguous(), layout.num_found)
            found = best.long() + layout.first
            is_enough = layout.num_found == layout.num_chosen
            self.chosen[layer] = found if is_enough else self._best_of(layer, turned, found, election)
        flat = self.chosen[layer].flatten()
        self.times_chosen.index_add_(0, flat, torch.ones_like(flat))

    def _best_of(self, layer: int, turned: Tensor, found: Tensor, election: Election) -> Tensor:
        """Return (groups, num_chosen) int64: those of the pages `found` that the voters would attend to most."""
        layout = self.layout
        keys = self._keys(layer, layout.listed(found))
        products = head_products(turned, keys) * self._scale
        logits = products.view(*products.shape[:2], -1, layout.page_size).logsumexp(dim=3)
        scores = pool_votes(logits, election)[:, layout.first : layout.first + layout.num_found]
        best, _ = page_top_k(scores.contiguous(), layout.num_chosen)
        return found.gather(1, best.long())

    def _keys(self, layer: int, listed: Tensor) -> Tensor:
        """Return the keys (rows, kv_heads, head_dim) of pages, as if all stood at position 0."""
        if self._pages.resident is None:
            return _rows_of(self._pages.cache.pool.keys[layer], self._blocks(layer, listed))
        everywhere = PageLists(listed.int(), torch.full_like(listed[:1], -1, dtype=torch.int32))
        keys, values = self._pages.resident.blocks(layer)
        cos, sin = self._rotary.cos, self._rotary.sin
        return gather_pages(keys, values, everywhere, cos, sin, dtype=self._pages.codec.layout.dtype)[0]

    def _turned_alike(self, queries: Tensor) -> Tensor:
        """Return the queries as they stand while pages are scored, all at one distance."""
        at = self._options.score_distance
        cos, sin = (part[at].to(queries.dtype) for part in (self._rotary.cos, self._rotary.sin))
        first, second = queries.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

    def _page_rows(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return the rows of a layer's pages (rows, kv_heads, head_dim), keys turned to where they stand."""
        listed = self.layout.listed(self.chosen[layer])
        if self._pages.resident is None:
            return self._brought(layer, listed)
        lists = PageLists(listed.int(), self.layout.page_positions(listed, self._options).int())
        keys, values = self._pages.resident.blocks(layer)
        cos, sin = self._rotary.cos, self._rotary.sin
        return gather_pages(keys, values, lists, cos, sin, dtype=self._pages.codec.layout.dtype)

    def _brought(self, layer: int, listed: Tensor) -> tuple[Tensor, Tensor]:
        """Do what `_page_rows` does with pages of the cache, brought where they are missing."""
        at, pool = self._blocks(layer, listed), self._pages.cache.pool
        keys, values = (_rows_of(part[layer], at) for part in (pool.keys, pool.values))
        positions = self.layout.row_positions(listed, self._options)
        if len(positions) == 1:
            return self._rotary.rotate(keys, positions[0]), values
        heads = [self._rotary.rotate(keys[:, head : head + 1], own) for head, own in enumerate(positions)]
        return torch.cat(heads, dim=1), values

    def _blocks(self, layer: int, listed: Tensor) -> Tensor:
        """Return (groups, listed) int64, the cache's blocks of pages, brought where they are missing."""
        wanted = listed.unique().tolist()
        block_of = torch.zeros(max(1, self.layout.end), dtype=torch.int64)
        block_of[wanted] = self._pages.bring(layer, wanted)
        self._pages.prefetch((layer + 1) % self._pages.num_layers, wanted)
        return block_of[listed.cpu()].to(self._device)


class _SeenRows(NamedTuple):
    """Keys, turned, and values (rows, kv_heads, head_dim) that one layer attends to: of pages, and behind them own."""

    keys: Tensor
    values: Tensor


def attention_and_received(queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return causal attention of queries that are the last rows, and what these rows received of it.

    The latter is (tokens, kv_heads) fp32: the mean weight over the query heads of a key head and over the queries that
    see the row.
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


def _attend_one(queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    # The query heads of one key head stand as rows of one product: the keys are read once for all of them.
    grouped = queries[0].unflatten(0, (keys.shape[1], -1)).unsqueeze(0)
    stored, content = keys.transpose(0, 1).unsqueeze(0), values.transpose(0, 1).unsqueeze(0)
    attended = functional.scaled_dot_product_attention(grouped, stored, content, scale=scale)
    return attended[0].flatten(0, 1).unsqueeze(0)


def _rows_of(blocks: Tensor, at: Tensor) -> Tensor:
    """Return (rows, kv_heads, head_dim): the rows of the blocks `at` (groups, listed), each group of heads its own."""
    if len(at) == 1:
        return blocks[at[0]].flatten(0, 1)
    heads = torch.arange(len(at), device=at.device)
    return blocks.permute(2, 0, 1, 3)[heads.unsqueeze(1), at].flatten(1, 2).transpose(0, 1)


def _voters(queries: Tensor, is_window: bool) -> Tensor:
    """Return the queries that choose: all of a short pass, else means of neighbours."""
    most = _VOTERS if is_window else _MOST_VOTERS
    if len(queries) <= most:
        return queries
    parts = torch.arange(len(queries), device=queries.device) * most // len(queries)
    means = queries.new_zeros((most, *queries.shape[1:]), dtype=torch.float32).index_add_(0, parts, queries.float())
    counts = torch.zeros(most, device=queries.device).index_add_(
        0, parts, torch.ones(len(queries), device=parts.device)
    )
    return (means / counts.view(-1, 1, 1)).to(queries.dtype)
