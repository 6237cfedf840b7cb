"""Parameters without gradient, which a block's own call may move, as a codebook by a moving average of its input."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeGuard

from torch import Tensor, nn

from lightning_revlib.nn.state.base import Call, State, version
from lightning_revlib.nn.state.buffers import changes_silently
from lightning_revlib.nn.state.parameters import ORDINARY, Lent


class Frozen(State):
    """The former values of parameters without gradient that a block's call moves. A second run moves copies of them.

    Copies are made before the call. Torch's own layers move none, and may be large: theirs are not copied.
    """

    __slots__ = ("former", "met")

    def __init__(self, call: Call) -> None:
        self.met: list[tuple[nn.Module, str, Any, int, Tensor | None]] = []  # with their versions, and perhaps copies
        for m in call.modules:
            for name, p in m._parameters.items():
                if is_frozen(p):
                    self.met.append((m, name, p, version(p), p.detach().clone() if may_move(m) else None))
        self.former: list[tuple[nn.Module, str, Tensor]] = []

    @classmethod
    def concerns(cls, modules: Sequence[nn.Module]) -> bool:
        return any([is_frozen(p) for m in modules for p in m._parameters.values()])

    def close(self) -> bool:
        for m, name, p, count, before in self.met:
            if before is None:
                if version(p) != count:
                    raise RuntimeError(
                        f"parameter {name!r} of {m} requires no gradient and is changed in place by its block's call,"
                        " which backward has to run again; make it a buffer of your own module, which is put back"
                    )
            elif version(p) != count or changes_silently(m, name, m.training, before, p):
                self.former.append((m, name, before))
        self.met = []
        return bool(self.former)

    @contextmanager
    def restore(self, modules: Sequence[nn.Module]) -> Iterator[None]:
        now = [(m, name, m._parameters[name]) for m, name, _ in self.former]
        for m, name, before in self.former:
            m._parameters[name] = Lent(before.clone(), requires_grad=False)
        try:
            yield
        finally:
            for m, name, p in now:
                m._parameters[name] = p


def is_frozen(p: Any) -> TypeGuard[nn.Parameter]:
    return type(p) in ORDINARY and not p.requires_grad and p.numel() > 0  # one that DeepSpeed has sharded is empty


def may_move(m: nn.Module) -> bool:
    """Return whether a call may move the module's parameters, as far as its class tells: it is no layer of torch's."""
    forward = getattr(type(m), "forward", None)
    is_layer = getattr(forward, "__module__", "").startswith("torch.") and forward is not nn.Module.forward
    return not is_layer or isinstance(m, nn.Embedding)
