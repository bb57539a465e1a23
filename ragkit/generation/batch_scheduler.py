"""Which tokens the next step of a batch computes: policy alone, without a tensor.

Sarathi-Serve (OSDI 2024): a step has a token budget. Every running answer gets its token first; then prefills that have
begun go on; then requests that wait are let in, whose prefills take what is left, in pieces. So answers never stall
behind a long prompt, and the device has a full pass whatever the lengths are. How many run is bounded by the blocks of
the KV pool (BatchLLM's memory-centric batching). When answers outgrow the pool, the request that was let in last gives
its rows up and waits again, at the head; the older ones go on, so that every request ends.

Where every running request decodes and nothing else is to do, what is left of the budget goes to drafts, whose rows lie
behind those of the answers. They only ever take what nobody else wants, and give it back before anybody gives way.
"""

from __future__ import annotations

from collections import deque
from itertools import islice

from ragkit.errors import CacheCapacityError
from ragkit.generation.batch_entries import Entry, RequestEntry, SharedEntry, Stage, beginnings
from ragkit.generation.batch_step import BatchStep, Piece
from ragkit.generation.block_supply import BlockSupply


class BatchScheduler:
    """Plans one step after the other.

    Args:
        supply: the pool.
        token_budget: most tokens of a step; only a strategy's prefill may take more, where it has the step's prefills
            for itself.
        max_running: most requests at a time.

    Attributes:
        preemptions: requests that had to give their rows up.
        repeated_tokens: tokens that were computed again because of that.
    """

    def __init__(self, supply: BlockSupply, token_budget: int, max_running: int) -> None:
        self.preemptions = 0
        self.repeated_tokens = 0
        self._supply = supply
        self._budget = token_budget
        self._max_running = min(max_running, token_budget)
        self._waiting: deque[RequestEntry] = deque()
        self._running: list[RequestEntry] = []  # as they were let in
        self._prefilling: list[Entry] = []  # begun and not done, as they were begun
        self._held: list[SharedEntry] = []
        self._promised = 0  # blocks of this step that are not allocated yet
        self._lacks_room = False  # whether somebody waits for blocks

    @property
    def num_waiting(self) -> int:
        """Requests that are not running."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Requests that are running."""
        return len(self._running)

    @property
    def is_full(self) -> bool:
        """Whether no request will be let in before one ends: none waits, or as many run as may."""
        return not self._waiting or len(self._running) >= self._max_running

    @property
    def decoding(self) -> list[RequestEntry]:
        """Requests that decode, as they were let in."""
        return [entry for entry in self._running if entry.stage is Stage.DECODE]

    def coming(self, count: int) -> list[RequestEntry]:
        """Return the first `count` requests that wait, as they will be let in."""
        return list(islice(self._waiting, count))

    def add(self, entry: RequestEntry) -> None:
        """Let a request wait behind the others. What it shares is counted on from now on.

        Raises:
            CacheCapacityError: it would not even fit alone.
        """
        path = beginnings(entry)
        blocks_for, capacity = self._supply.blocks_for, self._supply.capacity
        own = max(blocks_for(entry.prompt_tokens + entry.answer_tokens), entry.strategy_blocks)
        if own + sum(blocks_for(one.length) for one in path) > capacity:
            tokens = sum(one.length for one in path) + entry.prompt_tokens
            raise CacheCapacityError(
                f"a prompt of {tokens} tokens with an answer of up to {entry.answer_tokens} takes {own} KV blocks, and "
                f"the pool has {capacity} for a batch: shorten either, or enlarge the pool"
            )
        self._waiting.append(entry)
        _await(entry.beginning)

    def step(self) -> BatchStep:
        """Return what the next step computes; the caller computes all of it before it asks again."""
        self._promised = 0
        self._lacks_room = False
        self._let_go()
        step = BatchStep()
        budget = self._budget - self._plan_decodes(step)
        for entry in list(self._prefilling):
            if budget and _is_ready(entry):
                budget -= self._plan_piece(step, entry, budget)
        self._admit(step, budget)
        if budget and not (step.pieces or step.by_strategy or step.started):
            self._plan_drafts(step, budget)
        if not self._running and self._waiting and not self._wait():  # there is no room, and nobody could make any
            refused = self._waiting.popleft()
            refused.stage = Stage.ENDED
            _await_no_more(refused.beginning)
            step.refused.append(refused)
        return step

    def started_answer(self, entry: RequestEntry, blocks: int | None = None) -> None:
        """Note that the prefill of a request is done and gave a token.

        Args:
            entry: the request.
            blocks: how many its strategy really took.
        """
        entry.generated += 1
        entry.stage = Stage.DECODE
        if blocks is not None:
            entry.blocks = blocks

    def prefilled_by_strategy(self, entry: RequestEntry, blocks: int) -> None:
        """Note that a strategy is done with the prompt of a request whose answer so far has to be computed again."""
        entry.computed = entry.prompt_tokens
        entry.blocks = blocks
        self._prefilling.append(entry)

    def end(self, entry: RequestEntry) -> None:
        """Note that a request is over, however it ended; its rows are given up."""
        self._running.remove(entry)
        if entry in self._prefilling:
            self._prefilling.remove(entry)
        entry.stage = Stage.ENDED
        self._supply.release(entry)
        self._detach(entry)

    def preempt(self, entry: RequestEntry) -> None:
        """Have a request give its rows up and wait at the head."""
        self.preemptions += 1
        self.repeated_tokens += entry.computed - entry.replayed
        self._running.remove(entry)
        if entry in self._prefilling:
            self._prefilling.remove(entry)
        self._supply.release(entry)
        self._detach(entry)
        entry.blocks = entry.computed = entry.replayed = entry.wanted_rows = 0
        entry.stage = Stage.WAITING
        self._waiting.appendleft(entry)
        _await(entry.beginning)

    def give_up(self, one: SharedEntry) -> None:
        """Note that a beginning that was to start found no room after all; nobody may list it now."""
        self._release_shared(one)

    def close(self) -> None:
        """Give all rows up."""
        for entry in [*self._running]:
            self.end(entry)
        for shared in self._held[::-1]:
            self._release_shared(shared)
        self._waiting.clear()

    def _plan_decodes(self, step: BatchStep) -> int:
        for entry in list(self._running):
            if entry.stage is not Stage.DECODE:  # or has given way to an older one in this very step
                continue
            missing = self._supply.blocks_for(entry.rows) - entry.blocks
            while missing > 0 and not self._take(missing):
                if self._take_back() or self._drop_idle(()) or self._preempt_younger(entry):
                    continue
                self.preempt(entry)
                break
            else:
                entry.blocks += max(missing, 0)
                step.decodes.append(entry)
        return len(step.decodes)

    def _plan_drafts(self, step: BatchStep, budget: int) -> None:
        """Give drafts what is left, the oldest first; no blocks where somebody waits for some."""
        blocks_for = self._supply.blocks_for
        may_grow = not self._lacks_room and not self._supply.others_wait
        for entry in step.decodes:
            # With them it has no more rows than its whole answer, which it was let in for.
            rows = min(entry.wanted_rows, entry.answer_tokens - entry.generated, budget)
            missing = blocks_for(entry.rows + max(rows, 0)) - entry.blocks
            if missing > 0 and may_grow and self._take(missing):
                entry.blocks += missing
            while rows > 0 and blocks_for(entry.rows + rows) > entry.blocks:
                rows -= 1
            if rows > 0:
                step.drafts[entry] = rows
                budget -= rows

    def _take_back(self) -> bool:
        """Take back what some request has for its drafts alone, the youngest first; return whether there was any."""
        return any(self._supply.give_back(entry) for entry in self.decoding[::-1])

    def _plan_piece(self, step: BatchStep, entry: Entry, budget: int) -> int:
        count = min(entry.to_compute - entry.computed, budget)
        step.pieces.append(Piece(entry, entry.computed, entry.computed + count))
        entry.computed += count
        if entry.computed == entry.to_compute:
            self._prefilling.remove(entry)
        return count

    def _wait(self) -> bool:
        """Wait for others, who may be waiting for what nobody uses here; return whether it is worth another try."""
        while self._drop_idle(()):
            pass
        return self._supply.wait()

    def _admit(self, step: BatchStep, budget: int) -> None:
        if self._waiting and self._supply.others_wait:
            return
        while budget > 0 and self._waiting and len(self._running) < self._max_running:
            entry = self._waiting[0]
            if entry.cost > budget and (step.pieces or step.by_strategy):
                return
            missing = _missing(entry)
            if not self._make_room(entry, missing):
                self._lacks_room = True
                return
            self._waiting.popleft()
            self._running.append(entry)
            entry.stage = Stage.PREFILL
            entry.replayed = entry.generated
            self.repeated_tokens += entry.replayed
            if entry.cost:
                step.by_strategy.append(entry)
                budget -= entry.cost
                continue
            starting: list[Entry] = [*missing, entry]
            for one in starting:
                step.started.append(one)
                self._prefilling.append(one)
                if budget and _is_ready(one):
                    budget -= self._plan_piece(step, one, budget)

    def _make_room(self, entry: RequestEntry, missing: list[SharedEntry]) -> bool:
        """Promise the blocks that a request and what it lists need; those of idle beginnings go for them."""
        blocks_for = self._supply.blocks_for
        own = max(blocks_for(entry.rows_at_start), entry.strategy_blocks)
        shared = sum(blocks_for(one.length) for one in missing)
        # Answers that are running will want to grow: a block for each, or the newcomer is sent away again.
        spare = len(self._running)
        path = beginnings(entry)
        while not self._take(own + shared, spare):
            if not (self._take_back() or self._drop_idle(path)):
                return False
        entry.blocks = own
        for one in missing:
            one.is_held = True
            self.repeated_tokens += one.given_up
            self._held.append(one)
            _list(one.parent)
        _list(entry.beginning)
        return True

    def _take(self, count: int, spare: int = 0) -> bool:
        wanted = self._promised + count + spare
        if self._supply.free(wanted) < wanted:
            return False
        self._promised += count
        return True

    def _preempt_younger(self, entry: RequestEntry) -> bool:
        youngest = self._running[-1]
        if youngest is entry:
            return False
        self.preempt(youngest)
        return True

    def _drop_idle(self, kept: list[SharedEntry] | tuple[()]) -> bool:
        """Give up the beginning that is needed last among those that nobody lists now; it is computed again then."""
        idle = [one for one in self._held if not one.users and one not in kept]
        if not idle:
            return False
        last = max(idle, key=lambda one: one.key)
        self._release_shared(last)
        return True

    def _let_go(self) -> None:
        """Give up the beginnings that nobody will list any more; who lists them holds their blocks on."""
        for one in [*self._held]:
            if not one.awaited and one.computed == one.length:
                self._release_shared(one)

    def _release_shared(self, one: SharedEntry) -> None:
        self._held.remove(one)
        if one in self._prefilling:
            self._prefilling.remove(one)
        self._supply.release(one)
        one.is_held, one.computed, one.given_up = False, 0, one.computed
        if one.parent is not None:
            one.parent.users -= 1
            if one.awaited:
                _await(one.parent)

    def _detach(self, entry: RequestEntry) -> None:
        if entry.beginning is not None:
            entry.beginning.users -= 1


def _missing(entry: RequestEntry) -> list[SharedEntry]:
    """Return the beginnings that have to be computed for a request, the first one first."""
    found: list[SharedEntry] = []
    at = entry.beginning
    while at is not None and not at.is_held:  # who is held holds the blocks of all before it
        found.append(at)
        at = at.parent
    return found[::-1]


def _is_ready(entry: Entry) -> bool:
    """Return whether the rows that an entry lists are written; a beginning that was let go was."""
    return all(one.computed == one.length for one in beginnings(entry) if one.is_held)


def _await(one: SharedEntry | None) -> None:
    """Note that somebody will list a beginning; while it is not there, it will list its parent itself."""
    if one is None:
        return
    one.awaited += 1
    if one.awaited == 1 and not one.is_held:
        _await(one.parent)


def _await_no_more(one: SharedEntry | None) -> None:
    if one is None:
        return
    one.awaited -= 1
    if not one.awaited and not one.is_held:
        _await_no_more(one.parent)


def _list(one: SharedEntry | None) -> None:
    """Note that somebody lists a beginning that is held."""
    if one is not None:
        one.awaited -= 1
        one.users += 1
