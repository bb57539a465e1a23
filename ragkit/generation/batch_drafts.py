"""Drafting in a batch: what requests would have verified in the next step, and what a pass over all of them brought."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ragkit.generation.batch_job import BatchJob
from ragkit.generation.batch_runner import BatchRunner
from ragkit.generation.batch_stats import BatchStats
from ragkit.generation.draft_choice import nodes_worth_probing, nodes_worth_verifying
from ragkit.generation.draft_costs import Costs
from ragkit.generation.draft_tree import DraftTree
from ragkit.generation.drafter import DraftBudget
from ragkit.generation.engine import Engine
from ragkit.generation.speculative_decode import FAILURES, SpeculativeRequest
from ragkit.kernels.backend import next_power_of_2

# Tokens of one pass at most, those that decode included: each takes a row of logits, and a graph keeps room for them.
_MOST_ROWS = 512
_PROBES = 0.01  # of all passes that drafts may cost which are not trusted
_MOST_ALLOWED, _MOST_EARNED = 1.0, 0.5  # plain passes that these may cost at once, and of those what drafts earned


class BatchCosts:
    """What passes cost, as `costs` knows it; a request notes nothing: its batch does, once for all of a pass.

    Args:
        costs: those of the engine.
    """

    def __init__(self, costs: Costs) -> None:
        self._costs = costs
        self.of_pass = costs.of_pass
        self.of_draft = costs.of_draft
        self.record = costs.record
        self.prefill_share = costs.prefill_share
        self.catch_up = costs.catch_up

    def note(self, context: int, nodes: int, ms: float, requests: int = 1) -> None:
        """Note nothing."""


class BatchDrafts:
    """Drafts of the requests of one run, which hold their state themselves.

    Args:
        engine: the model, and what passes cost on it.
        runner: has the rows of the requests, and runs the passes.
        stats: what is counted.
    """

    def __init__(self, engine: Engine, runner: BatchRunner, stats: BatchStats) -> None:
        self._engine = engine
        self._runner = runner
        self._stats = stats
        self._budgets: dict[BatchJob, DraftBudget] = {}
        self._trees: dict[BatchJob, DraftTree] = {}  # that cost nothing to propose
        self._spent_ms = 0.0
        self._allowed = 0.0  # plain passes that probes may cost
        self._probed: dict[BatchJob, float] = {}  # what each is charged with

    def wish(self, jobs: Sequence[BatchJob], *, may_begin: bool) -> None:
        """Note in the entry of each of `jobs`, all of which decode, how many rows its drafts would take.

        Args:
            jobs: all that will decode.
            may_begin: whether a model may begin to draft, whose rows take blocks that newcomers might want.
        """
        started = time.perf_counter()
        self._budgets, self._trees, self._probed = {}, {}, {}
        requests = len(jobs)
        most = _MOST_ROWS // next_power_of_2(max(1, requests)) - 1
        for job in jobs:
            job.entry.wanted_rows = 0
            request = job.drafted
            if request is None:
                continue
            request.state = self._runner.state(job.rows)
            if not (may_begin or request.is_drafting or not _holds_rows(request)):
                continue
            room = min(job.entry.answer_tokens - job.entry.generated, most)
            try:
                budget = request.budget(requests, room)
            except FAILURES as error:
                request.give_up(error)
                continue
            if budget.depth > 0:
                self._budgets[job] = budget
        free = {job: one for job, one in self._budgets.items() if not _holds_rows(_request(job))}
        self._trees = self._worth_it(self._proposed(free), jobs)
        for job, budget in self._budgets.items():
            job.entry.wanted_rows = len(self._trees.get(job, ())) if job in free else budget.nodes
        self._spent_ms = (time.perf_counter() - started) * 1e3

    def trees(self, jobs: Sequence[BatchJob], granted: Mapping[BatchJob, int]) -> list[DraftTree]:
        """Return what is verified of each of `jobs`, at most as many nodes as it was granted."""
        started = time.perf_counter()
        budgets = {
            job: DraftBudget(min(self._budgets[job].depth, nodes), nodes)
            for job, nodes in granted.items()
            if job not in self._trees
        }
        trees = {job: tree.cut(granted[job], tree.depth) for job, tree in self._trees.items() if job in granted}
        if budgets:
            proposed = self._proposed(budgets)
            trees = self._worth_it(trees | proposed, jobs)
            for job, tree in proposed.items():
                if len(tree) and not len(trees[job]):
                    _request(job).drop()
        self._spent_ms += (time.perf_counter() - started) * 1e3
        return [trees.get(job, DraftTree()) for job in jobs]

    def observe(
        self, jobs: Sequence[BatchJob], trees: Sequence[DraftTree], before: Sequence[int], pass_ms: float
    ) -> None:
        """Note what a step brought those of `jobs` that are drafted.

        Args:
            jobs: all that decoded.
            trees: what was verified of each.
            before: tokens that each had written before.
            pass_ms: of the step, without proposing.
        """
        self._allowed = min(_MOST_ALLOWED, self._allowed + _PROBES)
        for job, tree, context in zip(jobs, trees, before, strict=True):
            if job.drafted is None:
                continue
            accepted = job.rows.kv.num_tokens - context - 1
            if len(tree) and job in self._probed:
                after = self._allowed + accepted / len(jobs) - self._probed[job]
                self._allowed = min(after, max(self._allowed, _MOST_EARNED))
            self._stats.draft_tokens_verified += len(tree)
            self._stats.draft_tokens_accepted += accepted
            try:
                job.drafted.observe(tree, accepted, context, pass_ms, self._spent_ms)
            except FAILURES as error:  # other chunks were looked for
                job.drafted.give_up(error)
        self._spent_ms = 0.0

    def note_cost(self, trees: Sequence[DraftTree], contexts: Sequence[int], pass_ms: float) -> None:
        """Note what a pass took in which all requests decoded, `trees` of them verified."""
        sizes = [len(tree) for tree in trees]
        nodes = max(sizes) if self._runner.is_paged else round(sum(sizes) / len(sizes))
        if nodes or not any(sizes):  # so few nodes that they round to none would count as a plain step
            self._engine.draft_costs.note(sum(contexts) // len(contexts), nodes, pass_ms, len(trees))

    def _proposed(self, budgets: Mapping[BatchJob, DraftBudget]) -> dict[BatchJob, DraftTree]:
        """Return a tree a job; those with one drafter are drafted together."""
        by_drafter: dict[int, list[BatchJob]] = {}
        for job in budgets:
            by_drafter.setdefault(id(_request(job).drafting.drafter), []).append(job)
        trees: dict[BatchJob, DraftTree] = {}
        for jobs in by_drafter.values():
            drafter, chosen = _request(jobs[0]).drafting.drafter, [budgets[job] for job in jobs]
            try:
                proposals = drafter.propose([_request(job).session for job in jobs], chosen)
            except FAILURES as error:
                for job in jobs:
                    _request(job).give_up(error)
                continue
            for job, tree, budget in zip(jobs, proposals, chosen, strict=True):
                trees[job] = tree.cut(budget.nodes, budget.depth)
        return trees

    def _worth_it(self, trees: Mapping[BatchJob, DraftTree], jobs: Sequence[BatchJob]) -> dict[BatchJob, DraftTree]:
        """Return the parts of `trees` that are worth verifying in a pass over `jobs`."""
        self._probed = {}
        drafting = [job for job, tree in trees.items() if len(tree)]
        imposed = [one.limits.length or one.transfer for one in (_request(job).drafting for job in drafting)]
        if not drafting or any(imposed):
            return dict(trees)
        chances = [_request(job).chances(trees[job]) if job in trees else [] for job in jobs]
        context = sum(job.rows.kv.num_tokens for job in jobs) // len(jobs)
        costs = _request(drafting[0]).costs
        of_nodes = [costs.of_pass(context, nodes, len(jobs)) for nodes in range(max(map(len, chances)) + 1)]
        kept = nodes_worth_verifying(chances, of_nodes, is_padded=self._runner.is_paged)
        # A model's drafts are dropped, which asks it ever more seldom: a lookup's cost nothing until they are verified.
        hopes = [_hopes(trees[job]) if job in trees else () for job in jobs]
        probed, spent = nodes_worth_probing(
            chances, hopes, kept, of_nodes, self._allowed, is_padded=self._runner.is_paged
        )
        self._probed = {jobs[tree]: spent / len(probed) for tree in probed}
        for tree in probed:
            kept[tree] = 1
        sizes = dict(zip(jobs, kept, strict=True))
        return {job: tree.cut(sizes[job], tree.depth) for job, tree in trees.items()}


def likeliest_tokens(logits: Sequence[Tensor]) -> list[list[int]]:
    """Return the tokens with the highest logits, for the (rows, vocab_size) of every request."""
    tokens: list[int] = torch.cat([rows.argmax(dim=-1) for rows in logits]).tolist()  # the host waits once
    taken = iter(tokens)
    return [[next(taken) for _ in rows] for rows in logits]


def _holds_rows(request: SpeculativeRequest) -> bool:
    """Return whether a model drafts, whose steps cost something and whose rows lie in blocks."""
    return request.drafting.drafter.has_probabilities


def _hopes(tree: DraftTree) -> tuple[float, ...]:
    """Return the chances that the tree of a lookup tells; nothing of drawn ones, nor where none are told."""
    return (tree.chances or ()) if tree.probabilities is None else ()


def _request(job: BatchJob) -> SpeculativeRequest:
    assert job.drafted is not None, "only what is drafted has trees"
    return job.drafted
