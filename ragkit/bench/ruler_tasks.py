"""The tasks of `ragkit eval ruler` by name: RULER's thirteen, and key-value retrieval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches

from ragkit.bench.long_items import LongTask
from ragkit.bench.ruler_kv import KeyValueTask
from ragkit.bench.ruler_niah import NIAH_TASKS
from ragkit.bench.ruler_qa import QA_TASKS
from ragkit.bench.ruler_variables import VariablesTask
from ragkit.bench.ruler_words import CodedWordsTask, CommonWordsTask
from ragkit.errors import UsageError

_TASKS: tuple[LongTask, ...] = (
    *NIAH_TASKS,
    VariablesTask(),
    CommonWordsTask(),
    CodedWordsTask(),
    *QA_TASKS,
    KeyValueTask(),
)

#: In the order of RULER's tables; key-value retrieval comes last.
RULER_TASKS: Mapping[str, LongTask] = {task.name: task for task in _TASKS}


def ruler_tasks(names: Sequence[str]) -> list[LongTask]:
    """Return the tasks of these names, all of them where none is given.

    Raises:
        UsageError: there is no such task; names the nearest.
    """
    for name in names:
        if name not in RULER_TASKS:
            near = get_close_matches(name, RULER_TASKS, n=1, cutoff=0.5)
            hint = f": did you mean {near[0]!r}?" if near else "."
            raise UsageError(f"--tasks: there is no task {name!r}{hint} There are {', '.join(RULER_TASKS)}")
    return [RULER_TASKS[name] for name in names or RULER_TASKS]
