"""Parameters and arguments: what a block reads, and what an optimizer or the user may change since."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, TypeGuard

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from lightning_revlib.nn.state.base import Call, Former, State, StateError, brief
from lightning_revlib.nn.state.tensors import is_fake, version

ORDINARY = (Tensor, nn.Parameter)  # FSDP exchanges parameters of other types by itself


class Lent(nn.Parameter):
    """A copy of a parameter that its block moves, for the second run to move."""


def modified(what: str) -> StateError:
    return StateError(
        f"{what} has been modified in place since the forward of its reversible stack, which backward has to run again;"
        " modify it, or step the optimizer, after backward"
    )


def value_then(t: Any, count: int, former: Former, kind: str, name: str, m: nn.Module) -> Any:
    """Return a tensor, or None, as it was at a version: its former value if a later call of the forward changed it.

    Raises StateError if something else changed it.
    """
    if t is None or version(t) == count:
        return t
    if (id(t), count) not in former:
        raise modified(f"{kind} {name!r} of {brief(m)}")
    return former[id(t), count][1]


def is_frozen(p: Any) -> TypeGuard[nn.Parameter]:
    """Return whether a parameter is left to `Frozen`: one without gradient, and not empty, as DeepSpeed shards it."""
    return p is not None and not p.requires_grad and type(p) in ORDINARY and p.numel() > 0


def named_parameters(modules: Sequence[nn.Module]) -> list[tuple[nn.Module, str, nn.Parameter]]:
    """Return the parameters of modules, not of modules in them, with their names."""
    return [(m, name, p) for m in modules for name, p in m._parameters.items() if p is not None]


class Noted(NamedTuple):
    """A parameter when a forward ended."""

    module: nn.Module
    name: str
    parameter: nn.Parameter
    requires_grad: bool
    version: int | None  # None if it is left to `Frozen`

    def is_changed(self) -> bool:
        """Return whether it was modified in place since."""
        return self.version is not None and version(self.parameter) != self.version


class Parameters(State):
    """Parameters of modules when a forward ended, and the versions of arguments by then.

    They are noted at the end, as lazy modules make their parameters on the way. Parameters that are others by now, as
    `torch.func.functional_call` lends them, can be put in place; a tensor that was modified in place cannot.

    A parameter that the forward itself has moved is lent as a copy, which the second run will set to the same, as a
    data-dependent initialisation does. Parameters without gradient are left to `Frozen`.
    """

    shared = True
    __slots__ = ("arguments", "before", "changed", "index", "modules", "moved", "noted", "versions")

    def __init__(self, call: Call) -> None:
        self.modules, self.arguments = call.modules, call.arguments
        _refuse_sample_gradients(call.modules)
        ready = [p for _, _, p in named_parameters(call.modules) if not isinstance(p, UninitializedParameter)]
        self.before = {id(p): version(p) for p in ready}
        self.index: dict[nn.Module, list[Noted]] = {}  # made when it is needed

    def close(self) -> bool:
        self.arguments = [*{id(t): t for t in self.arguments}.values()]
        self.versions = [version(t) for t in self.arguments]
        self.noted = [
            Noted(m, name, p, p.requires_grad, None if is_frozen(p) else version(p))
            for m, name, p in named_parameters(self.modules)
        ]
        trained = [n for n in self.noted if n.requires_grad]
        self.moved = {n.parameter for n in trained if self.before.get(id(n.parameter), n.version) != n.version}
        self.before = {}
        return True

    def is_current(self) -> bool:
        for t, count in zip(self.arguments, self.versions, strict=True):
            if version(t) != count:
                raise modified(f"an argument of shape {list(t.shape)}")
        # An error for the blocks that have them: an optimizer in backward may have stepped those of other blocks.
        self.changed = {(n.module, n.name) for n in self.noted if n.is_changed()}
        now = [p for m in self.modules for p in m._parameters.values() if p is not None]
        return (
            not self.changed
            and not self.moved
            and len(now) == len(self.noted)
            and all(
                p is n.parameter and p.requires_grad == n.requires_grad for p, n in zip(now, self.noted, strict=True)
            )
        )

    @contextmanager
    def restore(self, modules: Sequence[nn.Module]) -> Iterator[None]:
        lent: list[tuple[Noted, Lent]] = []
        with ExitStack() as undo:
            for m in filter(self._by_module().__contains__, modules):
                for n in self.index[m]:
                    if (m, n.name) in self.changed:
                        raise modified(f"parameter {n.name!r} of {brief(m)}")
                    if n.parameter in self.moved and type(n.parameter) in ORDINARY:
                        undo.callback(m._parameters.__setitem__, n.name, m._parameters[n.name])
                        m._parameters[n.name] = copy = Lent(n.parameter.detach().clone(), n.requires_grad)
                        lent.append((n, copy))
                    else:
                        _put(undo, n)
            try:
                yield
            except Exception:  # of the block; a second run that ends early raises another
                lent = []
                raise
            finally:
                _check_lent(lent)

    def _by_module(self) -> dict[nn.Module, list[Noted]]:
        if not self.index:
            self.index = {m: [] for m in self.modules}
            for n in self.noted:
                self.index[n.module].append(n)
        return self.index


def _refuse_sample_gradients(modules: Sequence[nn.Module]) -> None:
    """Raise StateError for layers that Opacus or the like has wrapped."""
    for m, name, p in named_parameters([m for m in modules if m._forward_hooks]):
        if hasattr(p, "grad_sample"):
            raise StateError(
                f"parameter {name!r} of {brief(m)} has gradients by sample, of Opacus or the like, whose forward hooks"
                " would fire twice; name treatments=['store', ...] for the stack, or undo the swap by restore(model)"
            )


def _check_lent(lent: Sequence[tuple[Noted, Lent]]) -> None:
    """Raise StateError if a second run has not set a parameter to what the first one did."""
    for n, copy in lent:
        p = n.parameter
        if not (p.is_meta or is_fake(p) or (copy - p).norm() <= 0.01 * p.norm()):  # 0.01 is for 16 bits
            raise StateError(
                f"parameter {n.name!r} of {brief(n.module)} is moved by its block's call, and a second run moves it on;"
                " have it require no gradient, as in requires_grad_(False), or make it a buffer, which are put back"
            )


def _put(undo: ExitStack, n: Noted) -> None:
    parameters, p = n.module._parameters, n.parameter
    now = parameters[n.name] if n.name in parameters else None  # a scripted module has no dict of them
    if now is not p and type(p) in ORDINARY and type(now) in ORDINARY:
        undo.callback(parameters.__setitem__, n.name, now)
        parameters[n.name] = p
    if p.is_leaf and p.requires_grad != n.requires_grad:
        undo.callback(p.requires_grad_, p.requires_grad)
        p.requires_grad_(n.requires_grad)
