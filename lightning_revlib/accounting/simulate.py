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

from lightning_revlib.accounting.fakes import Fakes
from lightning_revlib.accounting.optimizer import OURS, wrapped
from lightning_revlib.accounting.step import Program
from lightning_revlib.nn.convert.swap import preserve_stacks, stacks, swap_one
from lightning_revlib.nn.internals import FakeTensorMode, fsdp_objects, pytree
from lightning_revlib.nn.plan.unshard import fsdp_modules
from lightning_revlib.pretrained.packing import unpacked

GRID = 12  # bits, for "auto"; a step's bytes are the same with any number
NO_VALUES = (
    "the step reads the value of a tensor, which a simulated one does not have: leave out what needs it, such as a"
    " metric, .item() or a mask"
)
NO_KERNEL = "an operator has no function of shapes: register one by torch.library.register_fake, take a newer torch"
WHY = {  # by torch's errors, whose names are private
    "DataDependentOutputException": NO_VALUES,
    "DynamicOutputShapeException": NO_VALUES,
    "UnsupportedOperatorException": NO_KERNEL,
}


@contextmanager
def simulated(program: Program, device: torch.device | str | None = None) -> Iterator[Program]:
    """Have a program of fake tensors inside, which computes shapes only. The module is put back at the end.

    Its tensors are said to be on `device`; without, where they are, or on the CPU if they are on the meta device.
    DDP's wrapper is bypassed, whose buckets of gradients are there before the step.

    Raises ValueError for a device that this machine does not have, or that a model is not sharded on; TypeError for a
    step that reads values, an operator without shapes, and tensors that are not strided.
    """
    fake = Fakes(_known(device, program.model))
    with FakeTensorMode(allow_non_fake_inputs=True), ExitStack() as undo:
        _choose_grids(program.model, undo)
        _fake_tensors(program.model, fake, undo)
        for module in program.model.modules():
            if isinstance(module, DistributedDataParallel):
                undo.callback(vars(module).pop, "forward")
                vars(module)["forward"] = module.module
        if not (isinstance(program.batch, dict) and program.batch.get("position_ids") is not None):
            undo.enter_context(unpacked())
        batch = pytree.tree_map_only(Tensor, fake, program.batch)
        try:
            yield program._replace(batch=batch, optimizer=_twin(program.optimizer, fake))
        except RuntimeError as error:
            if (why := WHY.get(type(error).__name__)) is None:
                raise
            raise TypeError(f"simulate=True: {why}, or count the step on real tensors ({error})") from error


def _fake_tensors(model: nn.Module, fake: Fakes, undo: ExitStack) -> None:
    """Replace a model's tensors by fakes, those that FSDP2 keeps in objects of its own included."""
    for module in model.modules():
        kinds: list[dict[str, Any]] = [module._parameters, module._buffers, vars(module)]
        for names in kinds:
            tensors = {name: tensor for name, tensor in names.items() if isinstance(tensor, Tensor)}
            undo.callback(names.update, tensors)
            names.update({name: fake(tensor) for name, tensor in tensors.items()})
    for part in fsdp_objects(fsdp_modules(model)):
        before = dict(vars(part))
        undo.callback(vars(part).update, before)
        undo.callback(vars(part).clear)  # called first
        for value in before.values():
            if isinstance(value, set):  # which hooks refer to
                undo.callback(value.update, [*value])
                undo.callback(value.clear)
        vars(part).update(pytree.tree_map_only(Tensor, fake, before))


def _choose_grids(model: nn.Module, undo: ExitStack) -> None:
    """Choose the grids that a first forward would choose by values."""
    found = {path: stack for path, stack in stacks(model).items() if stack.grid_bits == "auto"}
    undo.enter_context(preserve_stacks(found.values()))
    for path, stack in found.items():
        swap_one(path, stack, {"grid_bits": GRID})


def _twin(optimizer: Optimizer | None, fake: Fakes) -> Optimizer | None:
    """Return an optimizer of the same class and options for the fake parameters, without state.

    Of one that wraps others, all are made.
    """
    if optimizer is None:
        return None
    originals = wrapped(optimizer)
    twins = {id(each): object.__new__(type(each)) for each in originals}
    for each in originals:
        own = {name: value for name, value in vars(each).items() if name not in ("step", *OURS)}  # schedulers set step
        own = pytree.tree_map_only(Optimizer, lambda x: twins[id(x)], own)  # copies dicts and lists, too
        if "param_groups" in vars(each):  # else they are those of the one that it wraps
            own["state"] = defaultdict(dict)
            own["param_groups"] = [
                {**group, "params": [fake(p) for p in group["params"]]} for group in each.param_groups
            ]
        vars(twins[id(each)]).update(own)
    return twins[id(optimizer)]


def _known(device: torch.device | str | None, model: nn.Module) -> torch.device | None:
    """Return the device. Raises ValueError if the machine has none, or the model is sharded on others."""
    if device is None:
        return None
    device = torch.device(device)
    meshes = [p.device_mesh for p in model.parameters() if hasattr(p, "device_mesh")]
    if others := {mesh.device_type for mesh in meshes} - {device.type}:
        raise ValueError(f"device={str(device)!r}: the model is sharded on {others.pop()}; leave out device")
    if device.type not in ("cpu", "meta") and not torch.get_device_module(device).is_available():
        raise ValueError(
            f"device={str(device)!r}: fake tensors on it need a machine that has one; device='cpu' counts the same"
            " tensors, but for kernels that differ, such as those of attention"
        )
    return device
