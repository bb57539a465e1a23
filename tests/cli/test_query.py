"""`ragkit query`: a streamed answer with citations, and its JSON."""

from __future__ import annotations

import logging
import sys
from dataclasses import replace

import pytest
from pipeline_double import FakePipeline, FakeStream

from ragkit.config import Strategy
from ragkit.types import AttendedSpan, DraftUse, KVUse, TokenUsage


def test_the_answer_comes_first_then_the_citations_then_the_timings(run):
    result = run("query", "How tall is the tower?")
    assert result.code == 0
    assert result.out == 'It is 330 metres tall.\n\n[1] /docs/tower.pdf, page 3: "The tower is 330 metres tall."\n'
    assert result.err == (
        "load models 900 ms, retrieve 20 ms, load kv 0 ms, prefill 50 ms, first token 75 ms, total 115 ms; "
        "200 prompt and 5 new tokens\n"
    )


def test_the_answer_is_written_piece_by_piece(run, world, monkeypatch):
    writes = []
    monkeypatch.setattr("ragkit.cli.output.Output.write", lambda self, text: writes.append(text))
    run("query", "How tall is the tower?")
    assert "".join(writes[:3]) == world.answer.text
    assert all(len(piece) < len(world.answer.text) for piece in writes[:3])


def test_a_citation_without_pages_names_the_document_alone(run, world):
    world.answer = replace(world.answer, citations=(replace(world.answer.citations[0], page=None, quote="a\n  b"),))
    assert '\n[1] /docs/tower.pdf: "a b"\n' in run("query", "q").out


def test_what_is_not_in_the_store_is_said_plainly(run, world):
    world.answer = replace(world.answer, text="I do not know.", found=False, citations=())
    result = run("query", "q")
    assert result.out == "I do not know.\n(not found: nothing in the store supports an answer)\n"
    assert result.code == 0
    assert run("query", "q", "--json").json["found"] is False


def test_quiet_leaves_the_answer_alone_on_stdout(run):
    result = run("query", "q", "--quiet")
    assert (result.out, result.err) == ("It is 330 metres tall.\n", "")


def test_warnings_of_the_answer_reach_stderr(run, world):
    world.answer = replace(world.answer, warnings=("2 chunks did not fit",))
    assert "warning: 2 chunks did not fit\n" in run("query", "q").err
    assert run("query", "q", "--json").json["warnings"] == ["2 chunks did not fit"]


def test_a_model_cannot_steer_the_terminal(run, world):
    world.answer = replace(world.answer, text="red \x1b[31m\x07 end", citations=())
    assert run("query", "q").out == "red [31m end\n"
    assert run("query", "q", "--json").json["answer"] == "red \x1b[31m\x07 end"


def test_the_json_has_the_keys_that_other_tools_rely_on(run):
    result = run("query", "How tall is the tower?", "--json")
    assert result.err == ""
    assert result.json == {
        "answer": "It is 330 metres tall.",
        "found": True,
        "citations": [
            {
                "uri": "/docs/tower.pdf",
                "page": 3,
                "char_start": 120,
                "char_stop": 149,
                "quote": "The tower is 330 metres tall.",
                "score": 0.75,
                "doc_id": "d" * 32,
            }
        ],
        "strategy": "full",
        "model": "tiny",
        "tokens": {"prompt": 200, "reused": 0, "recomputed": 200, "generated": 5},
        "dropped_chunks": [],
        "warnings": [],
        "kv": {"hits": 0, "misses": 0, "holes": 0, "bytes_by_tier": {}, "recomputed": 0},
        "draft": {"mode": "none", "drafter": "", "drafted": 0, "accepted": 0, "steps": 0, "ms_per_step": 10.0},
        "timings_ms": {
            "load_models": 900.0,
            "retrieve": 20.0,
            "load_kv": 0.0,
            "prefill": 50.0,
            "first_token": 75.0,
            "total": 115.0,
        },
        "attended": [],
    }


