"""`ragkit ls`, `rm`, `status`, `gc`, `verify`."""

from __future__ import annotations

from ragkit.reports import KVStatus
from ragkit.store.base import Problem


def test_ls_is_an_aligned_table(run):
    assert run("ls").out.splitlines() == [
        "SOURCE            STATUS  DOCUMENTS  CHUNKS      BYTES",
        "/docs/broken.pdf  failed          0       0  2,000,000",
        "/docs/tower.pdf   ok              1   1,234  2,000,000",
    ]


def test_ls_of_an_empty_store_says_so(run, world):
    world.records = []
    assert run("ls").out == "the store is empty\n"
    assert run("ls", "--json").json == {"sources": []}


def test_ls_json_names_every_source_and_why_it_failed(run):
    broken, tower = run("ls", "--json").json["sources"]
    assert broken["failure"] == {
        "code": "needs_ocr",
        "stage": "parse",
        "message": "no text on any of 3 pages",
        "attempts": 2,
    }
    assert tower == {
        "uri": "/docs/tower.pdf",
        "status": "ok",
        "documents": 1,
        "chunks": 1234,
        "bytes": 2_000_000,
        "sha256": "ab" * 32,
        "media_type": "application/pdf",
        "reader": "pdf",
        "failure": None,
    }


def test_rm_names_what_it_removed(run, world):
    assert run("rm", "a.pdf", "b.pdf").out == "removed a.pdf\nremoved b.pdf\n"
    assert run("rm", "a.pdf", "--erase", "--json").json == {"removed": ["a.pdf"], "erased": True}
    assert world.calls == [
        ("remove", {"uris": ["a.pdf", "b.pdf"], "erase": False}),
        ("remove", {"uris": ["a.pdf"], "erase": True}),
    ]


def test_status_counts_and_names_failed_sources_with_their_reason(run):
    assert run("status").out.splitlines() == [
        "store       .ragkit  (generation 7, format 1)",
        "sources     2  (1 failed, 0 damaged)",
        "documents   1",
        "chunks      1,234  (300,000 tokens)",
        "on disk     4.5 MB  (3 segments)",
        "chunk KV    1,000 of 1,234 chunks, 2.5 GB on disk  (all would take about 3.1 GB as bf16)",
        "embedder    minilm@12  (384 dimensions)",
        "chunker     recursive",
        "failed /docs/broken.pdf (needs_ocr): no text on any of 3 pages",
        "`ragkit ingest SOURCE --retry-failed` tries failed sources again",
    ]


def test_status_json_holds_counts_and_failed_sources(run):
    data = run("status", "--json").json
    assert {key: data[key] for key in ("sources", "failed", "chunks", "tokens", "bytes_on_disk", "generation")} == {
        "sources": 2,
        "failed": 1,
        "chunks": 1234,
        "tokens": 300_000,
        "bytes_on_disk": 4_500_000,
        "generation": 7,
    }
    assert (data["store"], data["embedder"], data["dim"]) == (".ragkit", "minilm@12", 384)
    assert data["kv"] == {
        "chunks": 1000,
        "bytes_by_tier": {"disk": 2_500_000_000},
        "codec": "bf16",
        "estimated_bytes": 3_100_000_000,
        "page_bytes": 0,
        "other_bytes": 0,
        "unknown_bytes": 0,
    }
    assert [source["uri"] for source in data["failed_sources"]] == ["/docs/broken.pdf"]


def test_status_says_how_much_kv_is_of_other_settings_and_what_removes_it(run, world):
    world.kv_status = KVStatus(400, {"disk": 2_500_000_000}, "bf16", None, other_bytes=1_500_000_000)
    lines = run("status").out.splitlines()
    assert "chunk KV    400 of 1,234 chunks, 2.5 GB on disk, 1.5 GB of it of other settings" in lines
    assert "`ragkit gc --unused-kv` removes the chunk KV of other settings" in lines


def test_status_counts_no_kv_where_the_generator_is_not_at_hand(run, world):
    world.kv_status = KVStatus(0, {"disk": 2_500_000_000}, "bf16", None, unknown_bytes=2_500_000_000)
    [line] = [line for line in run("status").out.splitlines() if line.startswith("chunk KV")]
    assert line == (
        "chunk KV    an unknown part of 1,234 chunks, 2.5 GB on disk, "
        "2.5 GB of it of unknown use: the generator is not at hand"
    )


def test_gc_says_what_it_freed(run, world):
    assert run("gc").out == "freed 1.5 MB: 3 files removed, 1 segments rewritten\n"
    assert run("gc", "--json").json == {
        "bytes_freed": 1_500_000,
        "removed_files": 3,
        "rewritten_segments": 1,
        "pending_files": 0,
    }
    assert run("gc", "--unused-kv").code == 0
    assert [arguments for _, arguments in world.calls] == [
        {"unused_kv": False},
        {"unused_kv": False},
        {"unused_kv": True},
    ]


def test_verify_of_a_sound_store_says_how_much_it_checked(run, world):
    result = run("verify")
    assert (result.code, result.out) == (
        0,
        "no damage: 1 documents, 1,234 chunks, 4.0 MB checked at generation 7\n",
    )
    assert world.calls == [("verify", {"repair": False})]


def test_verify_of_a_damaged_store_names_each_part_and_exits_with_4(run, world):
    world.problems = (Problem("segment", "ab12", "its checksum is wrong", "ingest again", ("/docs/tower.pdf",)),)
    result = run("verify", "--repair")
    assert result.code == 4
    assert result.out.splitlines()[1:] == [
        "segment ab12: its checksum is wrong; ingest again",
        "    /docs/tower.pdf",
        "1 sources are marked; the next ingest of them reads them again",
    ]
    assert world.calls == [("verify", {"repair": True})]
    damaged = run("verify", "--json")
    assert damaged.code == 4
    assert damaged.json["problems"] == [
        {
            "part": "segment",
            "name": "ab12",
            "message": "its checksum is wrong",
            "remedy": "ingest again",
            "uris": ["/docs/tower.pdf"],
        }
    ]
