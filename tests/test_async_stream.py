"""Answers for asyncio: pieces in order, back-pressure, and memory that is free again however a stream ends."""

from __future__ import annotations

import asyncio
import gc
import inspect
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from blended_pipeline import CONFIG, QUESTIONS, open_blended, write_documents
from pipeline_double import ANSWER

from ragkit import Pipeline
from ragkit.async_stream import AsyncAnswerStream
from ragkit.config import Strategy
from ragkit.errors import GenerationError, StoreMissingError, UsageError
from ragkit.generation.engine import Engine


class Pieces:
    """A stream that counts what was taken of it, and in which thread."""

    def __init__(self, count: int, failing_at: int | None = None) -> None:
        self.count, self.failing_at = count, failing_at
        self.taken = 0
        self.threads: set[int] = set()
        self.closed = threading.Event()
        self.answer = ANSWER

    def __iter__(self) -> Iterator[str]:
        while self.taken < self.count:
            self.threads.add(threading.get_ident())
            if self.taken == self.failing_at:
                raise GenerationError("no room")
            self.taken += 1
            yield f"{self.taken} "

    def close(self) -> None:
        self.threads.add(threading.get_ident())
        self.closed.set()


def wait_until(happened: Callable[[], bool]) -> None:
    for _ in range(500):
        if happened():
            return
        time.sleep(0.01)
    raise AssertionError("it did not happen within 5 s")


async def read(stream: AsyncAnswerStream) -> list[str]:
    return [piece async for piece in stream]


def test_pieces_come_in_order_and_then_the_answer():
    async def run():
        async with AsyncAnswerStream(lambda: pieces) as stream:
            return await read(stream), await stream.answer()

    pieces = Pieces(100)
    read_pieces, answer = asyncio.run(run())
    assert read_pieces == [f"{n} " for n in range(1, 101)]
    assert answer is ANSWER
    assert len(pieces.threads) == 1
    assert threading.get_ident() not in pieces.threads


def test_a_slow_reader_holds_the_generation_back():
    async def run():
        async with AsyncAnswerStream(lambda: pieces, ahead=4) as stream:
            await anext(stream)
            await asyncio.sleep(0.2)
            return pieces.taken

    pieces = Pieces(1000)
    # One is read, four wait, and one more was generated before the thread found the queue full.
    assert asyncio.run(run()) == 6


