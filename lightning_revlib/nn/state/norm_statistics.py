"""Running statistics of norms, which a norm writes in training, without reading them, and reads in evaluation."""

from __future__ import annotations

from torch import nn
from torch.nn.parameter import UninitializedBuffer

COUNTS_BATCHES = (nn.BatchNorm1d.forward, nn.SyncBatchNorm.forward)  # those of all batch norms
WRITES_STATISTICS = (*COUNTS_BATCHES, nn.InstanceNorm1d.forward)
STATISTICS = {"running_mean", "running_var", "num_batches_tracked"}


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
