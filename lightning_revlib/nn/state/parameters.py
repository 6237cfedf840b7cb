"""Parameters: what a block reads, and what an optimizer or the user may change since."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence, Set
from contextlib import ExitStack, contextmanager
from typing import Any, TypeGuard

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from lightning_revlib.nn.state.base import Call, Former, State, StateError, brief
from lightning_revlib.nn.state.entries import ABSENT, swapped, value_of
from lightning_revlib.nn.state.tensors import is_fake, version, versions

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


def named_parameters(modules: Iterable[nn.Module]) -> list[tuple[nn.Module, str, nn.Parameter]]:
    """Return the parameters of modules, not of modules in them, with their names; not those without a shape yet."""
    return [
        (m, name, p)
        for m in modules
        for name, p in m._parameters.items()
        if p is not None and type(p) is not UninitializedParameter
    ]


class Noted:
    """Parameters of modules at a time: whether they require grad, and their versions, in lists that compare at once."""

    __slots__ = ("ids", "named", "requires_grad", "versions")

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.named = named_parameters(modules)
        parameters = [p for _, _, p in self.named]
        self.ids = [*map(id, parameters)]
        self.requires_grad = [p.requires_grad for p in parameters]
        self.versions = versions(parameters)

    def modified(self) -> Set[tuple[nn.Module, str]]:
        """Return those that were modified in place since, but for those that are left to `Frozen`."""
        now = versions(p for _, _, p in self.named)
        if now == self.versions:
            return set()
        columns = zip(self.named, self.requires_grad, self.versions, now, strict=True)
        return {(m, name) for (m, name, p), grad, then, n in columns if then != n and (grad or not is_frozen(p))}

    def moved_since(self, before: Noted) -> Set[nn.Parameter]:
        """Return those that require grad and were modified in place between."""
        if self.versions == before.versions and self.ids == before.ids:
            return set()
        then = dict(zip(before.ids, before.versions, strict=True))
        columns = zip(self.named, self.requires_grad, self.versions, strict=True)
        return {p for (_, _, p), grad, count in columns if grad and then.get(id(p), count) != count}


class Parameters(State):
    """Parameters of modules when a forward ended.

    They are noted at the end, as lazy modules make their parameters on the way. Parameters that are others by now, as
    `torch.func.functional_call` lends them, can be put in place; a tensor that was modified in place cannot.

    A parameter that the forward itself has moved is lent as a copy, which the second run will set to the same, as a
    data-dependent initialisation does. Parameters without gradient are left to `Frozen`.
    """

    shared = True
    __slots__ = ("before", "by_module", "modified", "modules", "moved", "noted")

    def __init__(self, call: Call) -> None:
        self.modules = call.modules
        _refuse_sample_gradients(call.modules)
        self.before: Noted | None = Noted(call.modules)
        self.by_module: dict[nn.Module, list[tuple[str, nn.Parameter, bool]]] = {}  # made when it is needed

    def close(self) -> bool:
        assert self.before is not None
        self.noted = Noted(self.modules)
        self.moved = self.noted.moved_since(self.before)
        self.before = None
        return True

    def is_current(self) -> bool:
        # An error for the blocks that have them: an optimizer in backward may have stepped those of other blocks.
        self.modified = self.noted.modified()
        if self.modified or self.moved:
            return False
        now = Noted(self.modules)
        return now.ids == self.noted.ids and now.requires_grad == self.noted.requires_grad

    @contextmanager
    def restore(self, modules: Sequence[nn.Module]) -> Iterator[None]:
        lent: list[tuple[nn.Module, str, nn.Parameter, Lent]] = []
        with ExitStack() as undo:
            for m in modules:
                for name, p, requires_grad in self._parameters(m):
                    if (m, name) in self.modified:
                        raise modified(f"parameter {name!r} of {brief(m)}")
                    if p in self.moved and type(p) in ORDINARY:
                        copy = Lent(p.detach().clone(), requires_grad)
                        undo.enter_context(swapped([(m._parameters, name, copy)]))
                        lent.append((m, name, p, copy))
                    else:
                        _put(undo, m._parameters, name, p, requires_grad)
            try:
                yield
            except Exception:  # of the block; a second run that ends early raises another
                lent = []
                raise
            finally:
                _check_lent(lent)

    def _parameters(self, m: nn.Module) -> Sequence[tuple[str, nn.Parameter, bool]]:
        if not self.by_module:
            for (owner, name, p), requires_grad in zip(self.noted.named, self.noted.requires_grad, strict=True):
                self.by_module.setdefault(owner, []).append((name, p, requires_grad))
        return self.by_module.get(m, ())


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


def _is_exchanged(p: Any) -> bool:
    """Return whether somebody else puts the parameter in place for the time of a call: FSDP, or a second run."""
    return p is None or p is ABSENT or type(p) is Lent or type(p).__module__.startswith("torch.distributed.")


def _put(undo: ExitStack, parameters: Any, name: str, p: nn.Parameter, requires_grad: bool) -> None:
    now = value_of(parameters, name)
    if now is not p and not _is_exchanged(p) and not _is_exchanged(now):
        undo.enter_context(swapped([(parameters, name, p)]))
    if p.is_leaf and p.requires_grad != requires_grad:
        undo.callback(p.requires_grad_, p.requires_grad)
        p.requires_grad_(requires_grad)
