"""What a block's call depends on besides its input, and how to meet the same again in backward.

Environment      autocast and the default dtype             one a forward
RandomState      generators of the CPU and the devices      one a step, if it draws
ModuleState      flags, parameters, buffers that it changes one a step
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy
from torch.utils.checkpoint import get_device_states, set_device_states

NOTHING: AbstractContextManager[None] = nullcontext()


class Environment:
    """Autocast and default dtype at the time it was made; `with environment.again():` restores them."""

    def __init__(self, device_type: str) -> None:
        self.types = ("cpu",) if device_type == "cpu" else ("cpu", device_type)
        self.default_dtype = torch.get_default_dtype()
        self.autocast = any(map(torch.is_autocast_enabled, self.types))
        self.settings = [(t, torch.is_autocast_enabled(t), torch.get_autocast_dtype(t)) for t in self.types]
        self.cache = torch.is_autocast_cache_enabled()

    def again(self) -> AbstractContextManager[None]:
        if self.autocast or torch.get_default_dtype() is not self.default_dtype:
            return self._restored()
        return self._restored() if any(map(torch.is_autocast_enabled, self.types)) else NOTHING

    @contextmanager
    def _restored(self) -> Iterator[None]:
        with ExitStack() as stack:
            stack.callback(torch.set_default_dtype, torch.get_default_dtype())
            torch.set_default_dtype(self.default_dtype)
            for t, enabled, dtype in self.settings:
                stack.enter_context(torch.autocast(t, dtype=dtype, enabled=enabled, cache_enabled=self.cache))
            yield


class RandomState:
    """The states of the CPU's generator and of the generators of a tensor's device."""

    __slots__ = ("cpu", "device_type", "devices", "states")

    def __init__(self, tensor: Tensor) -> None:
        self.cpu = torch.get_rng_state().view(torch.int64)  # words compare faster than bytes
        self.device_type = tensor.device.type
        self.devices: Sequence[int] = ()
        self.states: Sequence[Tensor] = ()
        if self.device_type not in ("cpu", "meta"):
            self.devices, self.states = get_device_states(tensor)

    def same(self, other: RandomState) -> bool:
        return torch.equal(self.cpu, other.cpu) and all(map(torch.equal, self.states, other.states))

    def set(self) -> None:
        torch.set_rng_state(self.cpu.view(torch.uint8))
        if self.devices:
            set_device_states(self.devices, self.states, device_type=self.device_type)

    def lend(self, tensor: Tensor) -> Callable[[], None]:
        """Set these states; what is returned sets those of before."""
        now = RandomState(tensor)
        self.set()
        return now.set


def version(tensor: Tensor) -> int:
    """How often the tensor was changed in place; inference tensors do not count it."""
    return 0 if tensor.is_inference() else tensor._version


class ModuleState:
    """Training flags and parameters of a module's parts, and the former values of buffers that its call changes.

    Made before the call, closed after it. `lend` gives the module what the call has met, so that a
    second call computes the same, and returns calls that put all back, in reverse order, as it was
    just before, whatever has happened since the first call: a second call leaves no trace.
    """

    __slots__ = ("buffers", "modules", "names", "parameters", "requires_grad", "training", "versions")

    def __init__(self, module: nn.Module) -> None:
        self.modules = [module]
        for m in self.modules:  # grows on the way
            if m._modules:
                self.modules += [child for child in m._modules.values() if child is not None]
        self.training = [m.training for m in self.modules]
        found = [(m, name, p) for m in self.modules for name, p in m._parameters.items() if p is not None]
        self.names = [(m, name) for m, name, _ in found]
        self.parameters = [p for _, _, p in found]
        self.buffers: list[tuple[Any, ...]] = [
            (m, name, _copy(m, buffer), buffer, version(buffer))
            for m in self.modules
            if m._buffers
            for name, buffer in m._buffers.items()
            if buffer is not None and not is_lazy(buffer)
        ]

    def close(self) -> None:
        """Keep only the buffers that the call has changed, in place or by a new tensor."""
        self.versions = _versions(self.parameters)
        self.requires_grad = [p.requires_grad for p in self.parameters]
        if self.buffers:
            self.buffers = [
                (m, name, before)
                for m, name, before, buffer, count in self.buffers
                if before is None or m._buffers.get(name) is not buffer or version(buffer) != count
            ]

    def lend(self, step: str) -> list[Callable[[], Any]]:
        undo: list[Callable[[], Any]] = []
        if (versions := _versions(self.parameters)) != self.versions:
            m, name = self.names[[x == y for x, y in zip(versions, self.versions, strict=True)].index(False)]
            raise RuntimeError(
                f"{step}: parameter {name!r} of {type(m).__name__} has been modified in place since the forward,"
                " which backward has to run again; step the optimizer after backward"
            )
        now = [m._parameters.get(name) for m, name in self.names]
        if any(map(operator.is_not, now, self.parameters)):
            for (m, name), p, other in zip(self.names, self.parameters, now, strict=True):
                if other is not p and type(p) in PLAIN and type(other) in PLAIN:
                    undo.append(partial(m._parameters.__setitem__, name, other))  # torch.func.functional_call lent p
                    m._parameters[name] = p
        if [p.requires_grad for p in self.parameters] != self.requires_grad:
            for p, requires_grad in zip(self.parameters, self.requires_grad, strict=True):
                if p.is_leaf:
                    undo.append(partial(p.requires_grad_, p.requires_grad))
                    p.requires_grad_(requires_grad)
        if [m.training for m in self.modules] != self.training:
            for m, training in zip(self.modules, self.training, strict=True):
                undo.append(partial(setattr, m, "training", m.training))
                m.training = training
        for m, name, before in self.buffers:
            buffer = m._buffers[name]
            undo.append(partial(m._buffers.__setitem__, name, buffer))
            m._buffers[name] = (buffer if before is None else before).clone()
        return undo


def _versions(tensors: Sequence[Tensor]) -> list[int]:
    try:
        return [t._version for t in tensors]
    except RuntimeError:  # an inference tensor among them
        return [version(t) for t in tensors]


PLAIN = (Tensor, nn.Parameter)  # FSDP exchanges a module's parameters for others itself


def _copy(module: nn.Module, buffer: Tensor) -> Tensor | None:
    # In training a batch norm writes its statistics and reads none, so that no copy need be held.
    # Its kernel does not count the change in the buffer's version: None says "changed" for it.
    if isinstance(module, _NormBase) and module.training:
        return None
    return buffer.detach().clone()
