"""What recorded decoding steps read: device copies of requests' tables at fixed places; and what records the steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ragkit.errors import GenerationError
from ragkit.generation.decode_state import DecodeState
from ragkit.kernels.backend import next_power_of_2
from ragkit.kernels.host_copy import to_device
from ragkit.kernels.paged_rows import entry_bases
from ragkit.kvcache.pool import KVPool
from ragkit.kvcache.request_field import RequestField
from ragkit.kvcache.rope import RotaryTable

if TYPE_CHECKING:
    from torch.cuda import _POOL_HANDLE

_LEAST_ENTRIES = 256  # blocks of one request that the smallest graph takes
_WARM_UP_STEPS = 2


def table_bucket(states: Sequence[DecodeState]) -> tuple[int, int, bool]:
    """Return the places, the entries and the fields of the smallest tables that hold these requests."""
    entries = max(len(state.kv.block_ids) for state in states)
    has_field = any(state.kv.field is not None for state in states)
    return next_power_of_2(len(states)), max(_LEAST_ENTRIES, next_power_of_2(entries)), has_field


class RequestTables:
    """Tables of up to `size` requests with up to `entries` blocks each, with or without fields.

    Args:
        pool: where the rows are.
        size, entries, has_field: what `table_bucket` gives.
        rotary: the first requests' table; later ones may not be longer.

    Attributes:
        bucket: size, entries and has_field.
        block_tables: (size, entries) int32.
        row_positions: (size, entries, block_size) int32.
        num_entries: (size,) int32; 0 at places that no request has.
        bases: (size, entries) int32, `entry_bases` of the row positions.
        cos, sin: (positions, head_dim / 2) fp32.
    """

    def __init__(self, pool: KVPool, size: int, entries: int, has_field: bool, rotary: RotaryTable) -> None:
        device = pool.device
        self._pool = pool
        self.bucket = (size, entries, has_field)
        self.block_tables = torch.zeros((size, entries), dtype=torch.int32, device=device)
        self.row_positions = torch.zeros((size, entries, pool.block_size), dtype=torch.int32, device=device)
        self.num_entries = torch.zeros(size, dtype=torch.int32, device=device)
        self.bases = torch.zeros((size, entries), dtype=torch.int32, device=device)
        # Those of all places behind each other.
        self._field = RequestField(pool, size * entries) if has_field else None
        self._rotary_source = rotary
        self.cos, self.sin = rotary.cos.clone(), rotary.sin.clone()
        self._owners: list[tuple[DecodeState, int] | None] = [None] * size

    @property
    def size(self) -> int:
        """Requests that have a place."""
        return len(self._owners)

    def fits(self, rotary: RotaryTable) -> bool:
        """Return whether the rotary buffers can hold the table."""
        return len(rotary.cos) <= len(self.cos)

    def load(self, states: Sequence[DecodeState]) -> None:
        """Copy what has changed since the last time, and free the places behind the requests.

        Raises:
            GenerationError: the requests turn by different tables.
        """
        self._use_rotary(states)
        for index, state in enumerate(states):
            owner = self._owners[index]
            if owner is None or owner[0] is not state or owner[1] != state.kv.version:
                self._load_table(index, state)
                if owner is None or owner[0] is not state:  # of one request it never changes
                    self._load_field(index, state.kv.field)
        for index in range(len(states), self.size):
            if self._owners[index] is not None:
                self._owners[index] = None
                self.num_entries[index] = 0

    def fields(self, layer: int) -> tuple[Tensor | None, Tensor | None]:
        """Return keys' and values' fields of a layer as paged attention takes them."""
        return (None, None) if self._field is None else self._field.of_requests(layer, self.size)

    def _load_table(self, index: int, state: DecodeState) -> None:
        entries = len(state.kv.block_ids)
        device = self._pool.device
        blocks = to_device(torch.tensor(state.kv.block_ids, dtype=torch.int32), device)
        self.block_tables[index, :entries] = blocks
        self.row_positions[index, :entries] = to_device(state.kv.row_positions, device)
        self.bases[index, :entries] = entry_bases(self.row_positions[index : index + 1, :entries])[0]
        self.num_entries[index] = entries
        self._owners[index] = (state, state.kv.version)

    def _load_field(self, index: int, field: RequestField | None) -> None:
        if self._field is None:
            return
        first, stop = index * self.block_tables.shape[1], (index + 1) * self.block_tables.shape[1]
        written = first if field is None else first + field.entries
        own = self._field.parts()
        if not own:
            return
        # All layers at once: one by one they are more than a hundred launches, for which the GPU stands still.
        if field is not None:
            torch._foreach_copy_([part[first:written] for part in own], field.parts())
        if written < stop:
            torch._foreach_zero_([part[written:stop] for part in own])

    def _use_rotary(self, states: Sequence[DecodeState]) -> None:
        rotary = states[0].rotary
        if any(state.rotary is not rotary for state in states):
            raise GenerationError("requests of one decoding step must share their rotary table")
        if rotary is not self._rotary_source:
            rows = len(rotary.cos)
            self.cos[:rows], self.sin[:rows] = rotary.cos, rotary.sin
            self._rotary_source = rotary


class TablesByBucket:
    """The tables of each bucket, made when it is first used. Passes that do not overlap share them.

    Tables of a long context are large, its field above all, and are filled anew for every other request.
    """

    def __init__(self, pool: KVPool) -> None:
        self._pool = pool
        self._made: dict[tuple[int, int, bool], RequestTables] = {}

    def of(self, states: Sequence[DecodeState]) -> RequestTables:
        """Return the tables that hold these requests; others than before where their rotary table is longer."""
        key, rotary = table_bucket(states), states[0].rotary
        tables = self._made.get(key)
        if tables is None or not tables.fits(rotary):
            tables = self._made[key] = RequestTables(self._pool, *key, rotary)
        return tables


class HostInputs:
    """Integers that a step takes from the host, in one copy, without waiting for the step before."""

    def __init__(self, shape: tuple[int, ...], device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        self.device = torch.zeros(shape, dtype=torch.int64, device=device)
        self._host = torch.zeros(shape, dtype=torch.int64, pin_memory=on_gpu)
        self._copied = torch.cuda.Event() if on_gpu else None

    def load(self, numbers: Tensor) -> None:
        """Copy `numbers` to the device."""
        if self._copied is not None:
            self._copied.synchronize()  # the copy of the step before may still be reading the host buffer
        self._host.copy_(numbers)
        self.device.copy_(self._host, non_blocking=True)
        if self._copied is not None:
            self._copied.record()


class GraphMemory:
    """Memory that several recorded passes take for what they compute, one at a time; made when the first is recorded.

    What a pass returns stays its own. The passes may not overlap: who runs them holds one lock for all.
    """

    def __init__(self) -> None:
        self._handle: _POOL_HANDLE | None = None

    @property
    def handle(self) -> _POOL_HANDLE:
        """What `torch.cuda.graph` takes as its pool."""
        if self._handle is None:
            self._handle = torch.cuda.graph_pool_handle()
        return self._handle


class RecordedForward:
    """A pass over fixed buffers: recorded as a CUDA graph, by `record` or the first run; launched plainly elsewhere.

    Args:
        forward: the pass; recording does it several times over.
        device: where it runs.
        memory: shared with other passes; None takes its own.
    """

    def __init__(self, forward: Callable[[], Tensor], device: torch.device, memory: GraphMemory | None = None) -> None:
        self._forward = forward
        self._device = device
        self._memory = memory
        self._graph: torch.cuda.CUDAGraph | None = None
        self._out = torch.empty(0)
        self.is_recorded = False

    def run(self) -> Tensor:
        """Return what the pass returns; the next run writes to the same place."""
        if not self.is_recorded:
            self.record()
        if self._graph is None:
            return self._forward()
        self._graph.replay()
        return self._out

    def record(self) -> None:
        """Record the pass, over whatever its buffers hold."""
        if self._device.type == "cuda":
            self._capture()
        self.is_recorded = True

    def _capture(self) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP_STEPS):  # compiles kernels and opens libraries, which a capture must not
                self._forward()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        pool = None if self._memory is None else self._memory.handle
        # Other threads' requests go on meanwhile.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            self._out = self._forward()
        self._graph = graph