def test_cancelling_the_reader_ends_the_generation():
    async def run():
        stream = AsyncAnswerStream(slow)
        task = asyncio.create_task(read(stream))
        await asyncio.sleep(0.1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await asyncio.to_thread(pieces.closed.wait, 5)
        with pytest.raises(GenerationError, match="closed before its end"):
            await stream.answer()

    def slow():
        stream = Pieces.__iter__(pieces)

        class Slow(Pieces):
            def __iter__(self):
                for piece in stream:
                    time.sleep(0.01)
                    yield piece

            def close(self):
                pieces.close()

        return Slow(0)

    pieces = Pieces(10_000)
    asyncio.run(run())
    assert pieces.taken < 1000


def test_a_stream_that_is_dropped_ends():
    async def run():
        stream = AsyncAnswerStream(lambda: pieces, ahead=1)
        await anext(stream)
        del stream
        gc.collect()
        return await asyncio.to_thread(pieces.closed.wait, 5)

    pieces = Pieces(1000)
    assert asyncio.run(run())


def test_a_loop_that_is_gone_ends_the_thread():
    async def run():
        kept.append(AsyncAnswerStream(lambda: pieces, ahead=500))
        await anext(kept[0])

    kept: list[AsyncAnswerStream] = []
    pieces = Pieces(1 << 40)
    asyncio.run(run())
    kept.clear()
    assert pieces.closed.wait(5)


def test_errors_come_after_the_pieces_before_them():
    async def run():
        async for piece in AsyncAnswerStream(lambda: pieces):
            got.append(piece)

    got: list[str] = []
    pieces = Pieces(5, failing_at=3)
    with pytest.raises(GenerationError, match="no room"):
        asyncio.run(run())
    assert got == ["1 ", "2 ", "3 "]
    assert pieces.closed.is_set()


def test_closing_before_the_first_piece_starts_nothing():
    async def run():
        stream = AsyncAnswerStream(lambda: pytest.fail("was started"))
        await stream.aclose()
        return await read(stream)

    assert asyncio.run(run()) == []


def test_at_least_one_piece_is_ahead():
    with pytest.raises(UsageError, match="ahead=0"):
        AsyncAnswerStream(lambda: Pieces(1), ahead=0)


@pytest.fixture
def pipeline(tmp_path: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pipeline]:
    monkeypatch.setenv("RAGKIT_HOME", str(tmp_path / "cache"))
    with open_blended(tmp_path / "store", engine) as pipeline:
        pipeline.ingest([write_documents(tmp_path / "docs")])
        yield pipeline


@pytest.mark.parametrize("strategy", [Strategy.FULL, Strategy.BLEND])
def test_answers_are_those_of_the_synchronous_calls(pipeline: Pipeline, strategy: Strategy):
    async def run():
        whole = await asyncio.gather(*(pipeline.aquery(question, strategy=strategy) for question in QUESTIONS))
        async with pipeline.astream(QUESTIONS[0], strategy=strategy) as stream:
            pieces = await read(stream)
            return whole, pieces, await stream.answer()

    expected = [pipeline.query(question, strategy=strategy) for question in QUESTIONS]
    whole, pieces, streamed = asyncio.run(run())
    assert [answer.text for answer in whole] == [answer.text for answer in expected]
    assert [answer.citations for answer in whole] == [answer.citations for answer in expected]
    assert "".join(pieces).strip() == streamed.text == expected[0].text


def test_leaving_the_block_frees_the_kv_of_the_request(pipeline: Pipeline, engine: Engine):
    async def run():
        async with pipeline.astream(QUESTIONS[0], strategy="full", max_new_tokens=2000, ahead=1) as stream:
            await anext(stream)
            held = engine.pool.num_free
        return held

    before = engine.pool.num_free
    assert asyncio.run(run()) < before
    assert engine.pool.num_free == before


def test_cancelling_a_query_frees_the_kv_of_the_request(pipeline: Pipeline, engine: Engine):
    async def run():
        task = asyncio.create_task(pipeline.aquery(QUESTIONS[0], strategy="full", max_new_tokens=2000))
        await asyncio.to_thread(wait_until, lambda: engine.pool.num_free < before)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    before = engine.pool.num_free
    asyncio.run(run())
    assert engine.pool.num_free == before


def test_errors_of_the_arguments_come_with_the_first_piece(tmp_path: Path, engine: Engine):
    with open_blended(tmp_path / "none", engine, config=replace(CONFIG)) as empty:
        with pytest.raises(StoreMissingError):
            asyncio.run(empty.aquery("anything?"))
        with pytest.raises(UsageError, match="the question is empty"):
            asyncio.run(empty.aquery("  "))


@pytest.mark.parametrize("name", ["aquery", "astream"])
def test_what_may_be_asked_is_what_a_stream_takes(name: str):
    def options(call):
        return {key: one for key, one in inspect.signature(call).parameters.items() if key != "ahead"}

    assert options(getattr(Pipeline, name)) == options(Pipeline.stream)


def test_what_may_not_be_asked_is_refused_by_the_name_of_the_call(tmp_path: Path):
    pipeline = Pipeline.open(tmp_path)
    unknown: dict[str, Any] = {"nonsense": 1}
    with pytest.raises(TypeError, match=r"^aquery\(\) got an unexpected keyword argument 'nonsense'"):
        asyncio.run(pipeline.aquery("a", **unknown))
    with pytest.raises(TypeError, match=r"^astream\(\) got an unexpected"):
        pipeline.astream("a", **unknown)
