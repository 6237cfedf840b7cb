"""Random numbers: the generators of the CPU and of a stream's device."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import get_device_states, set_device_states

from lightning_revlib.nn.state.base import Call, State
from lightning_revlib.nn.state.tensors import is_fake, values_of

EMPTY = torch.empty(0, device="cpu")


class Random(State):
    """The states of torch's generators before a call that draws from them.

    They are the process's. If a second run ends with other states than the call had left, another thread has drawn
    during one of them, or the block draws otherwise. It is a warning, as the block may not draw at all.
    """

    __slots__ = ("after", "before", "like", "replay")
    replays = count()  # one for each time that any thread sets the generators
    last_replay = 0  # the number of the last time: if it grows in a call, equal states may hide a draw

    def __init__(self, call: Call) -> None:
        stream, self.replay = call.stream, Random.last_replay
        is_plain = stream.is_cpu and not is_fake(stream)
        self.like = EMPTY if is_plain else values_of(stream).new_empty(0)  # no view, which would hold the stream
        self.before = generator_states(stream)

    def close(self) -> bool:
        now = generator_states(self.like)
        if now == self.before and self.replay == Random.last_replay:
            return False
        self.after = hash(now)
        return True

    @contextmanager
    def restore(self, modules: Sequence[nn.Module]) -> Iterator[None]:
        now = generator_states(self.like)
        self._set(self.before)
        try:
            yield
            end = generator_states(self.like)
            if end != self.before and hash(end) != self.after:
                warnings.warn(
                    f"{type(modules[0]).__name__}: other random numbers were drawn in its second run than in forward,"
                    " by another thread or the block; its gradient is wrong if the block draws: train in processes, or"
                    " let only one thread at a time draw, and run forward and backward",
                    stacklevel=2,
                )
        finally:
            self._set(now)

    def _set(self, states: tuple[Any, ...]) -> None:
        Random.last_replay = next(Random.replays)
        set_generator_states(states)


def generator_states(like: Tensor) -> tuple[Any, ...]:
    """Return the states of the CPU's generator and of those of a tensor's device, to be compared with ==.

    Bytes are compared in a tenth of the time that `torch.equal` takes. A FakeTensorMode draws no numbers.
    """
    if is_fake(like):
        return ()
    cpu = torch.default_generator.get_state().numpy().tobytes()
    if like.is_cpu or like.is_meta:
        return (cpu,)
    devices, states = get_device_states(like)
    return cpu, like.device.type, tuple(devices), *[state.numpy().tobytes() for state in states]


def set_generator_states(states: tuple[Any, ...]) -> None:
    cpu, *device = states
    torch.set_rng_state(_tensor(cpu))
    if device:
        set_device_states(device[1], [_tensor(state) for state in device[2:]], device_type=device[0])


def _tensor(state: bytes) -> Tensor:
    return torch.frombuffer(bytearray(state), dtype=torch.uint8)
