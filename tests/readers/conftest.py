"""What the tests of readers share: files from content, and reading them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
from document_files import write_zip

from ragkit.readers import ReadLimits, ReadResult, Source, discover, read_source
from ragkit.readers.process import ParserProcess

STUB_COMMAND = (sys.executable, "-P", str(Path(__file__).parent.parent / "support" / "stub_parser.py"))


@pytest.fixture
def stub_command() -> tuple[str, ...]:
    return STUB_COMMAND


@pytest.fixture
def stub() -> Iterator[ParserProcess]:
    with ParserProcess(STUB_COMMAND) as process:
        yield process


@pytest.fixture(scope="session")
def parser() -> Iterator[ParserProcess]:
    """One parser process for all tests that only parse."""
    with ParserProcess() as process:
        yield process


@pytest.fixture
def make(tmp_path: Path) -> Callable[[str, str | bytes | Mapping[str, bytes]], Source]:
    """Write a file, a mapping as a zip archive, and return it as a source."""

    def write(name: str, content: str | bytes | Mapping[str, bytes]) -> Source:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, Mapping):
            write_zip(path, content)
        else:
            path.write_bytes(content.encode() if isinstance(content, str) else content)
        return next(discover([path]))

    return write


@pytest.fixture
def read(make: Callable[..., Source], parser: ParserProcess) -> Callable[..., ReadResult]:
    """Write a file and read it."""

    def write_and_read(
        name: str,
        content: str | bytes | Mapping[str, bytes],
        limits: ReadLimits | None = None,
        text_column: str | None = None,
    ) -> ReadResult:
        return read_source(make(name, content), limits, text_column=text_column, process=parser)

    return write_and_read