def test_an_answer_from_pages_says_where_it_looked(run, world):
    world.answer = replace(
        world.answer,
        strategy="pages",
        tokens=TokenUsage(prompt=9020, reused=9000, recomputed=20, generated=5),
        kv=KVUse(hits=300, bytes_by_tier={"disk": 2_000_000}),
        attended=(AttendedSpan(640, 704, 2500, 2760, 0.75), AttendedSpan(64, 128, 250, 500, 0.5)),
    )
    said = run("query", "q").err
    assert "9,000 tokens in pages (2.0 MB from disk); attended to most, beside the beginning and the end: " in said
    assert "characters 2,500 to 2,760, 250 to 500" in said
    assert run("query", "q", "--json").json["attended"][0] == {
        "token_start": 640, "token_stop": 704, "char_start": 2500, "char_stop": 2760, "share": 0.75,
    }  # fmt: skip


def test_the_json_says_what_was_reused(run, world):
    world.answer = replace(
        world.answer,
        strategy="blend",
        tokens=TokenUsage(prompt=200, reused=150, recomputed=50, generated=5),
        kv=KVUse(hits=3, misses=1, holes=1, bytes_by_tier={"ram": 100, "disk": 2000}, recomputed=2),
    )
    data = run("query", "q", "--json").json
    tiers = {"ram": 100, "disk": 2000}
    assert data["kv"] == {"hits": 3, "misses": 1, "holes": 1, "bytes_by_tier": tiers, "recomputed": 2}
    assert (data["strategy"], data["tokens"]["reused"], data["tokens"]["recomputed"]) == ("blend", 150, 50)


def test_what_was_reused_is_said_in_a_line_of_its_own(run, world):
    kv = KVUse(hits=3, misses=1, bytes_by_tier={"ram": 1_200_000, "disk": 2_500_000})
    world.answer = replace(world.answer, tokens=TokenUsage(200, 150, 50, 5), kv=kv)
    assert run("query", "q").err.splitlines()[1] == (
        "150 prompt tokens reused, 50 recomputed; KV of chunks: 3 found (1.2 MB from ram, 2.5 MB from disk), 1 computed"
    )
    world.answer = replace(world.answer, kv=KVUse(recomputed=4))
    line = run("query", "q").err.splitlines()[1]
    assert line.endswith("KV of chunks: 0 found, 0 computed, 4 computed because that is sooner than loading")
    assert run("query", "q", "-q").err == ""


@pytest.mark.parametrize(
    ("ratio", "said"),
    [
        ("1.5", "blend.ratio must lie in [0, 1] or be auto, got 1.5 (set by --ratio)"),
        ("-1", "blend.ratio must lie in [0, 1] or be auto, got -1.0 (set by --ratio)"),
        ("nan", "blend.ratio must lie in [0, 1] or be auto, got nan (set by --ratio)"),
        ("half", "--ratio takes a number from 0 to 1 or auto, got 'half'"),
        ("Auto", "--ratio takes a number from 0 to 1 or auto, got 'Auto'"),
    ],
)
def test_an_impossible_ratio_is_wrong_usage(run, ratio, said):
    done = run("query", "q", "--ratio", ratio)
    assert done.code == 2
    assert done.err.splitlines() == [f"error: {said}"]


def test_the_ratio_may_be_left_to_each_question(run, world):
    run("query", "q", "--ratio", "auto")
    assert world.configs[0].blend.ratio == "auto"


def test_every_option_reaches_the_configuration(run, world):
    decoding = ["--max-new-tokens", "7", "--temperature", "0.5", "--top-p", "0.9", "--seed", "11"]
    options = ["-k", "3", "--strategy", "blend", "--ratio", "0.3", "--generator", "m", *decoding]
    run("query", "q", *options, "--system-prompt", "Be brief.")
    config = world.configs[0]
    assert config.retrieval.k == 3
    generation = config.generation
    assert (generation.strategy, generation.max_new_tokens, generation.seed) == (Strategy.BLEND, 7, 11)
    assert config.blend.ratio == 0.3
    assert (generation.temperature, generation.top_p) == (0.5, 0.9)
    assert (generation.model, generation.system_prompt) == ("m", "Be brief.")


def test_document_and_filters_reach_the_pipeline(run, world):
    run("query", "q", "--document", "a.pdf", "--filter", "year=2020", "--filter", "title=a=b")
    assert world.calls == [
        ("stream", {"question": "q", "document": "a.pdf", "filter": {"year": "2020", "title": "a=b"}})
    ]


@pytest.mark.parametrize("filters", [["year"], ["=2020"], ["year=1", "year=2"]])
def test_an_impossible_filter_is_wrong_usage(run, filters):
    arguments = [part for text in filters for part in ("--filter", text)]
    assert run("query", "q", *arguments).code == 2


