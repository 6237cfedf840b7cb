"""Random numbers: the generators of the CPU and of a stream's device, and those that blocks have of their own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import get_device_states, set_device_states

from lightning_revlib.nn.state.base import Call, State


class RandomState:
    """The states of the CPU's generator and of the generators of a tensor's device."""

    __slots__ = ("cpu", "device_type", "devices", "states")

    def __init__(self, tensor: Tensor) -> None:
        self.cpu = torch.default_generator.get_state()
        self.device_type = tensor.device.type
        self.devices: Sequence[int] = ()
        self.states: Sequence[Tensor] = ()
        if not (tensor.is_cpu or tensor.is_meta):
            self.devices, self.states = get_device_states(tensor)

    def same(self, other: RandomState) -> bool:
        return torch.equal(self.cpu, other.cpu) and all(map(torch.equal, self.states, other.states))

    def set(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.devices:
            set_device_states(self.devices, self.states, device_type=self.device_type)


class Random(State):
    """The state of torch's generators before a call that draws from them."""

    __slots__ = ("before", "like")

    def __init__(self, stream: Tensor) -> None:
        self.like = stream.new_empty(0)  # no view, which would hold the stream
        self.before = RandomState(stream)

    @classmethod
    def capture(cls, call: Call) -> Random:
        return cls(call.stream)

    def close(self) -> bool:
        return not RandomState(self.like).same(self.before)

    @contextmanager
    def restore(self, modules: Sequence[nn.Module]) -> Iterator[None]:
        now = RandomState(self.like)
        self.before.set()
        try:
            yield
        finally:
            now.set()


class Generators(State):
    """The states of the `torch.Generator`s among the attributes of modules, before a call that draws from them."""

    __slots__ = ("states",)

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        holders = [vars(m) for m in modules if torch.Generator in map(type, vars(m).values())]
        found = dict.fromkeys(x for own in holders for x in own.values() if type(x) is torch.Generator)
        self.states = [(generator, generator.get_state()) for generator in found]

    @classmethod
    def capture(cls, call: Call) -> Generators:
        return cls(call.modules)

    def close(self) -> bool:
        self.states = [(g, state) for g, state in self.states if not torch.equal(g.get_state(), state)]
        return bool(self.states)

    @contextmanager
    def restore(self, modules: Sequence[nn.Module]) -> Iterator[None]:
        now = [(g, g.get_state()) for g, _ in self.states]
        for generator, state in self.states:
            generator.set_state(state)
        try:
            yield
        finally:
            for generator, state in now:
                generator.set_state(state)
