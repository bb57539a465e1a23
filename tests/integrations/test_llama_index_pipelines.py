"""ragkit's parts inside LlamaIndex's own pipelines, indexes and query engines, with nothing fetched."""

from __future__ import annotations

import asyncio
import socket
from dataclasses import replace
from pathlib import Path

import pytest
from blended_pipeline import CONFIG, QUESTIONS, open_blended, text_of

from ragkit import Pipeline
from ragkit.generation.engine import Engine

pytest.importorskip("llama_index.core", reason="the extra llama-index is not installed")

from llama_index.core import Document, Settings, StorageContext, VectorStoreIndex
from llama_index.core.ingestion import DocstoreStrategy, IngestionPipeline
from llama_index.core.query_engine import RetrieverQueryEngine, RouterQueryEngine
from llama_index.core.schema import MetadataMode, QueryBundle
from llama_index.core.storage.docstore import SimpleDocumentStore
from llama_index.core.tools import QueryEngineTool

from ragkit.integrations.llama_index import (
    CHUNK_ID_KEY,
    RagkitEmbedding,
    RagkitLLM,
    RagkitNodeParser,
    RagkitQueryEngine,
    RagkitRetriever,
    RagkitVectorStore,
)


@pytest.fixture(autouse=True)
def _nothing_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("something wanted the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setenv("RAGKIT_HOME", str(tmp_path / "cache"))


@pytest.fixture
def pipeline(tmp_path: Path, engine: Engine):
    with open_blended(tmp_path / "store", engine) as pipeline:
        yield pipeline


@pytest.fixture
def parts(pipeline: Pipeline) -> tuple[RagkitNodeParser, RagkitEmbedding, RagkitVectorStore]:
    from ragkit.chunking.registry import create_chunker

    parser = RagkitNodeParser.from_chunker(create_chunker(CONFIG.chunking, pipeline.tokenizer, pipeline.parts))
    return parser, RagkitEmbedding.from_pipeline(pipeline), RagkitVectorStore.from_pipeline(pipeline)


def documents(*seeds: int) -> list[Document]:
    return [Document(text=text_of(seed), id_=f"doc-{seed}", metadata={"seed": seed}) for seed in seeds]


def test_an_ingestion_pipeline_fills_the_store_and_keeps_it_in_step(parts, pipeline: Pipeline):
    parser, embedding, store = parts
    ingestion = IngestionPipeline(
        transformations=[parser, embedding],
        vector_store=store,
        docstore=SimpleDocumentStore(),
        docstore_strategy=DocstoreStrategy.UPSERTS_AND_DELETE,
    )
    ingestion.run(documents=documents(0, 1))
    first = pipeline.store.counts()
    texts = {one.ref_doc_id: "" for one in store.get_nodes()}
    for one in sorted(store.get_nodes(), key=lambda one: (one.ref_doc_id, one.start_char_idx)):
        texts[one.ref_doc_id] += one.text
    assert texts == {"doc-0": text_of(0), "doc-1": text_of(1)}
    ingestion.run(documents=documents(0, 1))
    assert pipeline.store.counts().generation == first.generation
    changed = Document(text=text_of(7), id_="doc-1")
    ingestion.run(documents=[*documents(0), changed])
    assert "".join(one.text for one in store.get_nodes() if one.ref_doc_id == "doc-1") == text_of(7)
    ingestion.run(documents=documents(0))
    assert {one.ref_doc_id for one in store.get_nodes()} == {"doc-0"}
    assert pipeline.verify().problems == ()


def test_an_index_answers_with_ragkits_model_and_store(parts, pipeline: Pipeline):
    parser, embedding, store = parts
    llm = RagkitLLM.from_pipeline(pipeline, max_new_tokens=8)
    context = StorageContext.from_defaults(vector_store=store)
    Settings.tokenizer = llm.encode
    try:
        index = VectorStoreIndex.from_documents(
            documents(0, 1), storage_context=context, embed_model=embedding, transformations=[parser]
        )
        again = VectorStoreIndex.from_vector_store(store, embed_model=embedding)
        first, second = (one.as_query_engine(llm=llm, similarity_top_k=2).query(QUESTIONS[0]) for one in (index, again))
        assert first.response == second.response != ""
        assert [one.node_id for one in first.source_nodes] == [one.node_id for one in second.source_nodes]
        assert len(first.source_nodes) == 2
        index.delete_ref_doc("doc-0")
        assert {one.ref_doc_id for one in store.get_nodes()} == {"doc-1"}
        index.insert(documents(2)[0])
        assert {one.ref_doc_id for one in store.get_nodes()} == {"doc-1", "doc-2"}
    finally:
        Settings._tokenizer = None


def test_the_retriever_finds_what_the_pipeline_finds(pipeline: Pipeline, tmp_path: Path):
    (tmp_path / "a.txt").write_text(text_of(3), encoding="utf-8")
    pipeline.ingest([tmp_path / "a.txt"])
    retriever = RagkitRetriever(pipeline, k=3)
    hits = pipeline.search(QUESTIONS[0], k=3).hits
    found = retriever.retrieve(QUESTIONS[0])
    assert [(one.node_id, one.score, one.text) for one in found] == [
        (hit.chunk_id, hit.score, hit.text) for hit in hits
    ]
    for one in found:
        assert text_of(3)[one.node.start_char_idx : one.node.end_char_idx] == one.text
        assert one.metadata[CHUNK_ID_KEY] == one.node_id
        assert one.node.ref_doc_id == one.metadata["uri"] == str(tmp_path / "a.txt")
        assert CHUNK_ID_KEY not in one.node.get_content(MetadataMode.LLM)
    assert [one.node_id for one in asyncio.run(retriever.aretrieve(QUESTIONS[0]))] == [hit.chunk_id for hit in hits]
    nothing = RagkitRetriever(pipeline, filter={"uri": "*.pdf"}, mode="dense")
    assert nothing.retrieve(QueryBundle(QUESTIONS[0])) == []


def test_a_retriever_query_engine_runs_on_both(pipeline: Pipeline, tmp_path: Path):
    (tmp_path / "a.txt").write_text(text_of(3), encoding="utf-8")
    pipeline.ingest([tmp_path / "a.txt"])
    llm = RagkitLLM.from_pipeline(pipeline, max_new_tokens=8)
    Settings.tokenizer = llm.encode
    try:
        engine = RetrieverQueryEngine.from_args(RagkitRetriever(pipeline, k=2), llm=llm)
        answer = engine.query(QUESTIONS[0])
        assert answer.response
        assert len(answer.source_nodes) == 2
        streaming = RetrieverQueryEngine.from_args(RagkitRetriever(pipeline, k=2), llm=llm, streaming=True)
        assert "".join(streaming.query(QUESTIONS[0]).response_gen) == answer.response
        assert asyncio.run(engine.aquery(QUESTIONS[0])).response == answer.response
    finally:
        Settings._tokenizer = None


@pytest.fixture
def filled(pipeline: Pipeline, tmp_path: Path) -> Pipeline:
    (tmp_path / "a.txt").write_text(text_of(3), encoding="utf-8")
    pipeline.ingest([tmp_path / "a.txt"])
    return pipeline


def test_the_query_engine_answers_as_the_pipeline_with_citations_as_nodes(filled: Pipeline):
    answer = filled.query(QUESTIONS[0], strategy="blend")
    response = RagkitQueryEngine(filled, strategy="blend").query(QUESTIONS[0])
    assert response.response == answer.text
    assert response.metadata["strategy"] == "blend"
    assert response.metadata["tokens"]["prompt"] == answer.tokens.prompt
    assert len(response.source_nodes) == len(answer.citations) > 0
    for one, citation in zip(response.source_nodes, answer.citations, strict=True):
        span = one.node.start_char_idx, one.node.end_char_idx
        assert (one.text, one.score, span) == (
            citation.quote,
            citation.score,
            (citation.char_start, citation.char_stop),
        )
        assert text_of(3)[slice(*span)] == one.text
    assert len({one.node_id for one in response.source_nodes}) == len(response.source_nodes)


def test_the_query_engine_streams_and_then_has_its_sources(filled: Pipeline):
    async def run():
        response = await streaming.aquery(QUESTIONS[0])
        pieces = [piece async for piece in response.response_gen]
        return "".join(pieces), response

    expected = RagkitQueryEngine(filled).query(QUESTIONS[0])
    streaming = RagkitQueryEngine(filled, streaming=True)
    response = streaming.query(QUESTIONS[0])
    assert response.source_nodes == []
    assert "".join(response.response_gen).strip() == expected.response
    text, later = asyncio.run(run())
    assert text.strip() == expected.response
    for one in (response, later):
        assert [node.node_id for node in one.source_nodes] == [node.node_id for node in expected.source_nodes]
        assert one.metadata["found"] is True
    assert asyncio.run(RagkitQueryEngine(filled).aquery(QUESTIONS[0])).response == expected.response
    assert [one.text for one in streaming.retrieve(QueryBundle(QUESTIONS[0]))] == [
        hit.text for hit in filled.search(QUESTIONS[0]).hits
    ]


def test_a_stream_of_the_query_engine_that_is_left_frees_its_memory(filled: Pipeline):
    filled.query(QUESTIONS[0])
    free = filled.engine.pool.num_free
    response = RagkitQueryEngine(filled, streaming=True, strategy="full", max_new_tokens=1000).query(QUESTIONS[0])
    next(response.response_gen)
    assert filled.engine.pool.num_free < free
    response.response_gen.close()
    assert filled.engine.pool.num_free == free


def test_the_query_engine_is_a_tool_that_a_router_can_choose(filled: Pipeline):
    from llama_index.core.base.base_selector import BaseSelector, SelectorResult, SingleSelection

    class First(BaseSelector):
        def _select(self, choices, query):
            return SelectorResult(selections=[SingleSelection(index=0, reason="the only one")])

        async def _aselect(self, choices, query):
            return self._select(choices, query)

        def _get_prompts(self):
            return {}

        def _update_prompts(self, prompts):
            pass

    tool = QueryEngineTool.from_defaults(RagkitQueryEngine(filled), description="Knows everything.")
    router = RouterQueryEngine(
        selector=First(), query_engine_tools=[tool], llm=RagkitLLM.from_pipeline(filled, max_new_tokens=4)
    )
    assert router.query(QUESTIONS[0]).response == RagkitQueryEngine(filled).query(QUESTIONS[0]).response


def test_the_embedder_is_the_pipelines(pipeline: Pipeline):
    model = RagkitEmbedding.from_pipeline(pipeline)
    texts = ["one two", "three"]
    expected = pipeline.embedder.encode(texts)
    assert model.get_text_embedding_batch(texts) == [pytest.approx(row.tolist()) for row in expected]
    assert asyncio.run(model.aget_text_embedding("three")) == pytest.approx(expected[1].tolist())
    question = pipeline.embedder.encode_queries(["one two"])[0].tolist()
    assert model.get_query_embedding("one two") == pytest.approx(question)
    assert asyncio.run(model.aget_query_embedding("one two")) == pytest.approx(question)


def test_answers_that_are_not_found_have_no_sources(filled: Pipeline):
    config = replace(filled.config, answers=replace(filled.config.answers, found_threshold=1.0))
    with open_blended(filled.folder, filled.engine, config) as strict:
        response = RagkitQueryEngine(strict).query("Completely unrelated?")
    assert (response.source_nodes, response.metadata["found"]) == ([], False)
