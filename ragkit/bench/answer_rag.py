"""Plain RAG over one document: cut into chunks, embedded and indexed; full prefill over what a question retrieves."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from ragkit.bench.long_answers import AnswererTools, LongAnswer, fresh_builder, generate_text, with_prefix
from ragkit.bench.long_items import LongQuestion
from ragkit.errors import GenerationError
from ragkit.generation.prompt import PromptBuilder
from ragkit.pipeline import Pipeline


class RagAnswerer:
    """Ingests the document into a store of its own, and answers as `ragkit query --strategy full` does.

    Two things differ: no question is refused, and the answer begins with the prefix that all strategies are given.
    """

    def __init__(self, tools: AnswererTools) -> None:
        self._tools = tools

    @property
    def name(self) -> str:
        """What results call it."""
        return "rag"

    @property
    def most_tokens(self) -> int:
        """Any length goes."""
        return 0

    def answer(self, document: str, questions: Sequence[LongQuestion], max_new_tokens: int) -> Iterator[LongAnswer]:
        """Yield what `LongContextAnswerer.answer` says."""
        tools = self._tools
        started = time.perf_counter()
        with (
            TemporaryDirectory(prefix="ragkit-long-") as folder,
            Pipeline.open(
                Path(folder) / "store",
                tools.config,
                embedder=tools.embedder,
                tokenizer=tools.engine.tokenizer,
                engine=tools.engine,
            ) as pipeline,
        ):
            file = Path(folder) / "document.txt"
            file.write_text(document, encoding="utf-8", newline="")
            report = pipeline.ingest([file], kv=False)
            if report.failed:
                raise GenerationError(f"the document cannot be ingested: {report.failed[0].message}")
            document_seconds = time.perf_counter() - started
            builder = fresh_builder(tools)
            for question in questions:
                yield self._answer(pipeline, builder, question, max_new_tokens, document_seconds)

    def _answer(
        self,
        pipeline: Pipeline,
        builder: PromptBuilder,
        question: LongQuestion,
        max_new_tokens: int,
        document_seconds: float,
    ) -> LongAnswer:
        engine = self._tools.engine
        started = time.perf_counter()
        chunks = [found.stored.chunk for found in pipeline.retriever.retrieve(question.text).chunks]
        begun = engine.tokenizer.encode(question.answer_prefix)
        built = builder.build(question.text, chunks, max_new_tokens=max_new_tokens + len(begun))
        prompt = with_prefix(built.prompt, begun)
        text = generate_text(engine, prompt, max_new_tokens)
        dropped = set(built.dropped_chunks)
        shown = tuple((chunk.char_start, chunk.char_stop) for chunk in chunks if chunk.chunk_id not in dropped)
        return LongAnswer(text, shown, len(prompt), document_seconds, time.perf_counter() - started)
