"""Both legs over a real store, with an embedder of hashed words."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from doubles import HashEmbedder
from filled_store import fill

from ragkit.config import FusionMethod, RetrievalConfig, SearchMode
from ragkit.errors import RetrievalError, UsageError
from ragkit.retrieval.retriever import Retriever
from ragkit.store.store import Store

DOCUMENTS = {
    "animals": ["the cat sleeps on the mat ", "the dog barks at night ", "a horse runs over the field "],
    "ships": ["a ship sails into the harbour ", "the captain reads a map ", "cargo waits on the pier "],
    "bread": ["flour and water make dough ", "the oven bakes the bread ", "salt keeps the dough firm "],
}


@pytest.fixture
def retriever(store: Store) -> Retriever:
    embedder = HashEmbedder(64)
    fill(store, embedder, DOCUMENTS, {"ships": {"topic": "sea", "year": 1850}, "bread": {"topic": "kitchen"}})
    return Retriever(store, embedder, RetrievalConfig(k=3))


@pytest.mark.parametrize("mode", list(SearchMode))
@pytest.mark.parametrize("fusion", list(FusionMethod))
def test_the_chunk_that_says_it_comes_first_in_every_mode(store: Store, mode: SearchMode, fusion: FusionMethod) -> None:
    embedder = HashEmbedder(64)
    fill(store, embedder, DOCUMENTS)
    hits = Retriever(store, embedder, RetrievalConfig(fusion=fusion)).search("ship sails harbour", 3, mode=mode)
    assert store.chunks_by_id([hits[0].chunk_id])[0].chunk.text == DOCUMENTS["ships"][0]
    assert [hit.rank for hit in hits] == list(range(1, len(hits) + 1))
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)


def test_a_hybrid_hit_carries_its_score_in_each_leg(retriever: Retriever) -> None:
    best, *others = retriever.retrieve("oven bakes bread").chunks
    assert best.score == pytest.approx(1.0)
    assert best.dense is not None
    assert 0 < best.dense <= 1
    assert best.bm25 is not None
    assert all(hit.dense is not None for hit in others)


def test_the_dense_score_of_what_only_bm25_found_is_exact(store: Store) -> None:
    embedder = HashEmbedder(64)
    fill(store, embedder, DOCUMENTS)
    narrow = Retriever(store, embedder, RetrievalConfig(candidates=1, k=1))
    question = "harbour harbour cat dog horse map pier flour"
    wide = {
        hit.stored.row_id: hit.dense
        for hit in Retriever(store, embedder, RetrievalConfig(k=9)).retrieve(question).chunks
    }
    for hit in narrow.retrieve(question, 1).chunks:
        assert hit.dense == pytest.approx(wide[hit.stored.row_id], abs=1e-6)


@pytest.mark.parametrize("mode", list(SearchMode))
def test_filters_hold_before_the_legs_search_not_after(store: Store, mode: SearchMode) -> None:
    embedder = HashEmbedder(64)
    crowd = {f"crowd{number}": [f"red fox {number} "] for number in range(60)}
    fill(store, embedder, crowd | {"wanted": ["red fox beyond every candidate list "]}, {"wanted": {"keep": True}})
    found = Retriever(store, embedder, RetrievalConfig(candidates=2, k=1)).retrieve("red fox", 1, {"keep": True}, mode)
    assert [hit.stored.uri for hit in found.chunks] == ["wanted"]


def test_a_filter_that_nothing_fulfils_finds_nothing(retriever: Retriever) -> None:
    assert retriever.search("ship", filter={"topic": "space"}) == []
    assert [hit.stored.uri for hit in retriever.retrieve("dough", 9, {"year": 1850}).chunks] == ["ships"] * 3


def test_bm25_alone_asks_no_embedder_and_reads_no_vectors(
    retriever: Retriever, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Store, "vectors", lambda store: pytest.fail("vectors were read"))
    embedded = retriever._embedder.texts_embedded  # type: ignore[attr-defined]
    found = retriever.retrieve("oven bakes", mode="bm25")
    assert found.chunks[0].dense is None
    assert retriever._embedder.texts_embedded == embedded  # type: ignore[attr-defined]
    assert set(found.timings_ms) == {"bm25", "fuse", "chunks", "retrieve"}


def test_timings_name_every_step(retriever: Retriever) -> None:
    timings = retriever.retrieve("oven").timings_ms
    assert set(timings) == {"embed", "dense", "bm25", "fuse", "chunks", "retrieve"}
    assert all(0 < value <= timings["retrieve"] for value in timings.values())


def test_search_follows_the_store(retriever: Retriever, store: Store) -> None:
    before = retriever.retrieve("zebra crossing")
    fill(store, retriever._embedder, {"new": ["a zebra crossing the road "]})
    after = retriever.retrieve("zebra crossing")
    assert after.chunks[0].stored.uri == "new"
    assert after.generation == before.generation + 1
    with store.writer() as writer:
        writer.remove(["new"])
    assert "new" not in {hit.stored.uri for hit in retriever.retrieve("zebra crossing", 9).chunks}


def test_repeated_text_is_shown_once_and_the_place_goes_to_another(store: Store) -> None:
    embedder = HashEmbedder(64)
    fill(
        store,
        embedder,
        {f"copy{number}": ["red fox ", f"filler {number} "] for number in range(5)} | {"b": ["red hen "]},
    )
    texts = [
        hit.stored.chunk.text for hit in Retriever(store, embedder, RetrievalConfig()).retrieve("red fox", 2).chunks
    ]
    assert texts == ["red fox ", "red hen "]


def test_equal_searches_give_equal_hits_from_many_threads(retriever: Retriever) -> None:
    expected = retriever.search("the dog and the dough", 9)
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda _: retriever.search("the dog and the dough", 9), range(40)))
    assert all(result == expected for result in results)


def test_an_empty_store_finds_nothing(store: Store) -> None:
    embedder = HashEmbedder(64)
    fill(store, embedder, {})
    assert Retriever(store, embedder, RetrievalConfig()).search("anything") == []


def test_a_failing_embedder_is_an_error_and_the_next_search_works(
    retriever: Retriever, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(texts: list[str]) -> np.ndarray:
        raise RetrievalError("no vector today")

    with monkeypatch.context() as patch:
        patch.setattr(retriever._embedder, "encode_queries", broken)
        with pytest.raises(RetrievalError, match="no vector today"):
            retriever.search("ship")
    assert retriever.search("ship")


def test_impossible_k_and_mode_are_usage_errors(retriever: Retriever) -> None:
    with pytest.raises(UsageError, match="k must be at least 1, got 0"):
        retriever.search("ship", 0)
    with pytest.raises(UsageError, match="there is no search mode 'fuzzy'; take one of hybrid, dense, bm25"):
        retriever.search("ship", mode="fuzzy")
