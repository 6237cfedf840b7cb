"""The flags, parameters and arguments that a block's call depends on, and whether they have changed since."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain, compress
from operator import attrgetter, is_not, itemgetter, methodcaller
from typing import Any

from torch import Tensor, nn


def version(tensor: Tensor) -> int:
    """How often the tensor was changed in place; inference tensors do not count it."""
    return 0 if tensor.is_inference() else tensor._version


# `map` reads something of many objects without interpreting a line for each, and a module's dict without its
# `__getattr__`. Little of it is in the processor's caches: what counts is how much memory is visited, and how often.
OWN: Callable[[nn.Module], dict[str, Any]] = vars(nn.Module)["__dict__"].__get__
READ = itemgetter("_modules", "_buffers", "_parameters", "training")
TRAINING, VALUES = itemgetter("training"), methodcaller("values")
VERSION, REQUIRES_GRAD = attrgetter("_version"), attrgetter("requires_grad")


class Attributes:
    """Those of a module that has them elsewhere than in its dict, such as a scripted or a compiled one."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __getitem__(self, name: str) -> Any:
        value = getattr(self.module, name)
        return value if isinstance(value, (dict, bool)) else dict(value.items())


def walk(*modules: nn.Module) -> tuple[list[nn.Module], list[Any], list[tuple[Any, ...]]]:
    """The modules and all that is in them, with what is shared twice; their dicts, and what is to be `READ` there."""
    found: list[nn.Module] = []
    owns: list[Any] = []
    read: list[tuple[Any, ...]] = []
    level: Sequence[nn.Module] = modules
    while level:
        own: list[Any] = list(map(OWN, level))
        try:
            new = list(map(READ, own))
        except KeyError:
            own = list(map(Attributes, level))
            new = list(map(READ, own))
        found += level
        owns += own
        read += new
        level = [m for row in new if row[0] for m in row[0].values() if m is not None]
    return found, owns, read


def parts(*modules: nn.Module) -> list[nn.Module]:
    """`module.modules()` of all of them, but fast and with what is shared twice."""
    return walk(*modules)[0]


class Settings:
    """Training flags and parameters of modules and of all that is in them, and the arguments of their calls.

    Made before the forward of a stack, or a block's call, and closed behind it: a second run has to meet the flags at
    its start, but the parameters at its end, as lazy ones are made on the way. `changed` tells whether modules are set
    otherwise now; if so, `lend` sets what was then for some of them, and returns calls that put back, in reverse
    order, what was just before. Tensors that have been modified in place cannot be lent, and are an error.
    """

    __slots__ = (
        "arguments", "by_module", "has_buffers", "modules", "owns", "parameters", "registered", "requires_grad", "then",
        "training", "values", "versions",
    )  # fmt: skip

    def __init__(self, *modules: nn.Module) -> None:
        self.by_module: dict[nn.Module, tuple[bool, list[tuple[str, Tensor, bool]]]] | None = None
        self.modules, self.owns, read = walk(*modules)
        self.registered, self.training = [row[2] for row in read], [row[3] for row in read]
        self.has_buffers = any([row[1] for row in read])

    def close(self, arguments: Sequence[Tensor] = ()) -> None:
        self.arguments = arguments
        self.then = list(map(dict.copy, self.registered))
        self.values = self._values(self.then)
        self.parameters = [p for p in self.values if p is not None]
        self.requires_grad = list(map(REQUIRES_GRAD, self.parameters))
        self.versions = self._versions()

    def changed(self) -> bool:
        if self._versions() != self.versions:
            self._complain()
        values = self._values(self.registered)
        return (
            list(map(TRAINING, self.owns)) != self.training
            or list(map(REQUIRES_GRAD, self.parameters)) != self.requires_grad
            or len(values) != len(self.values)
            or any(map(is_not, values, self.values))
        )

    def _values(self, parameters: Sequence[Any]) -> list[Tensor | None]:
        return [*chain.from_iterable(map(VALUES, filter(None, parameters)))]

    def _versions(self) -> list[int]:
        """Those of parameters, and of arguments behind them."""
        try:
            return list(map(VERSION, chain(self.parameters, self.arguments)))
        except RuntimeError:  # an inference tensor among them
            return list(map(version, chain(self.parameters, self.arguments)))

    def _complain(self) -> None:
        """Raise RuntimeError about a tensor that has been modified in place."""
        changed = [now != count for now, count in zip(self._versions(), self.versions, strict=True)]
        for t in compress(self.arguments, changed[len(self.parameters) :]):
            raise modified(f"an argument of shape {list(t.shape)}")
        for m, name, _ in compress(self._named(), changed):
            raise modified(f"parameter {name!r} of {m}")

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
        for m, parameters in zip(self.modules, self.then, strict=True):
            yield from ((m, name, p) for name, p in parameters.items() if p is not None)


def modified(what: str) -> RuntimeError:
    return RuntimeError(
        f"{what} has been modified in place since the forward of its reversible stack, which backward has to run again;"
        " modify it, or step the optimizer, after backward"
    )


PLAIN = (Tensor, nn.Parameter)  # FSDP exchanges a module's parameters for others itself
