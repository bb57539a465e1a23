"""How many drafted tokens stand on grounded questions, and what that saves: drafters against plain decoding.

Each prompt is computed once; then it is decoded without drafts and by each drafter in turn, round after round, so that
whatever else the machine does falls on all of them alike. A speed-up is the ratio of two times for the same tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ragkit.bench.bootstrap import mean_bootstrap
from ragkit.bench.grounded_prompts import GroundedPrompt
from ragkit.bench.repeated_prefill import RepeatedPrefill
from ragkit.generation.engine import Engine
from ragkit.generation.full_prefill import FullPrefill
from ragkit.generation.sampling import SamplingConfig
from ragkit.generation.speculative_decode import Drafting
from ragkit.generation.steps import Finished

PLAIN = "none"


@dataclass(frozen=True, slots=True)
class DraftedAnswer:
    """One answer by one drafter.

    Attributes:
        drafter: its name; `PLAIN` for none.
        prompt_tokens, tokens: of the prompt, and of the answer behind its first.
        drafted, accepted, steps: what drafting did.
        ms_per_token: the least of all rounds, without the first token.
        same: whether the tokens are those of plain decoding.
        text: the answer.
    """

    drafter: str
    prompt_tokens: int
    tokens: int
    drafted: int
    accepted: int
    steps: int
    ms_per_token: float
    same: bool
    text: str


@dataclass(frozen=True, slots=True)
class DraftRow:
    """All answers by one drafter, on one set of prompts.

    Attributes:
        drafter, mode: what drafted.
        answers: how many.
        prompt_tokens: mean.
        tokens: of all answers, without their first ones.
        acceptance: tokens that stood, of those that were verified.
        per_pass: tokens that a pass brought.
        ms_per_token: mean.
        speed: times as fast as plain decoding: mean over prompts, and its 95% interval.
        same: share of answers whose tokens are those of plain decoding.
    """

    drafter: str
    mode: str
    answers: int
    prompt_tokens: float
    tokens: int
    acceptance: float
    per_pass: float
    ms_per_token: float
    speed: tuple[float, float, float]
    same: float


@dataclass(slots=True)
class DraftBenchmark:
    """Measures drafters on prompts.

    Attributes:
        engine: the target.
        draftings: by name.
        new_tokens: most tokens of an answer.
        rounds: how often each answer is timed.
        temperature: 0 for the likeliest tokens.
        answers: what was measured, by drafter.
    """

    engine: Engine
    draftings: Mapping[str, Drafting]
    new_tokens: int = 128
    rounds: int = 3
    temperature: float = 0.0
    answers: dict[str, list[DraftedAnswer]] = field(default_factory=dict)

    def run(self, prompts: Iterable[GroundedPrompt]) -> None:
        """Measure all prompts; answers of fewer than two tokens say nothing and are left out."""
        for prompt in prompts:
            self.measure(prompt)

    def measure(self, prompt: GroundedPrompt) -> None:
        """Measure one prompt by plain decoding and every drafter, interleaved."""
        prefill = RepeatedPrefill(FullPrefill())
        ways: dict[str, Drafting | None] = {PLAIN: None, **self.draftings}
        best: dict[str, tuple[float, Finished]] = {}
        for _ in range(self.rounds):
            for name, drafting in ways.items():
                finished = self._answered(prompt, prefill, drafting)
                tokens = len(finished.token_ids) - 1
                if tokens < 1:
                    return
                ms = (finished.timings_ms["total"] - finished.timings_ms["first_token"]) / tokens
                if name not in best or ms < best[name][0]:
                    best[name] = ms, finished
        plain = best[PLAIN][1].token_ids
        for name, (ms, finished) in best.items():
            use = finished.draft
            self.answers.setdefault(name, []).append(
                DraftedAnswer(
                    name, len(prompt.prompt), len(finished.token_ids) - 1, use.drafted, use.accepted, use.steps, ms,
                    finished.token_ids == plain, self.engine.tokenizer.decode(finished.token_ids),
                )
            )  # fmt: skip

    def rows(self) -> list[DraftRow]:
        """Return a row a drafter, plain decoding first."""
        plain = self.answers.get(PLAIN, [])
        return [self._row(name, own, plain) for name, own in self.answers.items()]

    def _row(self, name: str, own: Sequence[DraftedAnswer], plain: Sequence[DraftedAnswer]) -> DraftRow:
        drafted, steps = sum(one.drafted for one in own), sum(one.steps for one in own)
        tokens = sum(one.tokens for one in own)
        ratios = [other.ms_per_token / one.ms_per_token for one, other in zip(own, plain, strict=True)]
        drafting = self.draftings.get(name)
        return DraftRow(
            drafter=name,
            mode=PLAIN if drafting is None else drafting.mode.value,
            answers=len(own),
            prompt_tokens=sum(one.prompt_tokens for one in own) / len(own),
            tokens=tokens,
            acceptance=sum(one.accepted for one in own) / drafted if drafted else 0.0,
            per_pass=tokens / steps if steps else 1.0,
            ms_per_token=sum(one.ms_per_token for one in own) / len(own),
            speed=mean_bootstrap([ratios]),
            same=sum(one.same for one in own) / len(own),
        )

    def _answered(self, prompt: GroundedPrompt, prefill: RepeatedPrefill, drafting: Drafting | None) -> Finished:
        sampling = SamplingConfig(self.new_tokens, self.temperature)
        *_, finished = self.engine.generate(prompt.prompt, sampling, prefill, drafting=drafting)
        assert isinstance(finished, Finished)
        return finished


def table_lines(rows: Sequence[DraftRow]) -> list[str]:
    """Return the rows as a table for people."""
    head = f"{'drafter':<12} {'mode':<9} {'answers':>7} {'prompt':>7} {'tokens':>7} {'stood':>6} {'a pass':>7} " \
        f"{'ms/token':>9} {'speed (95%)':>19} {'same':>6}"  # fmt: skip
    return [head, *(_line(row) for row in rows)]


def _line(row: DraftRow) -> str:
    mean, low, high = row.speed
    stood = "-" if row.mode == PLAIN else f"{row.acceptance:.0%}"
    return (
        f"{row.drafter:<12.12} {row.mode:<9} {row.answers:>7} {row.prompt_tokens:>7,.0f} {row.tokens:>7,} {stood:>6} "
        f"{row.per_pass:>7.2f} {row.ms_per_token:>9.2f} {f'{mean:.2f} ({low:.2f}-{high:.2f})':>19} {row.same:>6.0%}"
    )


def rows_json(benchmark: DraftBenchmark) -> dict[str, Any]:
    """Return rows and single answers as plain JSON values."""
    from dataclasses import asdict

    return {
        "rows": [asdict(row) for row in benchmark.rows()],
        "answers": {name: [asdict(one) for one in own] for name, own in benchmark.answers.items()},
    }
