"""`ragkit search`: ranked chunks, for people and as JSON."""

from __future__ import annotations

from dataclasses import replace

from ragkit.config import SearchMode


def test_hits_are_listed_with_their_place_and_an_excerpt_on_one_line(run):
    result = run("search", "tower")
    assert result.out == " 1. 0.0312  /docs/tower.pdf, page 3 [100:400]\n    A tower. The tower is 330 metres tall.\n"
    assert result.err == "retrieve 12 ms, total 12 ms\n"


def test_a_long_chunk_is_cut_for_people_and_whole_in_json(run, world):
    world.hits = (replace(world.hits[0], text="word " * 200),)
    assert all(len(line) <= 250 for line in run("search", "tower").out.splitlines())
    assert run("search", "tower", "--json").json["hits"][0]["text"] == "word " * 200


def test_the_json_has_the_keys_that_other_tools_rely_on(run):
    assert run("search", "tower", "--json").json == {
        "hits": [
            {
                "rank": 1,
                "score": 0.0312,
                "uri": "/docs/tower.pdf",
                "page": 3,
                "char_start": 100,
                "char_stop": 400,
                "text": "A tower.\nThe tower is 330 metres tall.",
                "chunk_id": "c" * 32,
                "metadata": {},
            }
        ],
        "timings_ms": {"retrieve": 12.0, "total": 12.5},
        "warnings": [],
    }


def test_no_hits_are_said_plainly_and_are_no_failure(run, world):
    world.hits = ()
    assert (run("search", "tower").out, run("search", "tower").code) == ("nothing found\n", 0)
    assert run("search", "tower", "--json").json["hits"] == []


def test_every_option_reaches_the_pipeline(run, world):
    run("search", "tower", "-k", "2", "--mode", "bm25", "--filter", "uri=*.pdf")
    assert (world.configs[0].retrieval.k, world.configs[0].retrieval.mode) == (2, SearchMode.BM25)
    assert world.calls == [("search", {"question": "tower", "filter": {"uri": "*.pdf"}})]
