"""The policy of batches against a pool that only counts."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ragkit.errors import CacheCapacityError
from ragkit.generation.batch_entries import Entry, RequestEntry, SharedEntry, Stage
from ragkit.generation.batch_scheduler import BatchScheduler
from ragkit.generation.batch_step import BatchStep

BLOCK = 4


class CountedPool:
    """Blocks that are counted, each held by who allocated it and by all who list it."""

    others_wait = False

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.used = self.given_back = 0
        self._listed: dict[Entry, list[list[int]]] = {}

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // BLOCK)

    def wait(self) -> bool:
        return False

    def free(self, wanted: int) -> int:
        return self.capacity - self.used

    def open(self, entry: Entry, rows: int, parent: SharedEntry | None) -> None:
        assert entry not in self._listed
        self._listed[entry] = [*self._listed[parent]] if parent else []
        for part in self._listed[entry]:
            part[1] += 1
        self._listed[entry].append([0, 1])
        self.grow(entry, rows)

    def grow(self, entry: Entry, rows: int) -> None:
        own = self._listed[entry][-1]
        self.used += max(self.blocks_for(rows) - own[0], 0)
        own[0] = max(self.blocks_for(rows), own[0])
        assert self.used <= self.capacity, "more blocks were promised than there are"

    def give_back(self, entry: RequestEntry) -> bool:
        spare = max(self._listed[entry][-1][0] - self.blocks_for(entry.rows), 0)
        self._listed[entry][-1][0] -= spare
        self.used -= spare
        entry.blocks -= spare
        self.given_back += spare
        return spare > 0

    def release(self, entry: Entry) -> None:
        for part in self._listed.pop(entry):
            part[1] -= 1
            if not part[1]:
                self.used -= part[0]


class Simulation:
    """Runs a scheduler to the end, and checks every step."""

    def __init__(self, capacity: int, budget: int, max_running: int = 99, drafts: int | None = None) -> None:
        self.pool = CountedPool(capacity)
        self.drafts = None if drafts is None else random.Random(drafts)
        self.drafted = 0
        self.budget = budget
        self.scheduler = BatchScheduler(self.pool, budget, max_running)
        self.max_running = max_running
        self.computed = 0
        self.needed = 0
        self.ended: list[RequestEntry] = []
        self.refused: list[RequestEntry] = []
        self.steps: list[BatchStep] = []

    def run(self, entries: list[RequestEntry], most_steps: int = 5000) -> None:
        for entry in entries:
            try:
                self.scheduler.add(entry)
            except CacheCapacityError:
                self.refused.append(entry)
                entry.stage = Stage.ENDED
        while self.scheduler.num_waiting or self.scheduler.num_running:
            assert len(self.steps) < most_steps, "some request starves"
            for entry in self.scheduler.decoding:
                entry.wanted_rows = self.drafts.randrange(9) if self.drafts else 0
            self._step(self.scheduler.step())
        self.scheduler.step()
        self.scheduler.close()
        assert self.pool.used == 0

    def _step(self, step: BatchStep) -> None:
        self.steps.append(step)
        self.refused += step.refused
        assert step.tokens <= self.budget or (len(step.by_strategy) == 1 and not step.pieces)
        assert self.scheduler.num_running <= self.max_running
        assert step.decodes or step.pieces or step.by_strategy or step.refused
        for entry in step.started:
            shared = entry.parent if isinstance(entry, SharedEntry) else entry.beginning
            rows = entry.to_compute if isinstance(entry, SharedEntry) else entry.rows_at_start
            self.pool.open(entry, rows, shared)
        for entry in step.by_strategy:
            self.pool.open(entry, entry.rows, None)
            if entry.replayed:
                self.scheduler.prefilled_by_strategy(entry, self.pool.blocks_for(entry.rows))
            else:
                entry.blocks = self.pool.blocks_for(entry.rows)
                self._token(entry, first=True)
        assert not step.drafts or not (step.pieces or step.by_strategy or step.started)
        for entry in step.decodes:
            rows = step.drafts.get(entry, 0)
            assert rows <= min(entry.wanted_rows, entry.answer_tokens - entry.generated)
            self.drafted += rows
            self.pool.grow(entry, entry.rows + rows)
            assert self.pool.blocks_for(entry.rows + rows) <= entry.blocks
        for entry in step.decodes:
            stands = self.drafts.randrange(step.drafts[entry] + 1) if entry in step.drafts else 0
            self._token(entry, first=False, brought=1 + stands)
        for piece in step.pieces:
            assert piece.start < piece.stop
            self.computed += piece.stop - piece.start
            if piece.is_last and isinstance(piece.entry, RequestEntry):
                self._token(piece.entry, first=True)

    def _token(self, entry: RequestEntry, *, first: bool, brought: int = 1) -> None:
        if first:
            self.scheduler.started_answer(entry)
        else:
            entry.generated = min(entry.generated + brought, entry.answer_tokens)
        if entry.generated == entry.answer_tokens:
            self.scheduler.end(entry)
            self.ended.append(entry)


@st.composite
def workloads(draw):
    """Requests, some behind common beginnings, some of those behind another one."""
    shared: list[SharedEntry] = []
    for key in range(draw(st.integers(0, 4))):
        parent = draw(st.sampled_from([None, *shared]))
        shared.append(SharedEntry(key, draw(st.integers(1, 12)), parent))
    entries = []
    for key in range(draw(st.integers(1, 10))):
        beginning = draw(st.sampled_from([None, *shared]))
        entry = RequestEntry(key, draw(st.integers(1, 20)), draw(st.integers(1, 12)), beginning)
        if beginning is None and draw(st.booleans()):
            entry.cost = draw(st.integers(1, 20))
        entries.append(entry)
    return entries


@settings(max_examples=400, deadline=None)
@given(
    workloads(), st.integers(4, 40), st.integers(1, 30), st.integers(1, 6), st.one_of(st.none(), st.integers(0, 99))
)  # fmt: skip
def test_every_request_ends_within_budget_and_pool(entries, capacity, budget, max_running, drafts):
    simulation = Simulation(capacity, budget, max_running, drafts)
    simulation.run(entries)
    assert {*simulation.ended} | {*simulation.refused} == {*entries}
    assert len(simulation.ended) + len(simulation.refused) == len(entries)
    for entry in simulation.ended:
        assert entry.generated == entry.answer_tokens


@settings(max_examples=200, deadline=None)
@given(workloads(), st.integers(4, 40), st.integers(1, 30))
def test_what_is_computed_is_what_is_needed_and_what_was_given_up(entries, capacity, budget):
    entries = [entry for entry in entries if not entry.cost]
    simulation = Simulation(capacity, budget)
    simulation.run(entries)
    behind = set()
    for entry in simulation.ended:
        at = entry.beginning
        while at is not None:
            behind.add(at)
            at = at.parent
    if not simulation.refused:
        needed = sum(entry.prompt_tokens for entry in entries) + sum(one.length for one in behind)
        assert simulation.computed == needed + simulation.scheduler.repeated_tokens


@settings(max_examples=200, deadline=None)
@given(workloads(), st.integers(1, 30), st.one_of(st.none(), st.integers(0, 99)))
def test_nothing_is_computed_twice_while_there_is_room(entries, budget, drafts):
    simulation = Simulation(10_000, budget, drafts=drafts)
    simulation.run(entries)
    assert simulation.scheduler.repeated_tokens == simulation.scheduler.preemptions == 0


def test_running_answers_come_before_prefills_and_prefills_before_new_requests():
    simulation = Simulation(capacity=100, budget=10)
    entries = [RequestEntry(0, 4, 9), RequestEntry(1, 17, 1), RequestEntry(2, 3, 1)]
    simulation.run(entries)
    first, second, third = simulation.steps[:3]
    assert [(piece.entry.key, piece.start, piece.stop) for piece in first.pieces] == [(0, 0, 4), (1, 0, 6)]
    assert [entry.key for entry in second.decodes] == [0]
    assert [(piece.entry.key, piece.start, piece.stop) for piece in second.pieces] == [(1, 6, 15)]
    assert [(piece.entry.key, piece.start, piece.stop) for piece in third.pieces] == [(1, 15, 17), (2, 0, 3)]


def test_a_common_beginning_is_computed_once_and_listed_in_the_same_step():
    shared = SharedEntry(0, 8)
    entries = [RequestEntry(key, 2, 3, shared) for key in range(3)]
    simulation = Simulation(capacity=100, budget=50)
    simulation.run(entries)
    assert simulation.computed == 8 + 3 * 2
    assert [piece.entry for piece in simulation.steps[0].pieces] == [shared, *entries]


def test_the_youngest_request_gives_its_rows_up_and_goes_on_later():
    simulation = Simulation(capacity=6, budget=50)
    old, young = RequestEntry(0, 8, 12), RequestEntry(1, 7, 12)
    simulation.run([old, young])
    assert simulation.scheduler.preemptions == 1
    assert simulation.ended == [old, young]
    again = [piece for step in simulation.steps for piece in step.pieces if piece.entry is young]
    assert [(piece.start, piece.stop) for piece in again] == [(0, 7), (0, 7 + young.replayed)]
    assert young.replayed > 0


def test_a_request_larger_than_the_pool_is_refused_in_one_line():
    scheduler = BatchScheduler(CountedPool(4), 50, 9)
    with pytest.raises(
        CacheCapacityError, match="a prompt of 14 tokens with an answer of up to 9 takes 6 KV blocks"
    ) as e:
        scheduler.add(RequestEntry(0, 14, 9))
    assert "\n" not in str(e.value)


def test_a_prefill_that_goes_in_one_go_may_exceed_the_budget_only_alone():
    simulation = Simulation(capacity=100, budget=10)
    entries = [RequestEntry(0, 4, 2, cost=4), RequestEntry(1, 30, 1, cost=30), RequestEntry(2, 4, 1, cost=4)]
    simulation.run(entries)
    assert [[entry.key for entry in step.by_strategy] for step in simulation.steps[:3]] == [[0], [1], [2]]


def decoding(scheduler: BatchScheduler, *entries: RequestEntry) -> None:
    """Bring requests to where they decode."""
    for entry in entries:
        scheduler.add(entry)
    step = scheduler.step()
    assert step.started == [*entries]
    for entry in entries:
        scheduler._supply.open(entry, entry.rows_at_start, None)
        scheduler.started_answer(entry)


def test_drafts_take_what_the_budget_leaves_the_oldest_first():
    scheduler = BatchScheduler(CountedPool(100), 12, 9)
    one, two, three = (RequestEntry(key, 2, 40) for key in range(3))
    decoding(scheduler, one, two, three)
    one.wanted_rows, two.wanted_rows, three.wanted_rows = 5, 0, 7
    step = scheduler.step()
    assert step.drafts == {one: 5, three: 4}
    assert step.tokens == 12


def test_drafts_reach_no_further_than_the_answer():
    scheduler = BatchScheduler(CountedPool(100), 50, 9)
    entry = RequestEntry(0, 2, 4)
    decoding(scheduler, entry)
    entry.wanted_rows = 20
    assert scheduler.step().drafts == {entry: 3}


def test_drafts_get_no_blocks_while_somebody_waits_for_some():
    pool = CountedPool(4)
    scheduler = BatchScheduler(pool, 50, 9)
    running, waiting = RequestEntry(0, 4, 9), RequestEntry(1, 12, 4)
    decoding(scheduler, running)
    running.wanted_rows = 6
    assert scheduler.step().drafts == {running: 6}
    assert running.blocks == 3
    pool.grow(running, running.rows + 6)
    scheduler.add(waiting)
    assert scheduler.step().drafts == {running: 3}
    assert (running.blocks, pool.given_back) == (2, 1)


def test_blocks_of_drafts_are_taken_back_before_a_request_gives_way():
    pool = CountedPool(6)
    scheduler = BatchScheduler(pool, 50, 9)
    old, young = RequestEntry(0, 8, 12), RequestEntry(1, 3, 12)
    decoding(scheduler, old, young)
    young.wanted_rows = 8
    assert scheduler.step().drafts == {young: 8}
    pool.grow(young, young.rows + 8)
    assert pool.used == pool.capacity
    old.generated += 4
    young.wanted_rows = 0
    step = scheduler.step()
    assert step.decodes == [old, young]
    assert (scheduler.preemptions, pool.given_back) == (0, 2)
