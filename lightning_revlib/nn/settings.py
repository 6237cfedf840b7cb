"""The flags, parameters and arguments that a block's call depends on, and whether they have changed since."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from operator import attrgetter, is_not
from typing import Any

from torch import Tensor, nn


def version(tensor: Tensor) -> int:
    """How often the tensor was changed in place; inference tensors do not count it."""
    return 0 if tensor.is_inference() else tensor._version


# `map` reads an attribute of many objects without interpreting a line for each.
TRAINING, PARAMETERS, MODULES = attrgetter("training"), attrgetter("_parameters"), attrgetter("_modules")
FLAGS, VERSION = attrgetter("requires_grad", "_version"), attrgetter("_version")


def parts(*modules: nn.Module) -> list[nn.Module]:
    """The modules and all that is in them; `module.modules()`, but fast and with what is shared twice."""
    found: list[nn.Module] = []
    level: Sequence[nn.Module] = modules
    while level:
        found += level
        level = [m for inside in map(MODULES, level) if inside for m in inside.values() if m is not None]
    return found


class Settings:
    """Training flags and parameters of modules, and the arguments of their calls.

    Made when forward ends, or a block's call. `changed` tells whether modules are set otherwise now; if so,
    `lend` sets what was then for some of them, and returns calls that put back, in reverse order, what was
    just before. Tensors that have been modified in place cannot be lent, and are an error.
    """

    __slots__ = ("arguments", "by_module", "flags", "modules", "parameters", "registered", "training", "versions")

    def __init__(self, modules: list[nn.Module], arguments: Sequence[Tensor] = ()) -> None:
        self.modules, self.arguments = modules, arguments
        self.by_module: dict[nn.Module, tuple[bool, list[tuple[str, Tensor, bool]]]] | None = None
        self.training, registered = _states(modules)
        self.registered = list(map(dict, registered))
        self.parameters = _values(registered)
        self.flags = _flags(self.parameters)
        self.versions = list(map(version, arguments))

    def changed(self) -> bool:
        training, registered = _states(self.modules)
        flags = _flags(self.parameters)
        if flags != self.flags or list(map(version, self.arguments)) != self.versions:
            self._check_versions()
        parameters = _values(registered)
        return (
            training != self.training
            or flags != self.flags
            or len(parameters) != len(self.parameters)
            or any(map(is_not, parameters, self.parameters))
        )

    def _check_versions(self) -> None:
        """Raise RuntimeError if a tensor has been modified in place."""
        for t, count in zip(self.arguments, self.versions, strict=True):
            if version(t) != count:
                raise modified(f"an argument of shape {list(t.shape)}")
        for (m, name, p), (_, count) in zip(self._named(), self.flags, strict=True):
            if version(p) != count:
                raise modified(f"parameter {name!r} of {m}")

    def lend(self, modules: list[nn.Module]) -> list[Callable[[], Any]]:
        undo: list[Callable[[], Any]] = []
        if self.by_module is None:
            self.by_module = {m: (training, []) for m, training in zip(self.modules, self.training, strict=True)}
            for (m, name, p), (requires_grad, _) in zip(self._named(), self.flags, strict=True):
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

    def _named(self) -> Iterator[tuple[nn.Module, str, Tensor]]:
        named = zip(self.modules, self.registered, strict=True)
        return ((m, name, p) for m, parameters in named for name, p in parameters.items() if p is not None)


def _states(modules: list[nn.Module]) -> tuple[list[bool], list[dict[str, Tensor | None]]]:
    """Training flags and registered parameters, module by module."""
    return list(map(TRAINING, modules)), list(map(PARAMETERS, modules))


def _values(registered: list[dict[str, Tensor | None]]) -> list[Tensor]:
    return [p for parameters in registered if parameters for p in parameters.values() if p is not None]


def _flags(parameters: list[Tensor]) -> list[tuple[bool, int]]:
    """Whether each requires a gradient, and its version."""
    try:
        return list(map(FLAGS, parameters))
    except RuntimeError:  # an inference tensor among them
        return [(p.requires_grad, version(p)) for p in parameters]


def modified(what: str) -> RuntimeError:
    return RuntimeError(
        f"{what} has been modified in place since the forward of its reversible stack, which backward has to run again;"
        " modify it, or step the optimizer, after backward"
    )


PLAIN = (Tensor, nn.Parameter)  # FSDP exchanges a module's parameters for others itself
