"""What a block's call depends on besides its input, and how to meet the same again in backward.

Environment   autocast, default dtype and device       one a forward
Settings      flags, parameters and arguments          one a forward
RandomState   generators of the CPU and the device     one a step, if it draws
Buffers       values of the buffers that it changes    one a step, if it has buffers
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from itertools import chain
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.parameter import UninitializedBuffer
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils.checkpoint import get_device_states, set_device_states

NOTHING: AbstractContextManager[None] = nullcontext()


class Environment:
    """Autocast and default dtype and device at the time it was made; `with environment.again():` restores them."""

    def __init__(self, device_type: str) -> None:
        self.types = ("cpu",) if device_type == "cpu" else ("cpu", device_type)
        self.then = self._now()

    def _now(self) -> tuple[Any, ...]:
        autocast = [(t, torch.is_autocast_enabled(t), torch.get_autocast_dtype(t)) for t in self.types]
        return torch.get_default_dtype(), _default_device(), torch.is_autocast_cache_enabled(), autocast

    def changed(self) -> bool:
        return self.then != self._now()

    @contextmanager
    def again(self) -> Iterator[None]:
        dtype, device, cache, autocast = self.then
        with ExitStack() as stack:
            stack.callback(torch.set_default_dtype, torch.get_default_dtype())
            torch.set_default_dtype(dtype)
            if device != _default_device():
                stack.enter_context(torch.device(device or "cpu"))
            for t, enabled, half in autocast:
                stack.enter_context(torch.autocast(t, dtype=half, enabled=enabled, cache_enabled=cache))
            yield


def _default_device() -> torch.device | None:
    """None if none is set; nor is any while `tensor.backward()` runs, and in the threads where backward does."""
    if not torch._C._len_torch_function_stack():
        return None
    modes = _get_current_function_mode_stack()
    return next((mode.device for mode in reversed(modes) if isinstance(mode, DeviceContext)), None)


class RandomState:
    """The states of the CPU's generator and of the generators of a tensor's device."""

    __slots__ = ("cpu", "device_type", "devices", "states")

    def __init__(self, tensor: Tensor) -> None:
        self.cpu = torch.default_generator.get_state()
        self.device_type = tensor.device.type
        self.devices: Sequence[int] = ()
        self.states: Sequence[Tensor] = ()
        if self.device_type not in ("cpu", "meta"):
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


def version(tensor: Tensor) -> int:
    """How often the tensor was changed in place; inference tensors do not count it."""
    return 0 if tensor.is_inference() else tensor._version


def parts(*modules: nn.Module) -> list[nn.Module]:
    """The modules and all that is in them; `module.modules()`, but fast and with what is shared twice."""
    found: list[nn.Module] = []
    level: Sequence[nn.Module] = modules
    while level:
        found += level
        level = [child for m in level if m._modules for child in m._modules.values() if child is not None]
    return found


class Settings:
    """Training flags and parameters of modules, and the arguments of their calls.

    Made when forward ends. `changed` tells whether modules are set otherwise now; if so, `lend`
    sets what was then for some of them, and returns calls that put back, in reverse order, what was
    just before. Tensors that have been modified in place cannot be lent, and are an error.
    """

    __slots__ = ("by_module", "modules", "names", "owners", "parameters", "registered", "requires_grad", "tensors",
                 "training", "versions")  # fmt: skip

    def __init__(self, modules: list[nn.Module], arguments: Sequence[Tensor] = ()) -> None:
        self.modules = modules
        self.by_module: dict[nn.Module, tuple[bool, list[tuple[str, Tensor, bool]]]] | None = None
        # For all parameters, and in the same order: a few long lists are cheaper than many short ones.
        self.owners = [m for m in modules if m._parameters for _ in m._parameters.keys()]
        self.names = [name for m in modules if m._parameters for name in m._parameters.keys()]
        self.registered = _registered(modules)
        self.parameters = [p for p in self.registered if p is not None]
        self.training = [m.training for m in modules]
        self.requires_grad = [p.requires_grad for p in self.parameters]
        self.tensors = [*self.parameters, *arguments] if arguments else self.parameters
        self.versions = _versions(self.tensors)

    def changed(self) -> bool:
        if (versions := _versions(self.tensors)) != self.versions:
            at = [x == y for x, y in zip(versions, self.versions, strict=True)].index(False)
            if at < len(self.parameters):
                m, name, _ = list(self._named())[at]
                what = f"parameter {name!r} of {m}"
            else:
                what = f"an argument of shape {list(self.tensors[at].shape)}"
            raise RuntimeError(
                f"{what} has been modified in place since the forward of its reversible stack, which backward has to"
                " run again; modify it, or step the optimizer, after backward"
            )
        return (
            [m.training for m in self.modules] != self.training
            or [p.requires_grad for p in self.parameters] != self.requires_grad
            or not self._same_parameters()
        )

    def lend(self, modules: list[nn.Module]) -> list[Callable[[], Any]]:
        undo: list[Callable[[], Any]] = []
        if self.by_module is None:
            self.by_module = {m: (training, []) for m, training in zip(self.modules, self.training, strict=True)}
            for (m, name, p), requires_grad in zip(self._named(), self.requires_grad, strict=True):
                self.by_module[m][1].append((name, p, requires_grad))
        for m in filter(self.by_module.__contains__, modules):  # not those that have been added since
            training, parameters = self.by_module[m]
            undo.append(partial(setattr, m, "training", m.training))
            m.training = training
            for name, p, requires_grad in parameters:
                now = m._parameters[name] if name in m._parameters else None
                if now is not p and type(p) in PLAIN and type(now) in PLAIN:  # torch.func.functional_call lent p
                    undo.append(partial(m._parameters.__setitem__, name, now))
                    m._parameters[name] = p  # type: ignore[assignment]
                if p.is_leaf and p.requires_grad != requires_grad:
                    undo.append(partial(p.requires_grad_, p.requires_grad))
                    p.requires_grad_(requires_grad)
        return undo

    def _same_parameters(self) -> bool:
        try:
            return _registered(self.modules) == self.registered  # the same tensors, or equal numbers
        except (RuntimeError, TypeError):  # tensors of several elements, compared
            return False

    def _named(self) -> Iterator[tuple[nn.Module, str, Tensor]]:
        named = zip(self.owners, self.names, self.registered, strict=True)
        return ((m, name, p) for m, name, p in named if p is not None)


def _registered(modules: list[nn.Module]) -> list[Tensor | None]:
    return [p for m in modules if m._parameters for p in m._parameters.values()]


PLAIN = (Tensor, nn.Parameter)  # FSDP exchanges a module's parameters for others itself


def _versions(tensors: Sequence[Tensor]) -> list[int]:
    try:
        return [t._version for t in tensors]
    except RuntimeError:  # an inference tensor among them
        return [version(t) for t in tensors]


class Buffers:
    """The former values of the buffers that a block's call changes.

    Made before the call, closed after it. `lend` gives the modules copies of these values, for a
    second call to see what the first saw, and returns a call that puts the buffers back untouched.

    In training a batch norm writes its statistics and reads none, so that no copy need be held, and
    what is lent may be anything: `scratch`, where the blocks of one backward find each other's.
    """

    __slots__ = ("changing", "written")

    def __init__(self, modules: list[nn.Module]) -> None:
        self.written: list[tuple[dict[str, Any], str]] = []
        self.changing: list[tuple[Any, ...]] = []
        for m in modules:
            if not m._buffers:
                continue
            writes = m.training and type(m).forward in WRITES_STATISTICS and "forward" not in m.__dict__
            for name, buffer in m._buffers.items():
                if buffer is None or isinstance(buffer, UninitializedBuffer):
                    continue
                if writes and name in STATISTICS:
                    self.written.append((m._buffers, name))
                else:
                    before, kind = buffer.detach().clone(), ((m.training, name), type(m))
                    self.changing.append((m._buffers, name, before, buffer, version(buffer), *kind))

    def close(self) -> None:
        """Keep only the buffers that the call has changed, in place or by a new tensor."""
        if self.changing:
            self.changing = [
                (buffers, name, before)
                for buffers, name, before, buffer, count, *kind in self.changing
                if name not in buffers
                or buffers[name] is not buffer
                or version(buffer) != count
                or _silently(before, buffer, *kind)
            ]

    def lend(self, scratch: dict[Any, Tensor]) -> Callable[[], None]:
        now = [(buffers, name, buffers[name]) for buffers, name, *_ in chain(self.written, self.changing)]
        for number, (buffers, name) in enumerate(self.written):  # one of its own for each of a block's
            buffer = buffers[name]
            key = number, buffer.shape, buffer.dtype, buffer.device
            if key not in scratch:
                scratch[key] = buffer.clone()
            buffers[name] = scratch[key]
        for buffers, name, before in self.changing:
            buffers[name] = before.clone()
        return partial(_put_back, now)


WRITES_STATISTICS = (_BatchNorm.forward, _InstanceNorm.forward, nn.SyncBatchNorm.forward)
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")

_SILENT: MutableMapping[type, dict[tuple[bool, str], bool]] = WeakKeyDictionary()


def _silently(before: Tensor, buffer: Tensor, key: tuple[bool, str], kind: type) -> bool:
    """Whether modules of this kind change the buffer without its version telling, as `F.batch_norm` does.

    To compare values makes the host wait for the device, so that it is done once for each class.
    """
    if buffer.is_meta:
        return False
    known = _SILENT.setdefault(kind, {})
    if key not in known:
        known[key] = not torch.equal(before, buffer)
    return known[key]


def _put_back(buffers: list[tuple[dict[str, Any], str, Any]]) -> None:
    for registered, name, buffer in reversed(buffers):
        registered[name] = buffer


class Repeatable:
    """A function that calls a module, made to leave no trace when it is called again: for `torch.utils.checkpoint`.

    `context_fn` is that of `checkpoint`, which must not see the buffers being copied.
    """

    def __init__(
        self, module: nn.Module, function: Callable[..., Any], context_fn: Callable[[], tuple[Any, Any]] | None
    ) -> None:
        self.modules, self.function = parts(module), function
        self.first: Any = NOTHING
        self.again: Any = NOTHING
        if context_fn:
            self.first, self.again = context_fn()
        self.buffers: Buffers | None = None

    def __call__(self, *args: Any) -> Any:
        if self.buffers is None:
            self.buffers = Buffers(self.modules)
            with self.first:
                out = self.function(*args)
            self.buffers.close()
            self.settings = Settings(self.modules)
            return out
        undo = [*self.settings.lend(self.modules), self.buffers.lend({})]
        try:
            with self.again:
                return self.function(*args)
        finally:
            while undo:
                undo.pop()()
