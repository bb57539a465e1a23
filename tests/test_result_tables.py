import draft_tables
import page_tables
import pytest
from result_tables import RESULTS, with_tables

PAGES = pytest.mark.parametrize("tables", [draft_tables, page_tables], ids=lambda tables: tables.PAGE.name)


@PAGES
def test_the_page_holds_the_tables_of_the_raw_results(tables):
    current = tables.PAGE.read_text(encoding="utf-8")
    assert with_tables(current, tables.TABLES, RESULTS) == current


@PAGES
def test_a_table_that_nobody_measured_is_left_out(tables, tmp_path):
    text = with_tables(tables.PAGE.read_text(encoding="utf-8"), tables.TABLES, tmp_path)
    for name in tables.TABLES:
        assert f"<!-- {name} -->\n<!-- end -->" in text


def test_a_page_without_a_place_for_a_table_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="one place for the table 'one'"):
        with_tables("nothing", {"one": lambda _: ""}, tmp_path)
