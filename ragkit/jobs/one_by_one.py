"""Requests generated one after another: what a batch of them is compared with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ragkit.errors import RagkitError
from ragkit.generation.batch_request import BatchRequest, BatchResult
from ragkit.generation.engine import Engine
from ragkit.generation.steps import Finished


class OneByOne:
    """A `BatchGenerator` that pulls a request, generates, and pulls the next."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def run(self, requests: Iterable[BatchRequest]) -> Iterator[BatchResult]:
        """Yield one result a request, in order."""
        for request in requests:
            try:
                result = self._result(request)
            except RagkitError as error:
                result = BatchResult(request.request_id, "", error=error)
            yield result

    def _result(self, request: BatchRequest) -> BatchResult:
        pieces: list[str] = []
        finished: Finished | None = None
        for step in self._engine.generate(
            request.prompt, request.sampling, request.strategy, request.ratio, request.drafting
        ):
            pieces.append(step.piece)
            if isinstance(step, Finished):
                finished = step
        return BatchResult(request.request_id, "".join(pieces), finished)
