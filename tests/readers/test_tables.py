"""CSV, JSON Lines and Parquet: one document a row, and a bad row is only a bad row."""

from __future__ import annotations

import datetime
import decimal
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ragkit.errors import ReadError
from ragkit.readers import ReadLimits


def texts(result):
    return [document.text for document in result.documents]


def code_of(read, *args, **named):
    with pytest.raises(ReadError) as caught:
        read(*args, **named)
    return caught.value.code


@pytest.fixture
def parquet(tmp_path):
    def write(columns, **named):
        pq.write_table(columns if isinstance(columns, pa.Table) else pa.table(columns), tmp_path / "x", **named)
        return (tmp_path / "x").read_bytes()

    return write


def test_a_row_of_csv_is_a_document_with_the_other_columns_as_metadata(read):
    result = read("a.csv", 'id,Text,lang\n7,"two\nlines",en\n8,plain,de\n')
    assert [document.uri.rsplit("/", 1)[1] for document in result.documents] == ["a.csv#row=1", "a.csv#row=2"]
    assert texts(result) == ["two\nlines", "plain"]
    assert result.documents[0].metadata == {"id": "7", "lang": "en"}


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_the_delimiter_is_found(read, delimiter):
    rows = [["name", "text"], ["a", "some, words; here"], ["b", "more"]]
    content = "\r\n".join(delimiter.join(f'"{cell}"' for cell in row) for row in rows)
    assert texts(read("a.csv", content)) == ["some, words; here", "more"]


def test_rows_without_a_text_column_are_written_as_lines(read):
    result = read("a.csv", "city,people\nBern,134000\nBasel,\n")
    assert texts(result) == ["city: Bern\npeople: 134000", "city: Basel"]
    assert result.documents[0].metadata == {}


def test_the_text_column_can_be_named(read):
    result = read("a.csv", "text,notes\na,b\n", text_column="notes")
    assert texts(result) == ["b"]
    assert result.documents[0].metadata == {"text": "a"}


def test_a_named_text_column_that_is_not_there_is_named_with_those_that_are(read):
    with pytest.raises(ReadError, match=r"'notes'.*'text', 'n'") as caught:
        read("a.csv", "text,n\na,1\n", text_column="notes")
    assert caught.value.code == "unsupported"


def test_a_table_without_a_header_has_numbered_columns(read):
    assert texts(read("a.csv", "1,2\n3,4\n")) == ["column_1: 1\ncolumn_2: 2", "column_1: 3\ncolumn_2: 4"]


def test_short_and_long_rows_lose_nothing(read):
    result = read("a.csv", "text,n\nshort\nlong,1,extra\n")
    assert texts(result) == ["short", "long"]
    assert result.documents[1].metadata == {"n": "1", "column_3": "extra"}


def test_rows_without_text_are_counted(read):
    result = read("a.csv", "text,n\na,1\n,2\n  ,3\n")
    assert texts(result) == ["a"]
    assert result.warnings == ("2 rows without text were left out",)


def test_a_table_of_blank_rows_is_empty(read):
    assert code_of(read, "a.csv", "text,n\n,1\n,2\n") == "empty"


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "cp1252"])
def test_csv_in_other_encodings(read, encoding):
    rows = "text,name\nDie Größe der Straße ist überall möglich,Müller\nÄpfel für Köln,Käthe\n"
    assert texts(read("a.csv", rows.encode(encoding))) == [
        "Die Größe der Straße ist überall möglich",
        "Äpfel für Köln",
    ]


def test_broken_bytes_of_a_table_are_counted(read):
    content = "text,n\n" + "Grüße aus Köln,1\n" * 20
    result = read("a.csv", content.encode() + b"broken \xff\xff,2\n")
    assert texts(result)[-1] == "broken \ufffd\ufffd"
    assert result.warnings == ("2 byte sequences are not valid utf-8 and became U+FFFD",)


def test_a_field_that_is_never_closed_fails_that_row_only(read):
    content = "text,n\nfirst,1\n" + '"' + "x" * (9 << 20) + "\nlast,2\n"
    result = read("a.csv", content)
    assert texts(result)[0] == "first"
    assert [row.code for row in result.failed_rows] == ["corrupt"]


def test_nul_in_a_table_is_replaced_and_said(read):
    result = read("a.csv", "text,n\na\0b,1\n" + "plain words in a row,2\n" * 5)
    assert texts(result)[0] == "a\ufffdb"
    assert result.warnings == ("row 1: 1 NUL characters were replaced by U+FFFD",)


def test_a_line_of_json_is_a_document_and_its_number_the_row(read):
    lines = ['{"text": "a", "n": 1, "deep": {"x": 1}}', "", '"just text"', '{"body": "b", "ok": true}']
    result = read("a.jsonl", "\n".join(lines))
    assert texts(result) == ["a", "just text", "b"]
    assert [document.uri.rsplit("=", 1)[1] for document in result.documents] == ["1", "3", "4"]
    assert [document.metadata for document in result.documents] == [{"n": 1}, {}, {"ok": True}]


