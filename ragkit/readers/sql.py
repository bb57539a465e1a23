"""Rows of a database as documents, through SQLAlchemy: one row a document, named by its `id`.

A source is the URL of a database with the query in it: `postgresql://host/db?query=SELECT id, text FROM ...`. The
column `id` names the document, the text column is found as in any table (`text`, `content`, `body`, ...), and the
others become metadata. Rows are drawn as the database sends them and are never all in memory. Nothing is committed, so
a query that writes leaves no trace.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus

from ragkit.credentials import public_url, safe_cause, without_credentials
from ragkit.errors import MissingExtraError, ReadError, UsageError
from ragkit.readers.base import FailedRow, ParseContext, ParsedDocument, Remark
from ragkit.readers.media_type import MediaType
from ragkit.readers.origin import ReadLocal, Source
from ragkit.readers.result import Collected, ReadResult
from ragkit.readers.table_rows import RowDocuments, find_text_column, to_scalar

# The dialects of SQLAlchemy and of its best known extensions.
_DIALECTS = frozenset(
    (
        *(
            "postgresql",
            "postgres",
            "cockroachdb",
            "redshift",
            "mysql",
            "mariadb",
            "sqlite",
            "mssql",
            "oracle",
            "duckdb",
        ),
        *("snowflake", "bigquery", "databricks", "trino", "presto", "clickhouse", "hive", "db2", "teradata"),
    )
)
_READER = "sql/1"
_ROWS_AT_ONCE = 500
_ID = "id"
_SELECTS = re.compile(r"[\s(]*(--|/\*|(select|with|values|table|from)\b)", re.IGNORECASE)


def is_sql_url(url: str) -> bool:
    """Return whether a URL names a database: `postgresql://`, `sqlite:///`, `mysql+pymysql://`, ..."""
    return url.partition("://")[0].partition("+")[0].lower() in _DIALECTS


def sql_source(url: str, query: str) -> str:
    """Return the source that is `query` over the database at `url`.

    Raises:
        UsageError: the URL names no database, or has a query of its own.
    """
    if not is_sql_url(url):
        raise UsageError(
            f"{public_url(url)!r} names no database; give a URL such as postgresql://host/db or sqlite:///F"
        )
    if "query=" in url.partition("?")[2]:
        raise UsageError("the database's URL has a query of its own; leave it out, or leave out --sql")
    return f"{url}{'&' if '?' in url else '?'}query={quote_plus(query)}"


@dataclass(frozen=True, slots=True)
class SqlQuery:
    """A query over one database. Plain data: it can be sent to other processes.

    Attributes:
        url: the database, with credentials; never stored or shown.
        query: what is asked.
    """

    url: str = field(repr=False)
    query: str

    def read(self, source: Source, context: ParseContext, read_local: ReadLocal) -> ReadResult:
        """Return a document a row; see `Origin`.

        Raises:
            ReadError: the database cannot be asked, or gives nothing.
        """
        collected = Collected(source.uri, context.limits.max_total_bytes, context.limits.max_documents)
        digest = _RowDigest()
        try:
            for item in _documents(self._rows(), context, digest):
                if isinstance(item, ParsedDocument):
                    collected.add(item)
                elif isinstance(item, FailedRow):
                    collected.fail(item)
                else:
                    collected.warn(item.message)
        except ReadError as error:
            raise ReadError(f"{source.uri}: {error}", code=error.code, stage="read") from error
        except Exception as error:  # every driver has errors of its own
            message = without_credentials(_first_line(error), self.url) + self._hint()
            raise ReadError(f"{source.uri}: {message}", code="unreadable", stage="read") from safe_cause(
                error, self.url
            )
        if not len(collected.documents):
            reason = collected.failed_rows[0].message if collected.failed_rows else "the query gave no row with text"
            raise ReadError(f"{source.uri}: {reason}", code="empty", stage="read")
        return ReadResult(
            source,
            MediaType.ROWS,
            _READER,
            digest.hexdigest(),
            collected.documents,
            tuple(collected.warnings),
            tuple(collected.failed_rows),
            collected.failed_row_count,
        )

    def _hint(self) -> str:
        """Return what may be wrong with the query itself: the cursor that draws the rows takes only a SELECT."""
        return "" if _SELECTS.match(self.query) else "; the query must be a SELECT"

    def _rows(self) -> Iterator[Mapping[str, Any]]:
        # The text goes to the driver as it is: neither colons nor per cents stand for parameters.
        options = {"stream_results": True, "yield_per": _ROWS_AT_ONCE, "no_parameters": True}
        with _engine(self.url).connect().execution_options(**options) as connection:
            result = connection.exec_driver_sql(self.query)
            if not result.returns_rows:
                raise ReadError("the query gives no rows: it must be a SELECT", code="unsupported", stage="read")
            for row in result:
                yield row._mapping


def sql_sources(text: str) -> Callable[[], Iterator[Source]]:
    """Return a function that yields the one source of a database's URL with a query.

    Raises:
        UsageError: the URL is malformed, or has no query.
        MissingExtraError: SQLAlchemy, or the driver that it needs, is not installed.
    """
    url = _parsed(text)
    query = url.query.get("query")
    if not isinstance(query, str) or not query.strip():
        raise UsageError(
            f"{public_url(text)!r} names nothing to read: add ?query=SELECT ... to it, or give --sql beside it"
        )
    bare = url.difference_update_query(["query"]).render_as_string(hide_password=False)
    _engine(bare)  # a missing driver or file is said now; nothing is connected to
    stored = public_url(sql_source(bare, " ".join(query.split())))
    source = Source(stored, Path(), 0, 0, origin=SqlQuery(bare, query))
    return lambda: iter((source,))


def _parsed(text: str) -> Any:
    """Return SQLAlchemy's form of a URL; the file of a SQLite database has its whole path."""
    try:
        from sqlalchemy.engine import make_url
        from sqlalchemy.exc import ArgumentError
    except ImportError as error:
        raise MissingExtraError(
            f"{public_url(text)} needs SQLAlchemy: pip install 'ragkit[sql]'", name="sqlalchemy"
        ) from error
    try:
        url = make_url(text)
    except (ArgumentError, ValueError) as error:
        raise UsageError(
            f"{public_url(text)!r} is no URL of a database: {without_credentials(_first_line(error), text)}"
        ) from safe_cause(error, text)
    name, plus, driver = url.drivername.partition("+")
    if name == "postgres":  # what libpq and many services write
        url = url.set(drivername=f"postgresql{plus}{driver}")
    if _is_sqlite_file(url):
        url = url.set(database=os.path.abspath(str(url.database)))
    return url