def test_on_a_terminal_a_line_says_what_is_waited_for_and_goes_away(run, monkeypatch):
    monkeypatch.setattr("ragkit.cli.output.is_terminal", lambda stream: stream is sys.stderr)
    monkeypatch.setenv("NO_COLOR", "1")
    err = run("query", "q").err
    assert err.startswith("loading models, retrieving …\r\x1b[K")
    assert err.count("\r\x1b[K") == 1


def test_a_log_line_takes_the_place_of_what_is_waited_for(run, world, monkeypatch):
    monkeypatch.setattr("ragkit.cli.output.is_terminal", lambda stream: stream is sys.stderr)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(FakePipeline, "stream", _stream_with_a_warning)
    assert run("query", "q").err.startswith("loading models, retrieving …\r\x1b[Kwarning: falling back\n")


def _stream_with_a_warning(self, question, *, filter=None, document=None, ratio=None, progress=None):
    logging.getLogger("ragkit.generation").warning("falling back")
    return FakeStream(self.world.answer)


def test_a_file_below_the_working_folder_is_named_by_its_path_from_there(tmp_path, monkeypatch):
    from ragkit.cli.query import place_of

    monkeypatch.chdir(tmp_path)
    assert place_of(f"{tmp_path}/docs/a.pdf", 3) == "docs/a.pdf, page 3"
    assert place_of("/elsewhere/b.txt", None) == "/elsewhere/b.txt"


def test_what_was_drafted_is_said_in_a_line_of_its_own_and_in_the_json(run, world):
    world.answer = replace(world.answer, draft=DraftUse("exact", "lookup", 40, 25, 12, 7.25))
    assert "drafted by lookup (exact): 25 of 40 tokens stood, 12 passes of 7.2 ms\n" in run("query", "q").err
    assert run("query", "q", "--json").json["draft"] == {
        "mode": "exact", "drafter": "lookup", "drafted": 40, "accepted": 25, "steps": 12, "ms_per_step": 7.25,
    }  # fmt: skip


@pytest.mark.parametrize("mode", ["exact", "transfer"])
def test_an_answer_for_which_nothing_was_drafted_is_said_to_be_so_and_not_moved(run, world, mode):
    world.answer = replace(world.answer, draft=DraftUse(mode, "self", 0, 0, 12, 7.25))
    err = run("query", "q").err
    assert f"nothing was drafted by self ({mode}), as nothing seemed to pay; 12 passes of 7.2 ms\n" in err
    assert "moved" not in err


def test_an_answer_that_drafts_have_moved_is_said_to_be_so(run, world):
    world.answer = replace(world.answer, draft=DraftUse("transfer", "self", 40, 30, 10, 5.0))
    assert "the answer is not the model's own" in run("query", "q").err


@pytest.mark.parametrize(
    ("options", "drafter", "mode"),
    [
        ((), "none", "exact"),
        (("--draft", "lookup"), "lookup", "exact"),
        (("--draft", "none"), "none", "exact"),
        (("--draft", "self", "--transfer"), "self", "transfer"),
        (("--draft", "some/model", "--exact"), "some/model", "exact"),
    ],
)
def test_options_of_drafting_reach_the_configuration(run, world, options, drafter, mode):
    run("query", "q", *options)
    config = world.configs[0].draft
    assert (config.drafter, config.mode) == (drafter, mode)


def test_a_lookup_cannot_transfer(run):
    result = run("query", "q", "--draft", "lookup", "--transfer")
    assert result.code == 2
    assert "lookup has none" in result.err


@pytest.mark.parametrize("option", ["--exact", "--transfer"])
def test_what_drafts_may_do_is_only_said_of_drafts(run, option):
    result = run("query", "q", option)
    assert result.code == 2
    assert "what drafts may do" in result.err
    assert "name a drafter" in result.err


@pytest.mark.parametrize("strategy", ["full", "pages"])
def test_a_ratio_for_a_strategy_that_has_none_is_wrong_usage(run, strategy):
    result = run("query", "q", "--strategy", strategy, "--ratio", "0.3")
    assert result.code == 2
    assert f"the strategy is {strategy}: leave the ratio out" in result.err
    assert run("query", "q", "--strategy", "auto", "--ratio", "0.3").code == 0
