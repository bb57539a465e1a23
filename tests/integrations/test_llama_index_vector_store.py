"""A ragkit store behind LlamaIndex's vector store interface: what goes in comes out, whatever the mode or filter."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from doubles import HashEmbedder, WordTokenizer

from ragkit import Document, Pipeline
from ragkit.config import ChunkingConfig, PipelineConfig
from ragkit.errors import EmbedderMismatchError, StoreMissingError, UsageError

pytest.importorskip("llama_index.core", reason="the extra llama-index is not installed")

from llama_index.core.schema import MetadataMode, NodeRelationship, RelatedNodeInfo, TextNode
from llama_index.core.vector_stores import SimpleVectorStore
from llama_index.core.vector_stores.types import (
    FilterCondition,
    FilterOperator,
    MetadataFilter,
    MetadataFilters,
    VectorStoreQuery,
    VectorStoreQueryMode,
)

from ragkit.integrations.llama_index import RagkitVectorStore

EMBEDDER = HashEmbedder(dim=64)
TEXTS = {
    "frogs": "Frogs live in ponds and eat flies.",
    "toads": "Toads live in gardens and eat slugs.",
    "stars": "Stars shine at night above the ponds.",
    "miller": "The miller grinds wheat into flour.",
}


def node(name: str, text: str, document: str = "", **metadata: object) -> TextNode:
    made = TextNode(id_=name, text=text, metadata=metadata)
    if document:
        made.relationships[NodeRelationship.SOURCE] = RelatedNodeInfo(node_id=document)
    made.embedding = EMBEDDER.encode([made.get_content(MetadataMode.EMBED)])[0].tolist()
    return made


def nodes() -> list[TextNode]:
    facts = {
        "frogs": {"kind": "animal", "legs": 4, "tags": ["wet", "green"]},
        "toads": {"kind": "animal", "legs": 4, "tags": ["dry"], "note": "Warty Friends"},
        "stars": {"kind": "thing", "legs": 0},
        "miller": {"kind": "person", "legs": 2, "note": ""},
    }
    return [node(name, text, f"doc-{name[0]}", **facts[name]) for name, text in TEXTS.items()]


@pytest.fixture
def pipeline(tmp_path: Path):
    config = PipelineConfig(chunking=ChunkingConfig(max_tokens=30))
    with Pipeline.open(tmp_path / "store", config, embedder=EMBEDDER, tokenizer=WordTokenizer()) as pipeline:
        yield pipeline


@pytest.fixture
def store(pipeline: Pipeline) -> RagkitVectorStore:
    store = RagkitVectorStore.from_pipeline(pipeline)
    assert store.add(nodes()) == list(TEXTS)
    return store


def asked(text: str = "", top: int = 2, mode: str = "default", **more: object) -> VectorStoreQuery:
    embedding = EMBEDDER.encode_queries([text])[0].tolist() if text else None
    return VectorStoreQuery(embedding, top, query_str=text, mode=VectorStoreQueryMode(mode), **more)


def where(*filters: object, condition: str = "and") -> MetadataFilters:
    made = [
        one if isinstance(one, MetadataFilters) else MetadataFilter(key=one[0], operator=one[1], value=one[2])
        for one in filters
    ]
    return MetadataFilters(filters=made, condition=FilterCondition(condition))


def ids(result) -> list[str]:
    assert result.ids == [one.node_id for one in result.nodes]
    return result.ids


def test_nodes_come_back_as_they_went_in(store: RagkitVectorStore):
    found = {one.node_id: one for one in store.get_nodes()}
    for given in nodes():
        again = found[given.node_id]
        assert (again.text, again.metadata, again.ref_doc_id) == (given.text, given.metadata, given.ref_doc_id)
        assert again.get_content(MetadataMode.EMBED) == given.get_content(MetadataMode.EMBED)


def test_cosine_decides_as_in_llama_indexs_own_store(store: RagkitVectorStore):
    simple = SimpleVectorStore()
    simple.add(nodes())
    for text in ("What do frogs eat?", "stars at night", "Who grinds flour?"):
        mine, theirs = store.query(asked(text, 4)), simple.query(asked(text, 4))
        assert dict(zip(mine.ids, mine.similarities, strict=True)) == pytest.approx(
            dict(zip(theirs.ids, theirs.similarities, strict=True)), abs=1e-5
        )
        assert sorted(mine.similarities, reverse=True) == mine.similarities


@pytest.mark.parametrize("mode", ["text_search", "sparse"])
def test_words_are_found_without_an_embedding(store: RagkitVectorStore, mode: str):
    result = store.query(VectorStoreQuery(query_str="flour", similarity_top_k=3, mode=VectorStoreQueryMode(mode)))
    assert ids(result) == ["miller"]
    assert result.similarities[0] > 0


def test_hybrid_weighs_both_legs(store: RagkitVectorStore):
    by_words = store.query(asked("ponds", 4, "hybrid", alpha=0.0))
    assert set(ids(by_words)[:2]) == {"frogs", "stars"}
    by_vectors = store.query(asked("ponds", 4, "hybrid", alpha=1.0))
    assert ids(by_vectors) == ids(store.query(asked("ponds", 4)))
    assert len(ids(store.query(asked("ponds", 4, "hybrid", hybrid_top_k=1)))) == 1
    with pytest.raises(UsageError, match="alpha must lie in"):
        store.query(asked("ponds", 4, "hybrid", alpha=1.5))


def test_mmr_prefers_what_is_not_there_yet(store: RagkitVectorStore):
    store.add([node("frogs2", "Frogs live in ponds and eat flies!", "doc-f2", kind="animal")])
    question = asked("Frogs live in ponds and eat flies", 2)
    assert set(ids(store.query(question))) == {"frogs", "frogs2"}
    diverse = asked("Frogs live in ponds and eat flies", 2, "mmr", mmr_threshold=0.3)
    assert len({"frogs", "frogs2"} & set(ids(store.query(diverse)))) == 1


@pytest.mark.parametrize("mode", ["svm", "logistic_regression", "linear_regression", "semantic_hybrid"])
def test_modes_that_a_store_has_not_are_refused(store: RagkitVectorStore, mode: str):
    with pytest.raises(UsageError, match=f"has no query mode '{mode}'; it has default, text_search"):
        store.query(asked("frogs", 1, mode))


@pytest.mark.parametrize(
    ("query", "said"),
    [
        (VectorStoreQuery(similarity_top_k=1), "needs an embedding"),
        (VectorStoreQuery([1.0] * 64, mode=VectorStoreQueryMode.TEXT_SEARCH), "needs its text"),
        (VectorStoreQuery([1.0] * 3), "has 3 dimensions, and the store's vectors, made by hash@64, have 64"),
        (VectorStoreQuery([0.0] * 64), "has no direction"),
        (VectorStoreQuery([1.0] * 64, embedding_field="other"), "one vector here"),
    ],
)
def test_queries_that_lack_something_say_what(store: RagkitVectorStore, query: VectorStoreQuery, said: str):
    with pytest.raises(UsageError, match=said):
        store.query(query)


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        (where(("kind", "==", "animal")), {"frogs", "toads"}),
        (where(("legs", "==", 4)), {"frogs", "toads"}),
        (where(("legs", "==", "4")), set()),
        (where(("legs", ">", 2)), {"frogs", "toads"}),
        (where(("legs", ">=", 2)), {"frogs", "toads", "miller"}),
        (where(("legs", "<", 2)), {"stars"}),
        (where(("legs", "<=", 2)), {"stars", "miller"}),
        (where(("kind", "!=", "animal")), {"stars", "miller"}),
        (where(("kind", "in", ["thing", "person"])), {"stars", "miller"}),
        (where(("kind", "nin", ["thing", "person"])), {"frogs", "toads"}),
        (where(("tags", "any", ["wet", "dry"])), {"frogs", "toads"}),
        (where(("tags", "all", ["wet", "green"])), {"frogs"}),
        (where(("tags", "contains", "dry")), {"toads"}),
        (where(("note", "text_match", "Warty")), {"toads"}),
        (where(("note", "text_match", "warty")), set()),
        (where(("note", "text_match_insensitive", "wARTY")), {"toads"}),
        (where(("note", "is_empty", None)), {"frogs", "stars", "miller"}),
        (where(("kind", "==", "animal"), ("tags", "contains", "dry")), {"toads"}),
        (where(("kind", "==", "thing"), ("legs", "==", 2), condition="or"), {"stars", "miller"}),
        (where(("kind", "==", "thing"), ("legs", "==", 2), condition="not"), {"frogs", "toads"}),
        (where(where(("legs", ">", 2)), where(("note", "is_empty", None))), {"frogs"}),
        (where(("legs", ">", "two")), set()),
    ],
)
def test_every_filter_operator_works(store: RagkitVectorStore, filters: MetadataFilters, expected: set[str]):
    assert set(ids(store.query(asked("frogs and stars", 4, filters=filters)))) == expected
    assert {one.node_id for one in store.get_nodes(filters=filters)} == expected


def test_the_operators_are_all_of_llama_indexs():
    from ragkit.integrations.llama_index_filters import _TESTS

    assert {*_TESTS, FilterOperator.IS_EMPTY} == set(FilterOperator)


@pytest.mark.parametrize(("key", "operator", "value"), [("kind", "in", "animal"), ("kind", "text_match", 3)])
def test_filters_with_impossible_values_are_refused(store: RagkitVectorStore, key, operator, value):
    with pytest.raises(UsageError, match=f"the filter kind {operator} takes a"):
        store.query(asked("frogs", 4, filters=where((key, operator, value))))


def test_queries_can_be_kept_to_nodes_and_documents(store: RagkitVectorStore):
    assert set(ids(store.query(asked("live", 4, node_ids=["toads", "none"])))) == {"toads"}
    assert set(ids(store.query(asked("live", 4, doc_ids=["doc-s", "doc-m"])))) == {"stars", "miller"}
    assert ids(store.query(asked("live", 4, doc_ids=["none"]))) == []
    assert [one.node_id for one in store.get_nodes(["stars"])] == ["stars"]


def test_deleting_a_document_takes_its_nodes_alone(store: RagkitVectorStore):
    store.add([node("f2", "Frogs jump far.", "doc-f"), node("g", "Geese fly far.", "doc-g")])
    store.delete("doc-f")
    assert {one.node_id for one in store.get_nodes()} == {"toads", "stars", "miller", "g"}
    store.delete("doc-f")


def test_single_nodes_can_be_deleted(store: RagkitVectorStore):
    store.add([node("f2", "Frogs jump far.", "doc-f")])
    store.delete_nodes(["frogs"])
    assert {one.node_id for one in store.get_nodes()} == {"f2", "toads", "stars", "miller"}
    store.delete_nodes(filters=where(("kind", "==", "animal")))
    assert {one.node_id for one in store.get_nodes()} == {"f2", "stars", "miller"}
    store.delete_nodes()
    assert len(store.get_nodes()) == 3
    store.clear()
    assert store.get_nodes() == []


def test_adding_again_replaces_and_nothing_stands_twice(store: RagkitVectorStore, pipeline: Pipeline):
    before = pipeline.store.counts()
    store.add(nodes())
    after = pipeline.store.counts()
    assert (
        (after.documents, after.chunks, after.sources) == (before.documents, before.chunks, before.sources) == (4, 4, 4)
    )
    store.add([node("frogs", "Frogs are green.", "doc-f", kind="animal")])
    assert {one.node_id: one.text for one in store.get_nodes()}["frogs"] == "Frogs are green."
    assert pipeline.store.counts().chunks == 4


def test_a_node_that_moves_to_another_document_leaves_its_old_one(store: RagkitVectorStore):
    store.add([node("frogs", TEXTS["frogs"], "doc-new")])
    assert {one.node_id: one.ref_doc_id for one in store.get_nodes()}["frogs"] == "doc-new"
    store.delete("doc-f")
    assert len(store.get_nodes()) == 4


def test_nodes_of_equal_text_are_all_found(store: RagkitVectorStore):
    store.add([node("a", "Left blank.", "doc-1"), node("b", "Left blank.", "doc-2")])
    assert set(ids(store.query(asked("left blank", 2)))) == {"a", "b"}
    store.delete("doc-1")
    assert ids(store.query(asked("left blank", 1))) == ["b"]


def test_a_known_text_with_another_vector_is_refused(store: RagkitVectorStore):
    other = node("frogs", TEXTS["frogs"], "doc-f", kind="animal", legs=4, tags=["wet", "green"])
    other.embedding = [1.0, *[0.0] * 63]
    with pytest.raises(UsageError, match="holds the text of node frogs with another vector"):
        store.add([other])


def test_vectors_of_another_embedder_are_refused(store: RagkitVectorStore, tmp_path: Path):
    other = RagkitVectorStore(folder=str(tmp_path / "store"), embedder_id="another")
    other._pipeline = store.client
    with pytest.raises(EmbedderMismatchError, match="hash@64"):
        other.add([node("x", "New text.", "doc-x")])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"embedding": None}, "has no embedding"),
        ({"embedding": [0.0] * 64}, "has no direction"),
        ({"text": " "}, "has no text"),
    ],
)
def test_impossible_nodes_are_refused(store: RagkitVectorStore, change: dict, said: str):
    bad = TextNode(id_="x", text="Text.", embedding=[1.0] * 64).model_copy(update=change)
    if "text" in change:
        bad.set_content(change["text"])
    with pytest.raises(UsageError, match=f"node x {said}"):
        store.add([bad])


def test_nodes_keep_their_own_text_behind_any_template(store: RagkitVectorStore):
    made = node("t", "Own text.", "doc-t", author="Ann")
    made.text_template = "{content}\n--\n{metadata_str}"
    made.embedding = EMBEDDER.encode([made.get_content(MetadataMode.EMBED)])[0].tolist()
    store.add([made])
    assert store.get_nodes(["t"])[0].text == "Own text."


def test_a_store_without_nodes_is_missing(tmp_path: Path):
    with pytest.raises(StoreMissingError):
        RagkitVectorStore(folder=str(tmp_path / "none")).query(VectorStoreQuery([1.0]))
    RagkitVectorStore(folder=str(tmp_path / "none")).delete("doc")


def test_what_ragkit_ingested_is_found_with_its_places(pipeline: Pipeline):
    text = "# Frogs\n\nFrogs live in ponds.\n\n# Stars\n\nStars shine at night."
    pipeline.ingest([Document.from_text(text, "wiki:1", metadata={"lang": "en"})])
    store = RagkitVectorStore.from_pipeline(pipeline)
    found = store.query(asked("Stars shine", 1)).nodes[0]
    assert text[found.start_char_idx : found.end_char_idx] == found.text
    assert (found.ref_doc_id, found.metadata["uri"], found.metadata["lang"]) == ("wiki:1", "wiki:1", "en")
    by_uri = where(("uri", "==", "wiki:1"), ("lang", "==", "en"))
    assert ids(store.query(asked("Stars shine", 1, filters=by_uri))) == [found.node_id]
    assert [one.node_id for one in store.get_nodes([found.node_id])] == [found.node_id]
    with pytest.raises(UsageError, match="a chunk of wiki:1 goes with its document alone"):
        store.delete_nodes([found.node_id])
    store.delete("wiki:1")
    assert store.get_nodes() == []


def test_ragkit_finds_what_llama_index_wrote(store: RagkitVectorStore, pipeline: Pipeline):
    hit = pipeline.search("Who grinds flour?", filter={"kind": "person"}).hits[0]
    assert hit.uri == "llama-index:doc-m#node=miller"
    assert hit.text.endswith(TEXTS["miller"])
    assert pipeline.verify().problems == ()


def test_everything_has_its_asynchronous_form(pipeline: Pipeline):
    async def run():
        assert await store.async_add(nodes()) == list(TEXTS)
        found = await store.aquery(asked("Who grinds flour?", 1))
        await store.adelete("doc-f")
        await store.adelete_nodes(["toads"])
        left = await store.aget_nodes()
        await store.aclear()
        return found.ids, {one.node_id for one in left}, await store.aget_nodes()

    store = RagkitVectorStore.from_pipeline(pipeline)
    assert asyncio.run(run()) == (["miller"], {"stars", "miller"}, [])


def test_settings_are_serialised():
    made = RagkitVectorStore(folder="x", embedder_id="y")
    assert made.to_dict()["class_name"] == "RagkitVectorStore"
    again = RagkitVectorStore.from_dict(made.to_dict())
    assert (again.folder, again.embedder_id) == ("x", "y")
