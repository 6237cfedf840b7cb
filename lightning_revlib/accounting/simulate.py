"""A training step of shapes alone: parameters, buffers, batch and optimizer as fake tensors, without any memory."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from lightning_revlib.accounting.step import Program
from lightning_revlib.nn.convert.swap import Match, Record, put_back, record, stacks, swap_one
from lightning_revlib.nn.internals import FakeTensorMode, pytree
from lightning_revlib.pretrained.packing import unpacked

GRID = 12  # bits, for "auto"; a step's bytes are the same with any number
NO_VALUES = ("DataDependentOutputException", "DynamicOutputShapeException")  # of fake tensors; private in torch


@contextmanager
def simulated(program: Program, device: torch.device | str | None = None) -> Iterator[Program]:
    """Have a program of fake tensors inside, which computes shapes only. The module is put back at the end.

    Its tensors are said to be on `device`; without, where they are, or on the CPU if they are on the meta device.
    DDP is passed over, whose buckets of gradients are there before the step.

    Raises ValueError for a device that this machine does not have, TypeError for a step that reads values and for
    sharded parameters.
    """
    device = _known(device)
    _check_whole(program.model)
    made: dict[int, Tensor] = {}  # by id of the original, for tensors that modules share

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            where = device or ("cpu" if tensor.is_meta else tensor.device)
            new = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=where)
            if isinstance(tensor, nn.Parameter):
                new = nn.Parameter(new, tensor.requires_grad)
            made[id(tensor)] = new
        return made[id(tensor)]

    with FakeTensorMode(allow_non_fake_inputs=True), ExitStack() as undo:
        undo.callback(put_back, _choose_grids(program.model))
        for module in program.model.modules():
            kinds: list[dict[str, Any]] = [module._parameters, module._buffers, vars(module)]
            for tensors in kinds:
                for name, tensor in list(tensors.items()):
                    if isinstance(tensor, Tensor):
                        undo.callback(tensors.__setitem__, name, tensor)
                        tensors[name] = fake(tensor)
            if isinstance(module, DistributedDataParallel):
                undo.callback(vars(module).pop, "forward")
                vars(module)["forward"] = module.module
        if not (isinstance(program.batch, dict) and program.batch.get("position_ids") is not None):
            undo.enter_context(unpacked())
        batch = pytree.tree_map_only(Tensor, fake, program.batch)
        try:
            yield program._replace(batch=batch, optimizer=_twin(program.optimizer, fake))
        except RuntimeError as error:
            if type(error).__name__ not in NO_VALUES:
                raise
            raise TypeError(
                f"simulate=True: the step reads the value of a tensor, which a simulated one has not ({error}): leave"
                " out what needs it, such as a metric, .item() or a mask, or count the step on real tensors"
            ) from error


def _check_whole(model: nn.Module) -> None:
    """Raise TypeError if a parameter is a DTensor."""
    sharded = next((name for name, p in model.named_parameters() if hasattr(p, "to_local")), None)
    if sharded is not None:
        raise TypeError(
            f"simulate=True: the parameter {sharded} is sharded, and simulated tensors are not gathered from other"
            " processes: simulate the module as it is before fully_shard or another parallelism, with a share of"
            " parameters, gradients and optimizer state in each process; or count the step on real tensors"
        )


def _choose_grids(model: nn.Module) -> list[Record]:
    """Choose the grids that a first forward would choose by values, and return what it takes to undo that."""
    found: list[Match] = [(path, stack, None) for path, stack in stacks(model).items() if stack.grid_bits == "auto"]
    records = record(found)
    for path, stack, _ in found:
        vars(stack).pop("noted", None)  # the config of a pretrained model stays as it is
        swap_one(path, stack, {"grid_bits": GRID})
    return records


def _twin(optimizer: Optimizer | None, fake: Any) -> Optimizer | None:
    """Return an optimizer of the same class and options for the fake parameters, without state."""
    if optimizer is None:
        return None
    twin = object.__new__(type(optimizer))
    vars(twin).update({name: value for name, value in vars(optimizer).items() if name != "step"})  # as schedulers set
    twin.state = defaultdict(dict)
    twin.param_groups = [{**group, "params": [fake(p) for p in group["params"]]} for group in optimizer.param_groups]
    return twin


def _known(device: torch.device | str | None) -> torch.device | None:
    if device is None:
        return None
    device = torch.device(device)
    if device.type not in ("cpu", "meta") and not torch.get_device_module(device).is_available():
        raise ValueError(
            f"device={str(device)!r}: fake tensors on it need a machine that has one; device='cpu' counts the same"
            " tensors, but for kernels that differ, such as those of attention"
        )
    return device
