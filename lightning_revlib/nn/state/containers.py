"""Dicts and lists among a call's arguments, which their owner may fill anew before backward, or the block itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from lightning_revlib.nn.state.base import Call, State


class Containers(State):
    """What was in the dicts and lists among the arguments before the call. A second run leaves them untouched."""

    __slots__ = ("contents",)

    def __init__(self, call: Call) -> None:
        self.contents: list[tuple[Any, Any]] = []
        for value in call.inputs:
            self._add(value)

    def _add(self, value: Any) -> None:
        if isinstance(value, (dict, list)):
            self.contents.append((value, _copy(value)))
            value = list(value.values()) if isinstance(value, dict) else value
        if isinstance(value, (list, tuple)):
            for inner in value:
                self._add(inner)

    def close(self) -> bool:
        return bool(self.contents)

    @contextmanager
    def restore(self, modules: Sequence[nn.Module]) -> Iterator[None]:
        now = [(container, _copy(container)) for container, _ in self.contents]
        _fill(self.contents)
        try:
            yield
        finally:
            _fill(now)


def _copy(container: Any) -> Any:
    return dict(container) if isinstance(container, dict) else list(container)


def _fill(contents: Sequence[tuple[Any, Any]]) -> None:
    for container, content in contents:
        if isinstance(container, list):
            container[:] = content
        else:
            container.clear()
            container.update(content)
