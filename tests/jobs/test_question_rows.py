"""Rows of questions from JSON Lines, CSV and Parquet: ids, options, what is unknown and what is wrong."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from batch_world import write_jsonl

from ragkit.answers.options import QuestionChanges
from ragkit.errors import UsageError
from ragkit.jobs.question_files import open_questions
from ragkit.jobs.question_rows import RowReader
from ragkit.jobs.rows import QuestionRow
from ragkit.jobs.spooled_rows import spooled_rows


def read(source: Path, defaults: QuestionChanges | None = None) -> tuple[list[QuestionRow], list[str]]:
    reader = RowReader(defaults)
    with open_questions(str(source)) as file:
        rows = list(reader.rows(file.records()))
        return rows, [*file.remarks, *reader.remarks()]


def rows_of(tmp_path: Path, *rows: dict[str, Any]) -> list[QuestionRow]:
    return read(write_jsonl(tmp_path / "q.jsonl", rows))[0]


def test_an_id_that_is_missing_is_made_from_the_line(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text('{"question": "One?"}\n\n{"id": 7, "question": "Two?"}\n{"id": "", "question": "Three?"}\n')
    assert [row.row_id for row in read(path)[0]] == ["row-1", 7, "row-4"]


def test_options_of_a_row_are_converted_and_checked(tmp_path: Path) -> None:
    good, *bad = rows_of(
        tmp_path,
        {"question": "a", "k": 3, "ratio": "auto", "temperature": 1, "top_p": 0.5, "seed": 4, "max_new_tokens": 9,
         "strategy": "blend", "document": "d", "system_prompt": "s", "filter": {"year": 2023}},
        {"question": "a", "k": 2.5}, {"question": "a", "temperature": "warm"}, {"question": "a", "filter": [1]},
        {"question": "a", "seed": True}, {"question": 5}, {"id": [1], "question": "a"},
    )  # fmt: skip
    assert good.changes == QuestionChanges(3, "blend", "auto", {"year": 2023}, "d", "s", 9, 1.0, 0.5, 4)
    assert [row.error.message.split(",")[0] for row in bad if row.error] == [
        "k must be a whole number", "temperature must be a number",
        'filter must be an object such as {"year": 2023}', "seed must be a whole number", "a row needs a question",
        "an id is a text or a whole number",
    ]  # fmt: skip


def test_cells_of_csv_are_converted_and_empty_ones_left_out(tmp_path: Path) -> None:
    path = tmp_path / "q.csv"
    path.write_text(
        'id;question;k;temperature;filter\n1;"Where; and when?";4;0.5;lang=en\n2;What?;;;"{""year"": 2023}"\n'
    )
    rows, _ = read(path)
    assert [(row.row_id, row.question) for row in rows] == [("1", "Where; and when?"), ("2", "What?")]
    assert rows[0].changes == QuestionChanges(k=4, temperature=0.5, filter={"lang": "en"})
    assert rows[1].changes == QuestionChanges(filter={"year": 2023})


def test_parquet_rows_keep_their_types_and_leave_nulls_out(tmp_path: Path) -> None:
    table = pa.table({"id": [1, 2], "question": ["a", "b"], "k": [None, 5], "filter": [{"x": "1", "y": None}, None]})
    pq.write_table(table, tmp_path / "q.parquet")
    one, two = read(tmp_path / "q.parquet")[0]
    assert (one.row_id, one.changes) == (1, QuestionChanges(filter={"x": "1"}))
    assert (two.row_id, two.changes) == (2, QuestionChanges(k=5))


def test_a_row_may_say_how_it_is_drafted(tmp_path: Path) -> None:
    rows, remarks = read(write_jsonl(tmp_path / "q.jsonl", [{"question": "a", "draft": "self", "draft_mode": "exact"}]))
    assert (rows[0].changes, rows[0].error) == (QuestionChanges(draft="self", draft_mode="exact"), None)
    assert remarks == []
    assert QuestionRow.from_json(rows[0].to_json()) == rows[0]


def test_unknown_columns_are_left_out_and_said_with_the_nearest_name(tmp_path: Path) -> None:
    rows, remarks = read(write_jsonl(tmp_path / "q.jsonl", [{"question": "a", "temprature": 1, "gold": "x"}]))
    assert rows[0].changes == QuestionChanges()
    assert remarks == [
        "columns that mean nothing to a batch were left out: 'temprature' (did you mean 'temperature'?), 'gold'"
    ]


def test_a_filter_of_a_row_adds_to_that_of_the_command(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "q.jsonl", [{"question": "a"}, {"question": "b", "filter": {"lang": "de", "x": 1}}])
    rows, _ = read(path, QuestionChanges(filter={"lang": "en", "year": 2023}))
    assert rows[0].changes.filter == {"lang": "en", "year": 2023}
    assert rows[1].changes.filter == {"lang": "de", "year": 2023, "x": 1}


def test_a_row_goes_through_json_and_comes_back_equal(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, {"id": 3, "question": "ä?", "k": 2, "filter": {"a": 1}}, {"id": "x", "question": ""})
    assert [QuestionRow.from_json(row.to_json()) for row in rows] == rows


def test_lines_in_another_encoding_are_read(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_bytes('{"question": "Größe?"}\n'.encode("utf-16"))
    assert read(path)[0][0].question == "Größe?"


def test_standard_input_holds_json_lines() -> None:
    with open_questions("-", io.BytesIO(b'{"question": "a"}\n')) as file:
        assert [record.values for record in file.records()] == [{"question": "a"}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("q.txt", "a", "must end in .jsonl"),
        ("q.csv", "id,query\n1,a\n", r"has no column 'question'; it has 'id', 'query' \(did you mean 'question'\?\)"),
        ("q.parquet", "PAR1", "not readable as Parquet"),
        ("q.csv", "", "cannot be read"),
    ],
)
def test_a_file_that_holds_no_questions_is_refused(tmp_path: Path, name: str, content: str, message: str) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(UsageError, match=message):
        read(path)


@pytest.mark.parametrize("source", ["absent.jsonl", "memory://absent/q.jsonl", "nosuch://x/q.jsonl"])
def test_a_file_that_is_not_there_is_named(source: str) -> None:
    with pytest.raises(UsageError, match=source), open_questions(source):
        pass


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"messages": [{"role": "user", "content": "a"}], "n": 2}, "n cannot be 2"),
        ({"messages": [{"role": "user", "content": "a"}], "stream": True}, "stream cannot be True"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "must hold one question"),
        ({"messages": "a"}, "must be a list"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "must be text"),
        ("text", "body must be an object"),
    ],
)
def test_an_openai_line_that_asks_for_more_is_an_error_of_its_own(tmp_path: Path, body: Any, message: str) -> None:
    [row] = rows_of(tmp_path, {"custom_id": "x", "method": "POST", "url": "/v1/chat/completions", "body": body})
    assert row.error is not None
    assert row.row_id == "x"
    assert message in row.error.message


def test_an_openai_line_may_hold_options_and_parts_of_text(tmp_path: Path) -> None:
    content = [{"type": "text", "text": "Where "}, {"type": "text", "text": "now?"}]
    body = {"model": "m", "messages": [{"role": "user", "content": content}], "k": 3, "max_completion_tokens": 7,
            "temperature": 0.3, "response_format": {"type": "text"}, "user": "u"}  # fmt: skip
    [row] = rows_of(tmp_path, {"custom_id": "x", "body": body})
    assert (row.question, row.error) == ("Where now?", None)
    assert row.changes == QuestionChanges(k=3, max_new_tokens=7, temperature=0.3)


def test_json_lines_in_which_no_row_has_a_question_are_refused_as_a_table_is(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "q.jsonl", [{"prompt": "a", "top_k": 3}, {"prompt": "b"}])
    said = r"'question'; other columns: 'prompt' \(did you mean 'question'\?\), 'top_k' \(did you mean 'k'\?\)$"
    with pytest.raises(UsageError, match=said), spooled_rows(str(path), QuestionChanges(), None, "jsonl"):
        pass
    write_jsonl(path, [{"prompt": "a"}, {"question": "b"}])
    with spooled_rows(str(path), QuestionChanges(), None, "jsonl") as rows:
        assert [row.error is None for row in rows] == [False, True]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("not JSON\n\nnor this\n", "no row of .* holds a question: line 1 is not JSON"),
        ('{\n"question": "a"\n}\n', "no row of .* holds a question: line 1 is not JSON"),
        ('[{"question": "a"}]', "no row of .* holds a question: line 1 must hold an object with a question, got list"),
        ('\n[\n{"question": "a"},\n{"question": "b"}\n]\n', "looks like one JSON array; give JSON Lines"),
        ('[{"question": "a"},\n{"question": "b"}]\n', "looks like one JSON array; give JSON Lines"),
    ],
)
def test_json_that_is_no_json_lines_is_refused_as_a_whole(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "q.json"
    path.write_text(content)
    with pytest.raises(UsageError, match=message), spooled_rows(str(path), QuestionChanges(), None, "jsonl"):
        pass


def test_a_list_among_lines_is_an_error_of_its_own(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "q.jsonl", ["[1, 2]", {"question": "a"}, "["])
    assert [row.error is None for row in read(path)[0]] == [False, True, False]


@pytest.mark.parametrize(("cell", "k"), [("4", 4), ("4.0", 4), (" 4 ", 4), ("4.5", None), ("4.0.0", None), (".", None)])
def test_whole_numbers_of_a_table_may_end_in_point_zero(tmp_path: Path, cell: str, k: int | None) -> None:
    path = tmp_path / "q.csv"
    path.write_text(f"question,k\na,{cell}\n")
    [row] = read(path)[0]
    assert row.changes.k == k
    assert (row.error is None) == (k is not None)
    assert row.error is None or row.error.message == f"k must be a whole number, got {cell!r}"


def test_a_column_that_comes_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "q.parquet"
    pq.write_table(pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["question", "question"]), path)
    with pytest.raises(UsageError, match="more than one column 'question'"):
        read(path)


def test_a_line_that_cannot_be_read_is_answered_in_the_shape_of_the_one_before(tmp_path: Path) -> None:
    openai = {"custom_id": "x", "body": {"messages": [{"role": "user", "content": "a"}]}}
    rows = read(write_jsonl(tmp_path / "q.jsonl", ["no JSON", openai, "no JSON", {"question": "a"}, "no JSON"]))[0]
    assert [row.shape for row in rows] == ["plain", "openai", "openai", "plain", "plain"]
    assert [row.row_id for row in rows] == ["row-1", "x", "row-3", "row-4", "row-5"]


@pytest.mark.parametrize("source", ["-", "q.jsonl"])
def test_a_full_temporary_folder_is_named(tmp_path: Path, source: str) -> None:
    script = """
import io, resource, sys
from ragkit.answers.options import QuestionChanges
from ragkit.errors import StoreSpaceError
from ragkit.jobs.spooled_rows import spooled_rows
sys.stdin = io.TextIOWrapper(open(sys.argv[2], "rb"))
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    with spooled_rows(sys.argv[1], QuestionChanges(), None, "jsonl"):
        pass
except StoreSpaceError as error:
    print(error)
"""
    path = write_jsonl(tmp_path / "q.jsonl", [{"question": "a" * 200}] * 20)
    arguments = [source if source == "-" else str(path), str(path)]
    environ = os.environ | {"TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=True, env=environ
    )
    assert f"rows are kept in {tmp_path} while they are read" in done.stdout
    assert [one.name for one in tmp_path.iterdir()] == ["q.jsonl"]
