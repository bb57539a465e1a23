"""A pipeline as a LlamaIndex query engine: questions answered with reused KV, citations as source nodes.

Behind `complete(prompt)` a language model sees text alone, and chunk KV cannot be found again. This engine hands the
question to the pipeline, which retrieves, prompts and generates itself.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any, Unpack

from llama_index.core.base.base_query_engine import BaseQueryEngine
from llama_index.core.base.response.schema import AsyncStreamingResponse, Response, StreamingResponse
from llama_index.core.callbacks import CallbackManager
from llama_index.core.schema import NodeWithScore, QueryBundle

from ragkit.answers.options import QuestionOptions, require_options
from ragkit.integrations.llama_index_nodes import citation_node, hit_node
from ragkit.pipeline import Pipeline
from ragkit.types import Answer


class RagkitQueryEngine(BaseQueryEngine):  # type: ignore[misc]
    """Answers questions with a pipeline. `response.source_nodes` are the citations, best first.

    `response.metadata` has `found`, `strategy`, `model`, `tokens`, `timings_ms` and `warnings`. With `streaming` the
    response yields its text as it is generated; source nodes and metadata are complete when the text is.

    Args:
        pipeline: what answers.
        streaming: whether `query` returns a `StreamingResponse`.
        callback_manager: LlamaIndex's.
        options: as for `Pipeline.query`.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        *,
        streaming: bool = False,
        callback_manager: CallbackManager | None = None,
        **options: Unpack[QuestionOptions],
    ) -> None:
        require_options("RagkitQueryEngine", options)
        self._pipeline = pipeline
        self._streaming = streaming
        self._options = options
        super().__init__(callback_manager)

    def retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        """Return the chunks that an answer to this question would be generated from."""
        found = self._pipeline.search(
            query_bundle.query_str, k=self._options.get("k"), filter=self._options.get("filter")
        )
        return [hit_node(hit) for hit in found.hits]

    def _query(self, query_bundle: QueryBundle) -> Response | StreamingResponse:
        if not self._streaming:
            return _response(self._pipeline.query(query_bundle.query_str, **self._options))
        stream = self._pipeline.stream(query_bundle.query_str, **self._options)
        nodes: list[NodeWithScore] = []
        facts: dict[str, Any] = {}

        def pieces() -> Iterator[str]:
            try:
                yield from stream
                _fill(nodes, facts, stream.answer)
            finally:
                stream.close()

        return StreamingResponse(pieces(), nodes, facts)

    async def _aquery(self, query_bundle: QueryBundle) -> Response | AsyncStreamingResponse:
        if not self._streaming:
            return _response(await self._pipeline.aquery(query_bundle.query_str, **self._options))
        stream = self._pipeline.astream(query_bundle.query_str, **self._options)
        nodes: list[NodeWithScore] = []
        facts: dict[str, Any] = {}

        async def pieces() -> AsyncIterator[str]:
            async with stream:
                async for piece in stream:
                    yield piece
                _fill(nodes, facts, await stream.answer())

        return AsyncStreamingResponse(pieces(), nodes, facts)

    def _get_prompt_modules(self) -> dict[str, Any]:
        return {}


def _response(answer: Answer) -> Response:
    nodes: list[NodeWithScore] = []
    facts: dict[str, Any] = {}
    _fill(nodes, facts, answer)
    return Response(answer.text, nodes, facts)


def _fill(nodes: list[NodeWithScore], facts: dict[str, Any], answer: Answer) -> None:
    nodes.extend(citation_node(citation) for citation in answer.citations)
    tokens = answer.tokens
    facts.update(
        found=answer.found,
        strategy=answer.strategy,
        model=answer.model,
        tokens={
            "prompt": tokens.prompt,
            "reused": tokens.reused,
            "recomputed": tokens.recomputed,
            "generated": tokens.generated,
        },
        timings_ms=dict(answer.timings_ms),
        warnings=list(answer.warnings),
    )
