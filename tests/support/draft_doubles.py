"""Drafters whose drafts are right, wrong or drawn as a test says."""

from __future__ import annotations

import torch

from ragkit.generation.draft_tree import ROOT, DraftTree
from ragkit.generation.drafter import DraftPrice
from ragkit.generation.sampling import Sampler, SamplingConfig, distribution


class ScriptedSession:
    lag = 0

    def __init__(self, context, step_ms):
        self.context, self.tokens, self.closed, self.prompts = context, [], 0, [context.prompt]
        self.first_ms = self.step_ms = step_ms
        self.behind_ms, self.step_share = 0.0, 0.5 if step_ms else 0.0

    def accept(self, token_ids):
        self.tokens += token_ids

    def refresh(self, prompt):
        self.prompts.append(prompt)

    def holds_blocks_of(self, pool):
        return False

    def close(self):
        self.closed += 1


class ScriptedDrafter:
    """Proposes what a function of the session and the budget returns."""

    name = "scripted"
    width = 1

    def __init__(self, draft, has_probabilities=False, step_ms=0.0):
        self._draft, self.has_probabilities, self._step_ms = draft, has_probabilities, step_ms
        self.sessions, self.trees, self.batches = [], [], []

    def price(self, prompt):
        return DraftPrice(self._step_ms, 0.5 if self._step_ms else 0.0)

    def begin(self, context):
        self.sessions.append(ScriptedSession(context, self._step_ms))
        return self.sessions[-1]

    def propose(self, sessions, budgets):
        self.batches.append(len(sessions))
        trees = [self._draft(session, budget) for session, budget in zip(sessions, budgets, strict=True)]
        self.trees += trees
        return trees


def random_trees(seed, vocab, right=()):
    """Return a draft of random trees, whose nodes often follow `right`, the answer that is to come."""
    generator = torch.Generator().manual_seed(seed)

    def number(stop):
        return int(torch.randint(0, stop, (1,), generator=generator))

    def draft(session, budget):
        count = number(min(8, budget.nodes) + 1)
        tokens, parents, depths = [], [], {ROOT: -1}
        taken = set()
        for node in range(count):
            parent = number(node + 1) - 1
            at = len(session.tokens) + depths[parent] + 1
            token = right[at] if at < len(right) and number(3) else number(vocab)
            if (parent, token) in taken or depths[parent] + 1 >= budget.depth:
                parent, token = ROOT, 1000 % vocab + number(vocab) % vocab
                token %= vocab
                if (parent, token) in taken:
                    break
            taken.add((parent, token))
            depths[node] = depths[parent] + 1
            tokens.append(token)
            parents.append(parent)
        return DraftTree(tuple(tokens), tuple(parents))

    return draft


def drawn_trees(seed, logits, width, depth):
    """Return a draft of trees that are drawn from the distribution of `logits`, `width` children a node."""
    sampler = Sampler(SamplingConfig(seed=seed))

    def draft(session, budget):
        row = distribution(logits, session.context.sampling)
        tokens, parents, level = [], [], [ROOT]
        for _ in range(min(depth, budget.depth)):
            below = []
            for parent in level:
                for _ in range(width):
                    if len(tokens) < budget.nodes:
                        below.append(len(tokens))
                        tokens.append(sampler.draw(row))
                        parents.append(parent)
            level = below
        return DraftTree(tuple(tokens), tuple(parents), row.expand(len(tokens), -1))

    return draft
