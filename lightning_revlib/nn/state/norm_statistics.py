"""Running statistics of norms, which a norm writes in training, without reading them, and reads in evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer

from lightning_revlib.nn.state.base import Call, State
from lightning_revlib.nn.state.lending import lend, tell_of_threads
from lightning_revlib.nn.state.parameters import value_then
from lightning_revlib.nn.state.tensors import version

COUNTS_BATCHES = (nn.BatchNorm1d.forward, nn.SyncBatchNorm.forward)  # those of all batch norms
WRITES_STATISTICS = (*COUNTS_BATCHES, nn.InstanceNorm1d.forward)
STATISTICS = {"running_mean", "running_var", "num_batches_tracked"}


class NormStatistics(State):
    """The statistics that norms of torch meet in a call. A second run leaves them untouched.

    No former value need be held of those that a norm writes: the second run writes into copies of the present values.
    """

    __slots__ = ("former", "norms", "read", "written")

    def __init__(self, call: Call) -> None:
        tell_of_threads(call.modules)
        self.norms = [(m, batches(m)) for m in call.modules if m._buffers and is_usual(m)]
        self.former = call.former
        self.written: list[nn.Module] = []
        self.read: list[tuple[nn.Module, str, Tensor | None, int]] = []  # with its version

    @classmethod
    def concerns(cls, call: Call) -> bool:
        return any([m._buffers and is_usual(m) for m in call.modules])

    def close(self) -> bool:
        for m, before in self.norms:
            if m._buffers["running_mean"] is None:
                continue
            if m.training or (before is not None and batches(m) != before):
                self.written.append(m)
            else:
                self.read += [(m, name, b, 0 if b is None else version(b)) for name, b in m._buffers.items()]
        self.norms = []
        return bool(self.read or self.written)

    def restore(self, modules: Sequence[nn.Module]) -> AbstractContextManager[None]:
        lent: list[tuple[nn.Module, str, Any]]
        lent = [(m, name, b.clone()) for m in self.written for name, b in m._buffers.items() if b is not None]
        for m, name, b, count in self.read:
            if (then := value_then(b, count, self.former, "buffer", name, m)) is not m._buffers[name]:
                lent.append((m, name, then))
        return lend(lent)


def is_usual(module: nn.Module) -> bool:
    """Return whether the module is a norm whose class tells what its call does with its buffers.

    The buffers are statistics then, and no hook may read them.
    """
    if getattr(type(module), "forward", None) not in WRITES_STATISTICS or "forward" in vars(module):
        return False
    buffers = module._buffers
    if "running_mean" not in buffers or not buffers.keys() <= STATISTICS:
        return False
    lazy = isinstance(buffers["running_mean"], UninitializedBuffer)  # which has hooks of its own
    return lazy or not (module._forward_hooks or module._forward_pre_hooks)


def batches(norm: nn.Module) -> int | None:
    """Return a number that grows with each batch that a batch norm counts in training; None if it counts none."""
    counter = norm._buffers.get("num_batches_tracked")
    if counter is None or counter.is_inference() or type(norm).forward not in COUNTS_BATCHES:
        return None
    return counter._version