def test_bad_lines_of_json_fail_alone(read):
    lines = ["{broken", "[1, 2]", '{"text": "good"}', "[" * 100_000, "7"]
    result = read("a.jsonl", "\n".join(lines))
    assert texts(result) == ["good"]
    assert [(row.row, row.code) for row in result.failed_rows] == [(n, "corrupt") for n in (1, 2, 4, 5)]
    assert result.failed_row_count == 4


def test_a_table_of_bad_lines_fails_with_the_first_reason(read):
    with pytest.raises(ReadError, match="none of 2 rows could be read; row 1: not JSON") as caught:
        read("a.jsonl", "{broken\n{too\n")
    assert caught.value.code == "corrupt"


def test_values_that_json_or_sqlite_cannot_hold_are_made_to_fit(read):
    line = {"text": "a\ud800b", "big": 1 << 70, "key\udc00": "v\udfff", "long": "x" * 5000}
    result = read("a.jsonl", json.dumps(line) + '\n{"text": "n", "nan": NaN, "inf": Infinity}')
    assert texts(result) == ["a\ufffdb", "n"]
    assert result.documents[0].metadata == {"big": str(1 << 70), "key\ufffd": "v\ufffd"}
    assert result.documents[1].metadata == {"nan": None, "inf": None}
    assert result.warnings[0] == "row 1: 1 lone surrogates were replaced by U+FFFD"
    assert result.warnings[1] == "1 values of over 4096 characters were left out of the metadata"


def test_a_line_without_the_named_column_fails_alone(read):
    result = read("a.jsonl", '{"a": "x"}\n{"b": "y"}\n', text_column="a")
    assert texts(result) == ["x"]
    assert [(row.row, row.code) for row in result.failed_rows] == [(2, "unsupported")]


def test_a_row_over_the_limit_fails_alone(read):
    lines = json.dumps({"text": "x" * 2000}) + '\n{"text": "short"}'
    result = read("a.jsonl", lines, ReadLimits(max_text_bytes=1000))
    assert texts(result) == ["short"]
    assert [row.code for row in result.failed_rows] == ["too_large"]


@pytest.mark.parametrize("limits", [ReadLimits(max_documents=5), ReadLimits(max_total_bytes=50)])
def test_more_rows_than_allowed_are_too_large(read, limits):
    assert code_of(read, "a.jsonl", '{"text": "ten chars."}\n' * 6, limits) == "too_large"


def test_failed_rows_beyond_a_thousand_are_only_counted(read):
    result = read("a.jsonl", "{\n" * 1500 + '"good"\n')
    assert len(result.failed_rows) == 1000
    assert result.failed_row_count == 1500


def test_rows_of_parquet_are_documents(read, parquet):
    columns = {
        "text": ["one", None, "three"],
        "n": [1, 2, 3],
        "day": [datetime.date(2024, 5, 6)] * 3,
        "price": [decimal.Decimal("1.50")] * 3,
        "vector": [[1.0, 2.0]] * 3,
        "raw": [b"x"] * 3,
    }
    result = read("a.parquet", parquet(columns))
    assert texts(result) == ["one", "three"]
    assert result.documents[1].uri.endswith("#row=3")
    assert result.documents[0].metadata == {"n": 1, "day": "2024-05-06", "price": "1.50"}
    assert result.warnings == ("1 rows without text were left out",)


def test_parquet_without_a_text_column_is_written_as_lines(read, parquet):
    assert texts(read("a.parquet", parquet({"a": ["x"], "b": [[1, 2]]}))) == ["a: x\nb: [1, 2]"]


def test_dictionary_columns_of_parquet_are_read(read, parquet):
    table = pa.table({"text": pa.array(["a", "b", "a"]).dictionary_encode(), "n": [1, 2, 3]})
    assert texts(read("a.parquet", parquet(table))) == ["a", "b", "a"]


def test_extension_types_are_refused_whether_known_or_not(read, parquet):
    known = pa.table({"text": pa.array(["x"]), "id": pa.array([b"0" * 16], pa.uuid())})
    assert code_of(read, "a.parquet", parquet(known)) == "unsupported"
    field = pa.field("tensor", pa.list_(pa.float32()), metadata={"ARROW:extension:name": "ray.data.arrow_tensor"})
    unknown = pa.table([["x"], [[1.0]]], schema=pa.schema([pa.field("text", pa.string()), field]))
    assert code_of(read, "a.parquet", parquet(unknown)) == "unsupported"
    nested = pa.table(
        [["x"], [{"t": [1.0]}]], schema=pa.schema([("text", pa.string()), ("s", pa.struct([field.with_name("t")]))])
    )
    assert code_of(read, "a.parquet", parquet(nested)) == "unsupported"


def test_a_damaged_parquet_file_is_corrupt(read, parquet):
    content = parquet({"text": ["a"] * 1000})
    assert code_of(read, "a.parquet", content[:-20]) == "corrupt"
    assert code_of(read, "a.parquet", content[:4] + b"\xff" * 40 + content[44:]) == "corrupt"


def test_a_parquet_bomb_stays_within_the_memory_limit(read, parquet):
    rows = pa.table({"text": pa.array(["x" * (1 << 20)]).take(pa.array([0] * 300)).dictionary_encode()})
    limits = ReadLimits(max_total_bytes=50 << 20)
    assert code_of(read, "a.parquet", parquet(rows), limits) == "too_large"
