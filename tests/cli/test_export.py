"""`ragkit export`: what it wrote, for people and for programs."""

from __future__ import annotations


def test_what_was_written_is_said(run, world):
    result = run("export", "out.parquet", "--vectors")
    assert result.out == "40 chunks in out.parquet, 12.3 kB\n"
    assert world.calls == [("export", {"target": "out.parquet", "kind": "chunks", "vectors": True})]


def test_documents_are_exported_as_json_says(run, world):
    result = run("export", "out.parquet", "--documents", "--json")
    assert result.json == {"target": "out.parquet", "kind": "documents", "rows": 40, "bytes": 12345, "generation": 7}


def test_a_target_is_needed(run):
    assert run("export").code == 2
