"""LlamaIndex metadata filters over the metadata of a node: all operators, nested, with LlamaIndex's meaning."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from llama_index.core.vector_stores.types import FilterCondition, FilterOperator, MetadataFilter, MetadataFilters

from ragkit.errors import UsageError
from ragkit.types import MetadataValue

_OF_CHUNKS = frozenset({"uri", "doc_id", "page", "heading_path", "table_header"})
_LISTS = frozenset({FilterOperator.IN, FilterOperator.NIN, FilterOperator.ANY, FilterOperator.ALL})
_TESTS: Mapping[FilterOperator, Callable[[Any, Any], bool]] = {
    FilterOperator.EQ: lambda have, want: bool(have == want),
    FilterOperator.NE: lambda have, want: bool(have != want),
    FilterOperator.GT: lambda have, want: bool(have > want),
    FilterOperator.GTE: lambda have, want: bool(have >= want),
    FilterOperator.LT: lambda have, want: bool(have < want),
    FilterOperator.LTE: lambda have, want: bool(have <= want),
    FilterOperator.IN: lambda have, want: have in want,
    FilterOperator.NIN: lambda have, want: have not in want,
    FilterOperator.ANY: lambda have, want: any(one in have for one in want),
    FilterOperator.ALL: lambda have, want: all(one in have for one in want),
    FilterOperator.CONTAINS: lambda have, want: want in have,
    FilterOperator.TEXT_MATCH: lambda have, want: want in have,
    FilterOperator.TEXT_MATCH_INSENSITIVE: lambda have, want: want.lower() in have.lower(),
}


def matches(metadata: Mapping[str, Any], filters: MetadataFilters | None) -> bool:
    """Return whether `metadata` fulfils the filters.

    A key that is not there, or holds nothing, is only different (`!=`, `nin`) and empty (`is_empty`); a value that
    cannot be compared with the filter's, text with a number say, does not fulfil it.

    Raises:
        UsageError: an operator or a condition is unknown, or a filter's value is not of its operator's kind.
    """
    if filters is None or not filters.filters:
        return True
    found = (
        matches(metadata, one) if isinstance(one, MetadataFilters) else _fulfils(metadata.get(one.key), one)
        for one in filters.filters
    )
    condition = filters.condition or FilterCondition.AND
    if condition is FilterCondition.AND:
        return all(found)
    if condition is FilterCondition.OR:
        return any(found)
    if condition is FilterCondition.NOT:
        return not any(found)
    raise UsageError(f"there is no filter condition {condition!r}")


def exact_filters(filters: MetadataFilters | None) -> dict[str, MetadataValue]:
    """Return those of the filters that a store compares by itself: texts that must be equal, all of them needed.

    What they let through still has to be checked with `matches`. Names that mean something else to a store, or that
    nodes get from their chunks, are left to that as well.
    """
    if filters is None or (filters.condition or FilterCondition.AND) is not FilterCondition.AND:
        return {}
    return {
        one.key: one.value
        for one in filters.filters
        if isinstance(one, MetadataFilter)
        and one.operator is FilterOperator.EQ
        and isinstance(one.value, str)
        and one.key not in _OF_CHUNKS
        and not one.key.startswith(("ragkit_", "_node"))
    }


def _fulfils(have: Any, wanted: MetadataFilter) -> bool:
    operator, want = wanted.operator, wanted.value
    if operator is FilterOperator.IS_EMPTY:
        return have is None or have in ("", [])
    test = _TESTS.get(operator)
    if test is None:
        raise UsageError(f"there is no filter operator {operator!r}")
    if operator in _LISTS and not isinstance(want, list):
        raise UsageError(f"the filter {wanted.key} {operator.value} takes a list, got {want!r}")
    if operator.value.startswith("text_match") and not isinstance(want, str):
        raise UsageError(f"the filter {wanted.key} {operator.value} takes a text, got {want!r}")
    if have is None:
        return operator in (FilterOperator.NE, FilterOperator.NIN)
    try:
        return test(have, want)
    except (TypeError, AttributeError):
        return operator is FilterOperator.NIN
