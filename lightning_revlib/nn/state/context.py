"""Context in which a forward runs: autocast, default dtype, and TorchFunctionModes, the default device among them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from lightning_revlib.nn.internals import function_modes, only_function_modes
from lightning_revlib.nn.state.base import Call, State


def autocast_kind(device: torch.device) -> str:
    """Return the name by which autocast knows a device: it has no "meta"."""
    return "cpu" if device.type == "meta" else device.type


class Context(State):
    """The default dtype, and autocast of the CPU and of a stream's device."""

    shared = True
    __slots__ = ("kinds", "then")

    def __init__(self, call: Call) -> None:
        self.kinds = sorted({"cpu", autocast_kind(call.stream.device)})
        self.then = self._now()

    def is_current(self) -> bool:
        return self.then == self._now()

    @contextmanager
    def restore(self, modules: Sequence[nn.Module]) -> Iterator[None]:
        dtype, cache, *autocast = self.then
        with ExitStack() as stack:
            stack.callback(torch.set_default_dtype, torch.get_default_dtype())
            torch.set_default_dtype(dtype)
            for kind, (enabled, half) in zip(self.kinds, autocast, strict=True):
                stack.enter_context(torch.autocast(kind, dtype=half, enabled=enabled, cache_enabled=cache))
            yield

    def _now(self) -> tuple[Any, ...]:
        autocast = [(torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in self.kinds]
        return torch.get_default_dtype(), torch.is_autocast_cache_enabled(), *autocast


class FunctionModes(State):
    """The TorchFunctionModes that are active; `torch.device` as a context and `torch.set_default_device` are such.

    `tensor.backward()` is itself a call that modes see, and inside of it none is active.
    """

    shared = True
    __slots__ = ("modes",)

    def __init__(self, call: Call) -> None:
        self.modes = function_modes()

    def is_current(self) -> bool:
        return self.modes == function_modes()

    def restore(self, modules: Sequence[nn.Module]) -> AbstractContextManager[None]:
        return only_function_modes(self.modes)
