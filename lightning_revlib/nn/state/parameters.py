"""Parameters and arguments: what a block reads, and what an optimizer or the user may change since."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import compress
from operator import is_not
from typing import Any, TypeGuard

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


class Parameters(State):
    """Parameters of modules when a forward ended, and the versions of arguments by then.

    They are noted at the end, as lazy modules make their parameters on the way. Parameters that are others by now, as
    `torch.func.functional_call` lends them, can be put in place; a tensor that was modified in place cannot.

    A parameter that the forward itself has moved is lent as a copy, which the second run will set to the same, as a
    data-dependent initialisation does. Parameters without gradient are left to `Frozen`.
    """

    shared = True
    __slots__ = (
        "arguments", "before", "changed", "checked", "index", "modules", "moved", "named", "requires_grad",
        "versions",
    )  # fmt: skip

    def __init__(self, call: Call) -> None:
        self.modules, self.arguments = call.modules, call.arguments
        _refuse_sample_gradients(call.modules)
        ready = [p for _, _, p in named_parameters(call.modules) if not isinstance(p, UninitializedParameter)]
        self.before = [*zip(ready, map(version, ready), strict=True)]
        self.index: dict[nn.Module, list[tuple[str, nn.Parameter, bool]]] = {}  # made when it is needed

    def close(self) -> bool:
        self.arguments = [*{id(t): t for t in self.arguments}.values()]
        self.named = named_parameters(self.modules)
        self.requires_grad = [p.requires_grad for _, _, p in self.named]
        self.checked = self.named
        if not all(self.requires_grad):
            self.checked = [each for each in self.named if not is_frozen(each[2])]
        self.versions = self._versions()
        before, self.before = {id(p): count for p, count in self.before}, []
        counted = zip(self.checked, self.versions, strict=False)  # arguments follow
        self.moved = {p for (_, _, p), count in counted if before.get(id(p), count) != count and p.requires_grad}
        return True

    def is_current(self) -> bool:
        self.changed = self._find_changed()
        if self.changed or self.moved:
            return False
        now = [p for m in self.modules for p in m._parameters.values() if p is not None]
        return (
            len(now) == len(self.named)
            and not any(map(is_not, now, [p for _, _, p in self.named]))
            and [p.requires_grad for p in now] == self.requires_grad
        )

    @contextmanager
    def restore(self, modules: Sequence[nn.Module]) -> Iterator[None]:
        lent: list[tuple[nn.Module, str, nn.Parameter, Lent]] = []
        with ExitStack() as undo:
            for m in filter(self._by_module().__contains__, modules):
                for name, p, requires_grad in self.index[m]:
                    if (m, name) in self.changed:
                        raise modified(f"parameter {name!r} of {brief(m)}")
                    if p in self.moved and type(p) in ORDINARY:
                        undo.callback(m._parameters.__setitem__, name, m._parameters[name])
                        m._parameters[name] = copy = Lent(p.detach().clone(), requires_grad)
                        lent.append((m, name, p, copy))
                    else:
                        _put(undo, m, name, p, requires_grad)
            try:
                yield
            except Exception:  # of the block; a second run that ends early raises another
                lent = []
                raise
            finally:
                _check_lent(lent)

    def _find_changed(self) -> set[tuple[nn.Module, str]]:
        """Return the parameters that were modified in place since: an error for the blocks that have them.

        An optimizer in backward may have stepped those of other blocks. Raises StateError for an argument.
        """
        changed = [now != then for now, then in zip(self._versions(), self.versions, strict=True)]
        for t in compress(self.arguments, changed[len(self.checked) :]):
            raise modified(f"an argument of shape {list(t.shape)}")
        return {(m, name) for m, name, _ in compress(self.checked, changed)}

    def _by_module(self) -> dict[nn.Module, list[tuple[str, nn.Parameter, bool]]]:
        if not self.index:
            self.index = {m: [] for m in self.modules}
            for (m, name, p), requires_grad in zip(self.named, self.requires_grad, strict=True):
                self.index[m].append((name, p, requires_grad))
        return self.index

    def _versions(self) -> list[int]:
        try:
            return [p._version for _, _, p in self.checked] + [t._version for t in self.arguments]
        except RuntimeError:  # inference tensors do not count their changes
            return [version(p) for _, _, p in self.checked] + [version(t) for t in self.arguments]


def _refuse_sample_gradients(modules: Sequence[nn.Module]) -> None:
    """Raise StateError for layers that Opacus or the like has wrapped."""
    for m, name, p in named_parameters([m for m in modules if m._forward_hooks]):
        if hasattr(p, "grad_sample"):
            raise StateError(
                f"parameter {name!r} of {brief(m)} has gradients by sample, of Opacus or the like, whose forward hooks"
                " would fire twice; name treatments=['store', ...] for the stack, or undo the swap by restore(model)"
            )


def _check_lent(lent: Sequence[tuple[nn.Module, str, nn.Parameter, Lent]]) -> None:
    """Raise StateError if a second run has not set a parameter to what the first one did."""
    for m, name, p, copy in lent:
        if not (p.is_meta or is_fake(p) or (copy - p).norm() <= 0.01 * p.norm()):  # 0.01 is for 16 bits
            raise StateError(
                f"parameter {name!r} of {brief(m)} is moved by its block's call, and a second run moves it on; have it"
                " require no gradient, as in requires_grad_(False), or make it a buffer, which are put back"
            )


def _put(undo: ExitStack, m: nn.Module, name: str, p: nn.Parameter, requires_grad: bool) -> None:
    now = m._parameters[name] if name in m._parameters else None  # a scripted module has no dict of them
    if now is not p and type(p) in ORDINARY and type(now) in ORDINARY:
        undo.callback(m._parameters.__setitem__, name, now)
        m._parameters[name] = p
    if p.is_leaf and p.requires_grad != requires_grad:
        undo.callback(p.requires_grad_, p.requires_grad)
        p.requires_grad_(requires_grad)
