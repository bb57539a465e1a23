"""Attention over pages of a document: the first ones, those that a selector finds, the last ones, and one's own rows.

Keys are kept before RoPE, so pages can stand anywhere when they are attended to. Re-indexed they stand behind each
other in their order, as if nothing lay between them (LongHeads, arXiv 2402.10685; TokenSelect, arXiv 2411.02886);
clamped they all stand at one place, a local window before the first query (InfLLM, arXiv 2402.04617). With every page
chosen the re-indexed positions are the true ones, and this is full attention.

How many rows a layer attends to is the same for every choice. So the rows of its pages, turned to where they stand, lie
in a buffer of fixed size, own rows behind them, and a choice replaces the rows of pages alone: steps that keep their
pages neither turn nor decode a row again. Where the whole document lies on the device, a choice and what follows from
it stay there, and the host waits for nothing.
"""

from __future__ import annotations

import threading
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ragkit.generation.host_attention import one_token_host_attention
from ragkit.generation.page_choices import PageChoices
from ragkit.generation.page_lists import MovingEnd, PageLayout
from ragkit.generation.page_options import PageOptions
from ragkit.generation.page_rows import page_source
from ragkit.kernels.backend import Backend, ceil_div, resolve_backend
from ragkit.kernels.gather_pages import PageLists
from ragkit.kernels.rope_write_kv import rope_write_kv
from ragkit.kernels.selected_attention import selected_attention
from ragkit.kernels.selected_pages_attention import MOST_PAIRS, selected_pages_attention
from ragkit.kvcache.kv_pages import KVPages
from ragkit.kvcache.page_window import WindowRows
from ragkit.kvcache.rope import RotaryTable
from ragkit.kvcache.window_writer import WindowWriter
from ragkit.types import KVUse

