"""All stretches of several token texts in one structure, which grows by a token in amortised constant time.

A generalised suffix automaton (Blumer et al., 1985): a state stands for all stretches that end at the same places, of
which it knows the longest, how many places there are, and the last one. Texts do not run into each other.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

ROOT_STATE = 0
# A text that repeats one token has a chain of links as long as itself. Counts of short stretches may then lag behind.
_MOST_LINKS = 64


class SuffixAutomaton:
    """The stretches of some texts: given at once, and one more that grows.

    Attributes:
        follows: for each state, the state behind each token that follows its stretches somewhere.
        link: for each state, that of its longest stretch's longest suffix with more ends; -1 for the root.
        length: tokens of each state's longest stretch.
        count: at how many places each state's stretches end.
        last_end: the last of these places, counted over all texts.
    """

    def __init__(self, texts: Iterable[Sequence[int]] = ()) -> None:
        self.follows: list[dict[int, int]] = [{}]
        self.link = [-1]
        self.length = [0]
        self.count = [0]
        self.last_end = [-1]
        self._tokens = 0
        self._is_counted = False
        for text in texts:
            self._add(text)
        self._count_all()
        self._end = ROOT_STATE  # the whole of the text that grows

    def __len__(self) -> int:
        return self._tokens

    def append(self, token: int) -> None:
        """Let the text that grows end with `token`."""
        self._end = self._extend(self._end, token)
        state, links = self._end, 0
        while state > ROOT_STATE and links < _MOST_LINKS:
            self.count[state] += 1
            self.last_end[state] = self._tokens
            state, links = self.link[state], links + 1
        self._tokens += 1

    def match(self, state: int, length: int, token: int) -> tuple[int, int]:
        """Return the state and the length of the longest stretch that ends with `token`.

        Args:
            state, length: what this returned for the tokens before it; `ROOT_STATE` and 0 at the start.
            token: the next token.
        """
        while state != ROOT_STATE and token not in self.follows[state]:
            state = self.link[state]
            length = self.length[state]
        behind = self.follows[state].get(token)
        return (ROOT_STATE, 0) if behind is None else (behind, length + 1)

    def narrowed(self, state: int, length: int) -> int:
        """Return the state of the stretch of `length` that `state` held before the text grew."""
        while state != ROOT_STATE and self.length[self.link[state]] >= length:
            state = self.link[state]
        return state

    def _add(self, text: Sequence[int]) -> None:
        end = ROOT_STATE
        for token in text:
            end = self._extend(end, token)
            self.count[end] += 1
            self.last_end[end] = self._tokens
            self._tokens += 1

    def _extend(self, end: int, token: int) -> int:
        """Return the state of the text that goes on behind `end` with `token`."""
        follows, link, length = self.follows, self.link, self.length
        known = follows[end].get(token)
        if known is not None:
            return known if length[known] == length[end] + 1 else self._split(end, known, token)
        fresh = self._state(length[end] + 1, {}, 0, -1)
        before = end
        while before != -1 and token not in follows[before]:
            follows[before][token] = fresh
            before = link[before]
        if before == -1:
            link[fresh] = ROOT_STATE
        else:
            known = follows[before][token]
            link[fresh] = known if length[known] == length[before] + 1 else self._split(before, known, token)
        return fresh

    def _split(self, before: int, state: int, token: int) -> int:
        """Return a new state for the stretches of `state` that now end elsewhere too."""
        follows, link = self.follows, self.link
        # Before all is counted, what a state knows is its whole prefix, which the part does not end with.
        count, last_end = (self.count[state], self.last_end[state]) if self._is_counted else (0, -1)
        part = self._state(self.length[before] + 1, dict(follows[state]), count, last_end)
        link[part] = link[state]
        link[state] = part
        while before != -1 and follows[before].get(token) == state:
            follows[before][token] = part
            before = link[before]
        return part

    def _state(self, length: int, follows: dict[int, int], count: int, last_end: int) -> int:
        self.follows.append(follows)
        self.link.append(ROOT_STATE)
        self.length.append(length)
        self.count.append(count)
        self.last_end.append(last_end)
        return len(self.length) - 1

    def _count_all(self) -> None:
        """Add up what `_add` noted at whole prefixes: a stretch ends where those end that it is a suffix of."""
        for state in sorted(range(1, len(self.length)), key=self.length.__getitem__, reverse=True):
            link = self.link[state]
            if link > ROOT_STATE:
                self.count[link] += self.count[state]
                self.last_end[link] = max(self.last_end[link], self.last_end[state])
        self._is_counted = True
