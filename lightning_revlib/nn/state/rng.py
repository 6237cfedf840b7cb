"""What a block's call depends on besides its input, and how to meet the same again in backward.

Environment   autocast, default dtype and device         one a forward, or a layer that a model calls
Settings      flags, parameters and arguments            the same
RandomState   generators of the CPU and the device       one a step, if it draws
Buffers       buffers, numbers, generators of its own    one a step, if it has any
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils.checkpoint import get_device_states, set_device_states

NOTHING: AbstractContextManager[None] = nullcontext()


class Environment:
    """Default dtype and device, and autocast of the CPU and a tensor's device; `with environment.again():` restores."""

    def __init__(self, tensor: Tensor) -> None:
        self.kind = None if tensor.is_cpu else tensor.device.type
        self.then = _environment(self.kind)

    @property
    def casts(self) -> bool:
        """Whether autocast is on."""
        return any(self.then[3::2])

    def changed(self) -> bool:
        return self.then != _environment(self.kind)

    @contextmanager
    def again(self) -> Iterator[None]:
        dtype, device, cache, *autocast = self.then
        with ExitStack() as stack:
            stack.callback(torch.set_default_dtype, torch.get_default_dtype())
            torch.set_default_dtype(dtype)
            if device != _default_device():
                stack.enter_context(torch.device(device or "cpu"))
            for kind, enabled, half in zip(("cpu", self.kind), autocast[::2], autocast[1::2]):  # noqa: B905
                stack.enter_context(torch.autocast(kind or "cpu", dtype=half, enabled=enabled, cache_enabled=cache))
            yield


def _environment(kind: str | None) -> tuple[Any, ...]:
    """What there is now, for the CPU and another kind of device; one call, as each costs most when it is the first."""
    device = _default_device() if torch._C._len_torch_function_stack() else None
    dtype, cache, cpu = torch.get_default_dtype(), torch.is_autocast_cache_enabled(), torch.is_autocast_enabled("cpu")
    now = dtype, device, cache, cpu, torch.get_autocast_dtype("cpu")
    return now if kind is None else (*now, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))


def _default_device() -> torch.device | None:
    """None if none is set; nor is any while `tensor.backward()` runs, and in the threads where backward does."""
    modes = _get_current_function_mode_stack()
    return next((mode.device for mode in reversed(modes) if isinstance(mode, DeviceContext)), None)


class RandomState:
    """The states of the CPU's generator and of the generators of a tensor's device."""

    __slots__ = ("cpu", "device_type", "devices", "states")

    def __init__(self, tensor: Tensor) -> None:
        self.cpu = torch.default_generator.get_state()
        self.devices: Sequence[int] = ()
        self.states: Sequence[Tensor] = ()
        if not (tensor.is_cpu or tensor.is_meta):
            self.device_type = tensor.device.type
            self.devices, self.states = get_device_states(tensor)

    def same(self, other: RandomState) -> bool:
        return torch.equal(self.cpu, other.cpu) and all(map(torch.equal, self.states, other.states))

    def set(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.devices:
            set_device_states(self.devices, self.states, device_type=self.device_type)

    def lend(self, tensor: Tensor) -> Callable[[], None]:
        """Set these states; what is returned sets those of before."""
        now = RandomState(tensor)
        self.set()
        return now.set