_ROW_BLOCK = 64  # rows of the buffer that attention of few queries takes as one page


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
        keep_rows: whether to keep the rows of the one pass in `rows`, for the document.
        writer: takes those rows layer by layer instead, and says how many pages there are before them, for a pass that
            a CUDA graph replays; `most_pages` are looked at then.

    Attributes:
        layout: which pages can be chosen, and where they stand.
        choices: which pages each layer attends to.
        rows: what the last pass gives for each layer.
        rotary: the rotary table.
        scale: factor on the scores.
        use: what was used of the document, and where it came from.
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
        writer: WindowWriter | None = None,
        most_pages: int = 0,
    ) -> None:
        self.layout = PageLayout.of(num_tokens, options)
        self._source = page_source(pages, self.layout, options, rotary)
        self._writer = writer
        moving = None if writer is None else MovingEnd(writer.end, most_pages)
        self.choices = PageChoices(
            pages, self.layout, options, rotary, scale, self._source, for_window=keep_rows, moving=moving
        )
        self.rows: list[WindowRows] = []
        self.rotary = rotary
        self.scale = scale
        self.use = KVUse()
        self._pages = pages
        self._options = options
        self._keep_rows = keep_rows
        self._device = pages.device
        self._rows_taken = ceil_div(self.layout.num_rows + own_tokens, _ROW_BLOCK) * _ROW_BLOCK
        self._seen: list[SeenRows | None] = [None] * pages.num_layers
        self._held: list[Tensor | None] = [None] * pages.num_layers  # the pages whose rows those are
        self._shared: SeenRows | None = None
        self._choosers: list[Tensor | None] = [None] * pages.num_layers  # the mean queries that made the choices
        self._unturned = torch.empty(0)  # where keys are written before they are turned; nobody reads it
        self._chooses = True
        self._done = 0
        self._own = self._positions = self._slots = self._last_rows = torch.empty(0, dtype=torch.int64)
        self._blocks = _BufferBlocks.of(self._rows_taken, rotary)

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
        self._positions = own + self.layout.start
        self._slots = own + self.layout.num_rows
        self._last_rows = self._slots.int()
        self._chooses = choose
        self.rows = []
        self.choices.move()
        if self._writer is not None:
            self._writer.begin()

    def __call__(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Return the attention output, as `Attend` says."""
        seen = self.find(layer, queries, keys)
        kept = None
        if self._writer is not None:
            self._writer.write(layer, keys, values)
        elif self._keep_rows:
            kept = keys.clone()
        rope_write_kv(
            queries, keys, values, self._positions, self._slots, self.rotary.cos, self.rotary.sin,
            self._unturned, seen.values.unsqueeze(0), rotate_keys=True,
        )  # fmt: skip
        seen.keys.index_copy_(0, self._slots, keys)
        if kept is None:
            return self._attend(queries, seen)
        # The rows of a window go to the document, and nobody asks behind them again.
        received = None
        if self._pages.codec.with_received:
            out, received = attention_and_received(queries, *self._view(seen), self.scale)
        else:
            out = self._attend(queries, seen)
        self.rows.append(WindowRows(kept, values, received))
        return out

    def find(self, layer: int, queries: Tensor, keys: Tensor) -> SeenRows:
        """Return the rows that a layer attends to, of other pages than before where the pass chooses.

        Args:
            layer: index of the layer.
            queries: those of the pass, not turned yet.
            keys: those of the pass, for their shape.

        Raises:
            KVCacheError: a page is damaged and cannot be computed again.
        """
        seen = self._seen[layer]
        if seen is None or (self._chooses and not self._stays(layer, queries)):
            seen = seen or self._room(keys)
            # Rows that an error leaves half replaced are of no choice: a pass that is done again chooses them again.
            chooser, self._choosers[layer] = self._choosers[layer], None
            before = self._pages.use()
            listed = self.choices.choose(layer, queries)
            count = self.layout.num_rows
            held, self._held[layer] = self._held[layer], None
            self._source.load(layer, listed, seen.keys[:count], seen.values[:count], held)
            self.use += self._pages.use(before)
            self._choosers[layer] = chooser
            if not self._keep_rows:
                self._seen[layer], self._held[layer] = seen, listed
        return seen

    def attend_turned(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Return the attention output where queries and keys are turned already and the layer's pages were found."""
        seen = self._seen[layer]
        assert seen is not None, "its pages were found"
        seen.keys.index_copy_(0, self._slots, keys)
        seen.values.index_copy_(0, self._slots, values)
        return self._attend(queries, seen)

    def _attend(self, queries: Tensor, seen: SeenRows) -> Tensor:
        if resolve_backend(queries) is Backend.TRITON:
            if len(queries) * queries.shape[1] // seen.keys.shape[1] <= MOST_PAIRS:
                keys, values = (part.unflatten(0, (-1, _ROW_BLOCK)) for part in seen)
                return selected_pages_attention(
                    queries, keys, values, self._blocks.lists, self._last_rows, self._blocks.cos, self._blocks.sin,
                    scale=self.scale,
                )  # fmt: skip
        elif len(queries) == 1:
            return _attend_one(queries, *self._view(seen), self.scale)
        return selected_attention(
            queries, seen.keys, seen.values, self._last_rows, scale=self.scale, seen_by_all=self.layout.num_rows
        )

    def _view(self, seen: SeenRows) -> tuple[Tensor, Tensor]:
        length = self.layout.num_rows + int(self._own[-1]) + 1
        return seen.keys[:length], seen.values[:length]

    def _room(self, rows: Tensor) -> SeenRows:
        """Return room for a layer's rows; while a window is read all layers take turns in the same."""
        if self._keep_rows and self._shared is not None:
            return self._shared
        shape = (self._rows_taken, *rows.shape[1:])
        if self._unturned.shape[1:] != shape:
            self._unturned = rows.new_empty((1, *shape))
        self._shared = SeenRows(rows.new_empty(shape), rows.new_empty(shape))
        return self._shared

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


class SeenRows(NamedTuple):
    """Keys, turned, and values (rows, kv_heads, head_dim) that one layer attends to: of pages, and behind them own."""

    keys: Tensor
    values: Tensor


class _BufferBlocks(NamedTuple):
    """The buffer as pages that stand where they are: for attention of few queries, split over them.

    Attributes:
        lists: all blocks of the buffer, in order.
        cos, sin: a turn by nothing: keys in the buffer are turned already.
    """

    lists: PageLists
    cos: Tensor
    sin: Tensor

    @classmethod
    def of(cls, rows: int, rotary: RotaryTable) -> _BufferBlocks:
        device, half = rotary.cos.device, rotary.cos.shape[1]
        blocks = torch.arange(rows // _ROW_BLOCK, dtype=torch.int32, device=device).unsqueeze(0)
        still = torch.full_like(blocks, -1)
        cos, sin = torch.ones((1, half), device=device), torch.zeros((1, half), device=device)
        return cls(PageLists(blocks, still), cos, sin)


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
    if queries.dtype == torch.bfloat16 and queries.device.type == "cpu":
        # Measured on one AMD core over 3,264 rows of 3 key heads that no cache holds: 0.6 ms, and 0.95 ms by SDPA.
        return one_token_host_attention(queries[0], keys.transpose(0, 1), values.transpose(0, 1), scale).unsqueeze(0)
    # The query heads of one key head stand as rows of one product: the keys are read once for all of them.
    grouped = queries[0].unflatten(0, (keys.shape[1], -1)).unsqueeze(0)
    stored, content = keys.transpose(0, 1).unsqueeze(0), values.transpose(0, 1).unsqueeze(0)
    attended = functional.scaled_dot_product_attention(grouped, stored, content, scale=scale)
    return attended[0].flatten(0, 1).unsqueeze(0)
