"""What one ingest is to look at: its sources found, what was left out, and where `--prune` may forget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ragkit.config import IngestConfig
from ragkit.credentials import public_url
from ragkit.errors import ReadError
from ragkit.readers import Skipped, Source, discover
from ragkit.readers.file_systems import is_url, refuse_network
from ragkit.readers.source import Findable
from ragkit.reports import FailedSource


@dataclass(frozen=True, slots=True)
class Discovery:
    """What was found.

    Attributes:
        sources: what there is to read.
        warnings: one line for everything in a folder that was not taken.
        failed: iterables of documents that failed; what they gave before is among the sources.
    """

    sources: tuple[Source, ...]
    warnings: tuple[str, ...]
    failed: tuple[FailedSource, ...]


def find_sources(sources: Sequence[Findable], config: IngestConfig, *, offline: bool) -> Discovery:
    """Return what `sources` name, under the patterns of `config`.

    Raises:
        UsageError: a source does not exist.
        OfflineError: one lies elsewhere, and nothing may be fetched.
    """
    for source in sources if offline else ():
        if isinstance(source, str) and is_url(source):
            refuse_network(source)
    skipped: list[Skipped] = []
    failed: list[FailedSource] = []

    def on_fail(name: str, error: ReadError) -> None:
        failed.append(FailedSource(name, error.stage, error.code, str(error)))

    found = tuple(discover(sources, config.include, config.exclude, on_skip=skipped.append, on_fail=on_fail))
    return Discovery(found, tuple(f"{one.uri}: {one.reason}" for one in skipped), tuple(failed))


def prune_roots(sources: Sequence[Findable]) -> list[str | Path]:
    """Return the folders among the sources, here and elsewhere: what is gone from below them can be forgotten."""
    roots: list[str | Path] = []
    for source in sources:
        if isinstance(source, str) and is_url(source) and not source.lower().startswith("file://"):
            roots.append(public_url(source))
        elif isinstance(source, str | Path) and Path(source).is_dir():
            roots.append(source)
    return roots
