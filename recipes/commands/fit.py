"""Run `revlib report simulate=true`: whether a recipe's training fits into a memory, without one."""

from __future__ import annotations

import copy
from contextlib import suppress
from typing import Any

import torch
from hydra.errors import InstantiationException
from omegaconf import DictConfig, open_dict
from rich.console import Console
from rich.table import Table

from lightning_revlib.accounting.fit import fill, largest, ways
from lightning_revlib.accounting.simulate import simulated
from lightning_revlib.accounting.step import Program, count, program_of
from lightning_revlib.nn.meter import format_bytes
from lightning_revlib.nn.plan.limit import read_budget
from lightning_revlib.recipes.commands.memory_report import autocast_of, build, sample, type_name


def report_fit(cfg: DictConfig) -> None:
    """Simulate a training step of `cfg.recipe` in each way to run its stacks, and print which fit into `cfg.memory`.

    Raises ValueError for a memory that is no number of bytes, and as `sample` does.
    """
    limit = read_memory(cfg.memory)
    device = _device(cfg.device)
    with autocast_of(cfg, device):
        print(f"{type_name(cfg)}, batch of {cfg.batch_size}, {format_bytes(limit)} of {device}")
        table = Table("stacks", "highest", "fits", "largest batch", *["longest sequence"] * _has_length(cfg))
        console = Console()
        for name in ("plain", "checkpointed", "reversible"):
            with console.status(f"simulating {name} steps of larger and larger batches; large ones take minutes"):
                simulation = Simulation(cfg, name, device)
                total = simulation.total(cfg.batch_size)
                sizes = [largest(simulation.total, limit, cfg.batch_size)]
                if _has_length(cfg):
                    sizes.append(_longest(cfg, name, device, limit))
            fits = "yes" if total <= limit else "no"
            table.add_row(name, format_bytes(total), fits, *[str(size or "none") for size in sizes])
        console.print(table)
        _print_plan(cfg, device, limit)


class Simulation:
    """A recipe with its stacks run in a way."""

    def __init__(self, cfg: DictConfig, way: str, device: str) -> None:
        cfg = copy.deepcopy(cfg)  # which others read
        with open_dict(cfg):
            cfg.recipe.scheduler = None  # which would ask a Trainer for the number of steps
        self.module, self.device = build(cfg).train(), device
        self.totals: dict[int, int] = {}  # by batch size
        targets = getattr(self.module, "reversible_targets", None)
        next(each for each in ways(targets) if each.name == way).apply(self.module)

    def program(self, batch_size: int) -> Program:
        """Return the training step on a batch of that size."""
        x = sample(self.module, batch_size)
        batch = [x] if not x.is_floating_point() else [x, torch.zeros(batch_size, dtype=torch.long)]
        return program_of(self.module, batch, self.module.configure_optimizers(), None)

    def total(self, batch_size: int) -> int:
        """Return the highest bytes of the step."""
        if batch_size not in self.totals:
            with simulated(self.program(batch_size), self.device) as program:
                self.totals[batch_size] = count(program).highest.total
        return self.totals[batch_size]


def read_memory(value: Any) -> int:
    """Return a memory in bytes. Raises ValueError."""
    with suppress(ValueError, TypeError):
        found = read_budget(value)
        if isinstance(found, int):
            return found
    raise ValueError(f"memory={value}: pass the bytes of the device, such as memory=80GiB")


def _has_length(cfg: DictConfig) -> bool:
    return "length" in (cfg.get("data") or {})


def _longest(cfg: DictConfig, way: str, device: str, limit: int) -> int | None:
    """Return the longest sequence that fits, in quarters of the configured one."""
    before = cfg.data.length

    def total(length: int) -> int:
        cfg.data.length = length
        try:
            return Simulation(cfg, way, device).total(cfg.batch_size)
        except (ValueError, InstantiationException):
            if length <= before:
                raise
            return limit + 1  # positions by axes, say, are of one length

    try:
        return largest(total, limit, before, max(1, before // 4))
    finally:
        cfg.data.length = before


def _print_plan(cfg: DictConfig, device: str, limit: int) -> None:
    """Print what the stacks do with the memory that is left."""
    simulation = Simulation(cfg, "reversible", device)
    with simulated(simulation.program(cfg.batch_size), device) as program:
        found = fill(program, limit)
    if found is None:
        print("no plan fits; a smaller batch, or strategy.optimizer_in_backward=true, may")
        return
    total, plans = found
    print(f"with what is left as strategy.memory_budget: {format_bytes(total)}; {plans}")


def _device(name: Any) -> str:
    try:
        device = torch.device(name or "cpu")
        is_here = device.type == "cpu" or torch.get_device_module(device).is_available()
    except RuntimeError as error:  # such as of "meta", which has no module
        raise ValueError(f"device={name}: {str(error).splitlines()[0]}") from None
    if not is_here:
        print(f"device={name} is not here: simulated on the CPU, whose attention kernels and autocast lists differ")
        return "cpu"
    return str(name or "cpu")
