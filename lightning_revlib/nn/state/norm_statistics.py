"""Running statistics of norms, which they write in training and read in evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.parameter import UninitializedBuffer

NormBefore: TypeAlias = tuple[nn.Module, bool, int | None]  # its training flag and batches before a call
COUNTS_BATCHES = (_BatchNorm.forward, nn.SyncBatchNorm.forward)
WRITES_STATISTICS = (*COUNTS_BATCHES, _InstanceNorm.forward)
STATISTICS = {"running_mean", "running_var", "num_batches_tracked"}
SCRATCH: dict[tuple[Any, ...], dict[str, Tensor | None]] = {}  # statistics that norms write into, and nobody reads


def scratch(number: int, statistics: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    """Others like these for the batch norm of that number in a block: the same for all that are alike.

    Their versions stay as they are, but for the counter's, which no graph saves.
    """
    mean: Any = statistics["running_mean"]
    key = number, mean.shape, mean.dtype, mean.device
    if (found := SCRATCH.get(key)) is None:
        found = {n: None if (b := statistics.get(n)) is None else b.clone() for n in STATISTICS}
        if type(mean) is Tensor:  # not one that a mode has made, which ends with the mode
            SCRATCH[key] = found
    return found


def batches(norm: nn.Module) -> int | None:
    """How often a batch norm has counted a batch in training, more or less; None if it does not."""
    counter = norm._buffers.get("num_batches_tracked")
    if counter is None or counter.is_inference() or type(norm).forward not in COUNTS_BATCHES:
        return None
    return counter._version


def is_usual(norm: nn.Module) -> bool:
    """Whether its class says what is done with its buffers: they are statistics, and no hook may read them."""
    buffers = norm._buffers
    if "forward" in norm.__dict__ or "running_mean" not in buffers or not buffers.keys() <= STATISTICS:
        return False
    lazy = isinstance(buffers["running_mean"], UninitializedBuffer)  # by a hook of its own
    return lazy or not (norm._forward_hooks or norm._forward_pre_hooks)


def take_norms(inside: Mapping[nn.Module, list[nn.Module]]) -> dict[nn.Module, list[NormBefore]]:
    """By block, the norms that count batches in training and are its own; they are taken out of what is `inside`.

    These can be looked at before and behind the forward of all blocks, not of each, which takes less time.
    """
    found: dict[nn.Module, list[NormBefore]] = {
        block: [(m, True, n) for m in modules if m.training and is_usual(m) and (n := batches(m)) is not None]
        for block, modules in inside.items()
    }
    norms = [m for m, _, _ in chain.from_iterable(found.values())]
    if len(own := set(norms)) != len(norms):
        return {}
    for modules in inside.values():
        modules[:] = [m for m in modules if m not in own]
    return found
