"""Entries of modules' dicts, of attributes, buffers and parameters, that are others while a block runs again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

ABSENT: Any = object()  # the value of an entry that is not there
Entry: TypeAlias = tuple[Any, str, Any]  # a dict, or what a scripted module has instead of one; a name; a value


@contextmanager
def swapped(entries: Iterable[Entry]) -> Iterator[None]:
    """Put entries into dicts inside the context, and put back at its end what was there before."""
    entries = [*entries]
    before = [(table, name, value_of(table, name)) for table, name, _ in entries]
    put(entries)
    try:
        yield
    finally:
        put(reversed(before))


def put(entries: Iterable[Entry]) -> None:
    """Put entries into dicts; one that is ABSENT is deleted."""
    for table, name, value in entries:
        if value is not ABSENT:
            table[name] = value
        elif name in table:
            del table[name]


def value_of(table: Any, name: str) -> Any:
    """Return an entry's value, or ABSENT."""
    return table[name] if name in table else ABSENT
