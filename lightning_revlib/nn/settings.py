"""The flags, parameters and arguments that a block's call depends on, and whether they have changed since."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain
from operator import attrgetter, is_not, methodcaller
from typing import Any

from torch import Tensor, nn


def version(tensor: Tensor) -> int:
    """How often the tensor was changed in place; inference tensors do not count it."""
    return 0 if tensor.is_inference() else tensor._version


# By `map`, attributes of many objects are read without interpreting a line for each.
TRAINING, PARAMETERS, MODULES = attrgetter("training"), attrgetter("_parameters"), attrgetter("_modules")
REQUIRES_GRAD, VERSION = attrgetter("requires_grad"), attrgetter("_version")
VALUES, IS_ANY = methodcaller("values"), partial(is_not, None)


def parts(*modules: nn.Module) -> list[nn.Module]:
    """The modules and all that is in them; `module.modules()`, but fast and with what is shared twice."""
    found: list[nn.Module] = []
    level: Sequence[nn.Module] = modules
    while level:
        found += level
        level = list(filter(IS_ANY, chain.from_iterable(map(VALUES, map(MODULES, level)))))
    return found


class Settings:
    """Training flags and parameters of modules, and the arguments of their calls.

    Made when forward ends, or a block's call. `changed` tells whether modules are set otherwise now; if so,
    `lend` sets what was then for some of them, and returns calls that put back, in reverse order, what was
    just before. Tensors that have been modified in place cannot be lent, and are an error.
    """

    __slots__ = ("by_module", "modules", "owners", "parameters", "registered", "requires_grad", "tensors", "training",
                 "versions")  # fmt: skip

    def __init__(self, modules: list[nn.Module], arguments: Sequence[Tensor] = ()) -> None:
        self.modules = modules
        self.by_module: dict[nn.Module, tuple[bool, list[tuple[str, Tensor, bool]]]] | None = None
        self.training = list(map(TRAINING, modules))
        self.owners = list(filter(PARAMETERS, modules))
        self.registered = list(map(dict, map(PARAMETERS, self.owners)))
        self.parameters = list(filter(IS_ANY, chain.from_iterable(map(VALUES, self.registered))))
        self.requires_grad = list(map(REQUIRES_GRAD, self.parameters))
        self.tensors = [*self.parameters, *arguments] if arguments else self.parameters
        try:
            self.versions = list(map(VERSION, self.tensors))
        except RuntimeError:  # an inference tensor among them
            self.versions = list(map(version, self.tensors))

    def changed(self) -> bool:
        try:
            versions = list(map(VERSION, self.tensors))
        except RuntimeError:
            versions = list(map(version, self.tensors))
        if versions != self.versions:
            at = [x == y for x, y in zip(versions, self.versions, strict=True)].index(False)
            if at < len(self.parameters):
                m, name, _ = list(self._named())[at]
                what = f"parameter {name!r} of {m}"
            else:
                what = f"an argument of shape {list(self.tensors[at].shape)}"
            raise modified(what)
        parameters = filter(IS_ANY, chain.from_iterable(map(VALUES, map(PARAMETERS, self.owners))))
        return (
            list(map(id, parameters)) != list(map(id, self.parameters))
            or list(map(TRAINING, self.modules)) != self.training
            or list(map(REQUIRES_GRAD, self.parameters)) != self.requires_grad
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

    def _named(self) -> Iterator[tuple[nn.Module, str, Tensor]]:
        named = zip(self.owners, self.registered, strict=True)
        return ((m, name, p) for m, parameters in named for name, p in parameters.items() if p is not None)


def modified(what: str) -> RuntimeError:
    return RuntimeError(
        f"{what} has been modified in place since the forward of its reversible stack, which backward has to run again;"
        " modify it, or step the optimizer, after backward"
    )


PLAIN = (Tensor, nn.Parameter)  # FSDP exchanges a module's parameters for others itself