def _engine(text: str) -> Any:
    """Return an engine that is not connected yet; the file of a SQLite database is only read, and never made."""
    from sqlalchemy import create_engine
    from sqlalchemy.exc import NoSuchModuleError
    from sqlalchemy.pool import NullPool

    url = _parsed(text)
    if _is_sqlite_file(url):
        if not os.path.isfile(url.database):
            raise UsageError(f"there is no database {url.database!r}")
        url = url.set(database=f"file:{quote(url.database)}").update_query_dict({"mode": "ro", "uri": "true"})
    try:
        return create_engine(url, poolclass=NullPool)
    except ImportError as error:
        raise MissingExtraError(
            f"{public_url(text)} needs a driver: {without_credentials(str(error), text)}; install it, or name another "
            "in the URL (postgresql+psycopg://, mysql+pymysql://, ...)",
            name=error.name,
        ) from error
    except NoSuchModuleError as error:
        raise MissingExtraError(
            f"{public_url(text)} needs the SQLAlchemy dialect {url.drivername!r}: install the package that has it "
            "(duckdb-engine, snowflake-sqlalchemy, sqlalchemy-bigquery, ...)",
            name=url.drivername,
        ) from error
    except Exception as error:
        raise UsageError(
            f"{public_url(text)!r} cannot be used: {without_credentials(_first_line(error), text)}"
        ) from safe_cause(error, text)


def _is_sqlite_file(url: Any) -> bool:
    database = str(url.database or "")
    return url.drivername.partition("+")[0] == "sqlite" and database not in ("", ":memory:") and database[:5] != "file:"


def _documents(
    rows: Iterator[Mapping[str, Any]], context: ParseContext, digest: _RowDigest
) -> Iterator[ParsedDocument | FailedRow | Remark]:
    builder = RowDocuments(context)
    seen: dict[str, int] = {}
    text_column: str | None = None
    id_column: str | None = None
    for number, values in enumerate(rows, start=1):
        if number == 1:
            text_column = find_text_column(tuple(values), context.text_column)
            id_column = next((name for name in values if name.casefold() == _ID), None)
        key = "" if id_column is None else _key(values[id_column])
        if key and key in seen:
            yield FailedRow(number, "duplicate", f"id {key!r} stands in row {seen[key]} already; ids must be unique")
            continue
        seen.setdefault(key, number)
        rest = {name: value for name, value in values.items() if name != id_column or text_column is None}
        found = builder.document(number, rest, text_column)
        if isinstance(found, ParsedDocument):
            metadata = {**found.metadata, **({} if id_column is None else {_ID: to_scalar(values[id_column])})}
            digest.add(key or number, found.text, metadata)
            found = ParsedDocument(found.text, metadata=metadata, row=number, warnings=found.warnings, key=key)
        if found is not None:
            yield found
    yield from builder.remarks()


class _RowDigest:
    """A digest of rows that does not depend on their order, which a database may choose anew each time."""

    def __init__(self) -> None:
        self._sum = 0
        self._count = 0

    def add(self, key: str | int, text: str, metadata: Mapping[str, Any]) -> None:
        row = json.dumps([key, text, sorted(metadata.items())], default=str).encode("utf-8", "surrogatepass")
        self._sum += int.from_bytes(hashlib.sha256(row).digest())
        self._count += 1

    def hexdigest(self) -> str:
        return hashlib.sha256(f"{self._count}:{self._sum % (1 << 256)}".encode()).hexdigest()


def _key(value: Any) -> str:
    """Return the text of an id as it stands in a URI; empty for none."""
    return "" if value is None else quote(str(to_scalar(value)), safe="/:@!$&'()*+,;=-._~")


def _first_line(error: Exception) -> str:
    """Return what the driver says, without the statement and the links that SQLAlchemy puts below."""
    original = getattr(error, "orig", None) or error
    return str(original).strip().split("\n", 1)[0] or type(error).__name__
