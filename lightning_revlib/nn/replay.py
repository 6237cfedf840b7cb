"""What a block's call depends on besides its input, and how to meet the same again in backward.

Environment      autocast and the default dtype          one a forward
random_state     generators of the CPU and the devices   one a step, shared while nothing is drawn
ModuleState      training flags, buffers a block changes one a step
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy
from torch.utils.checkpoint import get_device_states, set_device_states


class Environment:
    """Autocast and default dtype at the time it was made; `with environment.again():` restores them."""

    def __init__(self, device_type: str) -> None:
        self.types = ("cpu",) if device_type == "cpu" else ("cpu", device_type)
        self.then = self._now()

    def _now(self) -> tuple[Any, ...]:
        autocast = [(t, torch.is_autocast_enabled(t), torch.get_autocast_dtype(t)) for t in self.types]
        return torch.get_default_dtype(), torch.is_autocast_cache_enabled(), autocast

    @contextmanager
    def again(self) -> Iterator[None]:
        now = self._now()
        if now == self.then:  # the usual case outside autocast: nothing to pay
            yield
            return
        default, cache, autocast = self.then
        with ExitStack() as stack:
            stack.callback(torch.set_default_dtype, now[0])
            torch.set_default_dtype(default)
            for device_type, enabled, dtype in autocast:
                stack.enter_context(torch.autocast(device_type, dtype=dtype, enabled=enabled, cache_enabled=cache))
            yield


class RandomState:
    """The states of the CPU's generator and of the generators of the tensors' devices."""

    __slots__ = ("cpu", "device_type", "devices", "states")

    def __init__(self, *tensors: Tensor) -> None:
        self.cpu = torch.get_rng_state()
        self.device_type = next((t.device.type for t in tensors if t.device.type not in ("cpu", "meta")), None)
        self.devices: Sequence[int] = ()
        self.states: Sequence[Tensor] = ()
        if self.device_type:
            self.devices, self.states = get_device_states(*tensors)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, RandomState)
            and torch.equal(self.cpu, other.cpu)
            and list(self.devices) == list(other.devices)
            and all(torch.equal(x, y) for x, y in zip(self.states, other.states, strict=True))
        )

    __hash__ = None  # type: ignore[assignment]

    def set(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.device_type:
            set_device_states(self.devices, self.states, device_type=self.device_type)

    @contextmanager
    def again(self, *tensors: Tensor) -> Iterator[None]:
        now = RandomState(*tensors)
        self.set()
        try:
            yield
        finally:
            now.set()


def version(tensor: Tensor) -> int:
    """How often the tensor was changed in place; inference tensors do not count, nor does a tracing compiler."""
    return 0 if torch.compiler.is_compiling() or tensor.is_inference() else tensor._version


class ModuleState:
    """Training flags and parameters of a module's parts, and the former values of buffers that its call changes.

    Made before the call, closed after it. `again` lends the module what the call has met, so that a
    second call computes the same and leaves no trace: flags, parameters and buffers are put back,
    whatever has happened to them since.
    """

    __slots__ = ("buffers", "modules", "parameters", "training")

    def __init__(self, module: nn.Module) -> None:
        self.modules = list(module.modules())
        self.training = [m.training for m in self.modules]
        self.parameters: list[tuple[Any, ...]] = [
            (m, name, p) for m in self.modules for name, p in m._parameters.items() if p is not None
        ]
        self.buffers: list[tuple[Any, ...]] = [
            (m, name, _copy(m, buffer), buffer, version(buffer))
            for m in self.modules
            for name, buffer in m._buffers.items()
            if buffer is not None and not is_lazy(buffer)
        ]

    def close(self) -> None:
        """Keep only the buffers which the call has changed, in place or by a new tensor."""
        self.parameters = [(m, name, p, version(p), p.requires_grad) for m, name, p in self.parameters]
        self.buffers = [
            (m, name, before)
            for m, name, before, buffer, count in self.buffers
            if before is None or m._buffers.get(name) is not buffer or version(buffer) != count
        ]

    @contextmanager
    def again(self, name_of_step: str) -> Iterator[None]:
        with ExitStack() as undo:
            for m, flag in zip(self.modules, self.training, strict=True):
                if m.training != flag:
                    undo.callback(setattr, m, "training", m.training)
                    m.training = flag
            for m, name, p, count, requires_grad in self.parameters:
                if version(p) != count:
                    raise RuntimeError(
                        f"{name_of_step}: parameter {name!r} of {type(m).__name__} has been modified in place since the"
                        " forward, which backward has to run again; step the optimizer after backward"
                    )
                if (now := m._parameters.get(name)) is not p and type(p) in PLAIN and type(now) in PLAIN:
                    undo.callback(m._parameters.__setitem__, name, now)  # lent by torch.func.functional_call
                    m._parameters[name] = p
                if p.requires_grad != requires_grad and p.is_leaf:
                    undo.callback(p.requires_grad_, p.requires_grad)
                    p.requires_grad_(requires_grad)
            for m, name, before in self.buffers:
                now = m._buffers[name]
                undo.callback(m._buffers.__setitem__, name, now)
                m._buffers[name] = (now if before is None else before).clone()
            yield


PLAIN = (Tensor, nn.Parameter)  # FSDP exchanges a module's parameters for others itself


def _copy(module: nn.Module, buffer: Tensor) -> Tensor | None:
    # In training a batch norm writes its statistics and reads none, so that no copy need be held.
    # Its kernel does not count the change in the buffer's version: None says "changed" for it.
    if isinstance(module, _NormBase) and module.training:
        return None
    return buffer.detach().clone()
