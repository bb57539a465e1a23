"""What stands of a measurement of long documents that was ended, when it goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ragkit.bench.long_report import Outcome

UNANSWERED = "documents were not answered"
GAVE_UP = " gave up "  # in a note about a strategy that a document was too much for
HOW = ("processes", "threads", "gpus")  # settings that change how soon a run is done, not what it finds
_ROOM = ("gpu_mb", "cache_mb", "memory_mb")  # the same of [pages]

Document = tuple[int, str, int]  # its length, of which task, which one of its kind


@dataclass(frozen=True)
class Earlier:
    """What a raw file holds already.

    Attributes:
        done: documents that every strategy answered or was not asked about.
        outcomes: the answers about those.
        notes: about what was not asked.
        seconds: that it took.
        commits: that the answers are of.
    """

    done: Sequence[Document] = ()
    outcomes: Sequence[Outcome] = ()
    notes: Sequence[str] = ()
    seconds: float = 0.0
    commits: Sequence[str] = ()


def earlier_answers(path: Path, facts: Mapping[str, Any], machine: Mapping[str, Any]) -> Earlier:
    """Return what `path` holds; leave where that was measured with other settings, or on another machine.

    Documents of which a strategy gave up are asked about again, by all strategies.

    Args:
        path: the raw file.
        facts: the settings that this run would name in it.
        machine: where this run is.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        done = [(length, task, index) for length, task, index in record["done"]]
        before = {**_compared(record["settings"]), **_place(record["machine"])}
        outcomes = [Outcome(**{**one, "answers": tuple(one["answers"])}) for one in record["outcomes"]]
        notes, seconds = record["notes"], record["seconds"]
        commits = [*record.get("earlier_commits", ()), record["commit"]]
    except FileNotFoundError:
        raise SystemExit(f"{path} is not there: leave --go-on out to begin") from None
    except (KeyError, TypeError, ValueError) as error:
        raise SystemExit(f"{path} is not of a run that can go on ({type(error).__name__}: {error})") from error
    now = {**_compared(json.loads(json.dumps(facts))), **_place(machine)}
    other = [f"{name} ({before.get(name)}, now {now.get(name)})" for name in now if before.get(name) != now[name]]
    if other:
        raise SystemExit(f"{path} was measured otherwise: {', '.join(other)}; give another --name")
    there = set(done)
    return Earlier(
        done,
        [one for one in outcomes if (one.length, one.task, one.index) in there],
        [note for note in notes if GAVE_UP not in note and not note.endswith(UNANSWERED)],
        seconds,
        commits,
    )


def _compared(settings: Mapping[str, Any]) -> dict[str, Any]:
    found = {name: value for name, value in settings.items() if name not in ("pages", *HOW)}
    found["generator"] = Path(found["generator"]).name  # a model's place may be another one
    return found | {f"pages.{name}": value for name, value in settings["pages"].items() if name not in _ROOM}


def _place(machine: Mapping[str, Any]) -> dict[str, Any]:
    return {name: machine.get(name) for name in ("cpu", "gpus")}
