"""What drafts of a model take, as it was measured over all of its requests."""

from __future__ import annotations

from ragkit.generation.drafter import MOST_RECORDED, READ_AT_ONCE

_NEWEST = 0.3  # say of the newest draft in what a step takes
_OUTLIER = 3.0  # a step that took so many times what is known counts as this


class DraftTime:
    """What something takes, forgotten exponentially.

    Attributes:
        ms: milliseconds; 0 as long as nothing is known.
    """

    def __init__(self) -> None:
        self.ms = 0.0
        self._is_warm = False

    def note(self, ms: float) -> None:
        """Note a time; the first may have compiled or recorded something and does not count."""
        if self._is_warm:
            known = self.ms or ms
            self.ms = known + _NEWEST * (min(ms, _OUTLIER * known) - known)
        self._is_warm = True


class StepTimes:
    """What the first token of a draft takes, each further one, and reading beforehand what it is far behind.

    The first token is dearer: with it is read what the model has not read yet, and the host waits once a draft. Were
    all tokens taken to be as dear, drafts of one token would never tell that longer ones pay.
    """

    def __init__(self) -> None:
        self._alone = DraftTime()
        self._further = DraftTime()
        self._each = DraftTime()  # of drafts of several tokens, while none of one is known
        self._behind = DraftTime()

    @property
    def first_ms(self) -> float:
        """Milliseconds of a draft of one token."""
        return self._alone.ms or self._each.ms

    @property
    def step_ms(self) -> float:
        """Milliseconds of one more token; 0 before a draft had several."""
        return self._further.ms or self._each.ms

    @property
    def behind_ms(self) -> float:
        """Milliseconds of the pass over what is read beforehand."""
        return self._behind.ms

    def note(self, steps: int, ms: float, pending: int) -> None:
        """Note what a draft of `steps` tokens took behind so many that were not read yet."""
        if pending > MOST_RECORDED:
            if self.first_ms:
                self._behind.note(max(0.0, ms - self.first_ms - (steps - 1) * (self.step_ms or self.first_ms)))
        elif pending > READ_AT_ONCE:
            return  # some passes like the first
        elif steps == 1:
            self._alone.note(ms)
        elif self._alone.ms:
            self._further.note(max(0.0, ms - self._alone.ms) / (steps - 1))
        else:
            self._each.note(ms / steps)
