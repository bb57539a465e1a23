"""Glob patterns over paths below a root, with the meaning they have in .gitignore files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

from ragkit.errors import UsageError


class PathFilter:
    """Says which files and folders below a root are taken.

    A pattern without a slash is compared with the name at any depth, one with a slash with the whole path below the
    root; `*` stays within a folder, `**` does not, a slash at the end means folders only. Names that start with a
    dot are left out, unless a part of an include pattern that starts with a dot itself fits.
    """

    def __init__(self, include: Sequence[str], exclude: Sequence[str]) -> None:
        self._include = [_compiled(pattern) for pattern in include]
        self._exclude = [_compiled(pattern) for pattern in exclude]
        parts = {part for pattern in include for part in pattern.split("/") if part.startswith(".")}
        self._dotted = [re.compile(_part(part), re.S) for part in sorted(parts)]

    def takes_file(self, relative: str) -> bool:
        """Return whether the file at `relative`, a path with slashes below the root, is read."""
        if self._left_out(relative, is_folder=False):
            return False
        return not self._include or any(
            pattern.fullmatch(relative) for pattern, folders_only in self._include if not folders_only
        )

    def takes_folder(self, relative: str) -> bool:
        """Return whether the folder at `relative` is looked into."""
        return not self._left_out(relative, is_folder=True)

    def _left_out(self, relative: str, *, is_folder: bool) -> bool:
        name = relative.rpartition("/")[2]
        if name.startswith(".") and not any(part.fullmatch(name) for part in self._dotted):
            return True
        return any(
            pattern.fullmatch(relative) and (is_folder or not folders_only) for pattern, folders_only in self._exclude
        )


@lru_cache(maxsize=256)
def _compiled(pattern: str) -> tuple[re.Pattern[str], bool]:
    """Return the expression for one pattern, and whether it means folders only."""
    bare = pattern.strip("/")
    if not bare or "\0" in bare:
        raise UsageError(f"an include or exclude pattern must name something, got {pattern!r}")
    anchored = "/" in pattern.rstrip("/")
    expression = _expression(bare.split("/")) if anchored else "(?:.*/)?" + _part(bare)
    return re.compile(expression, re.S), pattern.endswith("/")


def _expression(parts: Sequence[str]) -> str:
    pieces = []
    for index, part in enumerate(parts):
        last = index == len(parts) - 1
        if part == "**":
            pieces.append(".*" if last else "(?:.*/)?")
        else:
            pieces.append(_part(part) + ("" if last else "/"))
    return "".join(pieces)


def _part(part: str) -> str:
    """Return the expression for one component: `*`, `?` and `[...]` never match a slash."""
    pieces: list[str] = []
    place = 0
    while place < len(part):
        char = part[place]
        place += 1
        if char == "*":
            if not pieces or pieces[-1] != "[^/]*":
                pieces.append("[^/]*")
        elif char == "?":
            pieces.append("[^/]")
        elif char == "[" and (stop := part.find("]", place + 1)) > 0:
            body = part[place:stop].replace("\\", "\\\\").replace("[", "\\[")
            pieces.append("(?!/)[" + ("^" + body[1:] if body[0] in "!^" else body) + "]")
            place = stop + 1
        else:
            pieces.append(re.escape(char))
    return "".join(pieces)
