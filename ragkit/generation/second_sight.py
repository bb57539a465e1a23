"""What is made for a number when it is asked for again, such as buffers and graphs for so many rows."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

_REMEMBERED = 64  # numbers of which it is known that they were asked for

Made = TypeVar("Made")


class SecondSight(Generic[Made]):
    """Keeps what is made for a number when it is asked for the second time: most are never asked for again.

    Args:
        most: how many are kept; the one that was not asked for longest goes.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._seen: OrderedDict[int, None] = OrderedDict()
        self._made: OrderedDict[int, Made] = OrderedDict()

    def take(self, number: int, make: Callable[[], Made], leave: Callable[[Made], None]) -> Made | None:
        """Return what was made for `number`, made now if it is asked for again, or None the first time.

        Args:
            number: what it is for.
            make: makes it.
            leave: is given what goes.
        """
        if number not in self._made:
            if number not in self._seen:
                self._seen[number] = None
                if len(self._seen) > _REMEMBERED:
                    self._seen.popitem(last=False)
                return None
            while len(self._made) >= self._most:
                leave(self._made.popitem(last=False)[1])
            self._made[number] = make()
        self._made.move_to_end(number)
        return self._made[number]

    def __len__(self) -> int:
        return len(self._made)
