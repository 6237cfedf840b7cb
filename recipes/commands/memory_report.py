"""Run `revlib report`: measure the activation memory of a recipe by depth, under three ways to execute it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf, open_dict
from rich.console import Console
from rich.table import Table
from torch import nn

from lightning_revlib.nn import MemoryMeter, restore, swap
from lightning_revlib.recipes.display.panel import Bytes
from lightning_revlib.recipes.display.picture import save

TRUE = {"64-true": torch.float64, "bf16-true": torch.bfloat16, "16-true": torch.float16}  # by precision
MIXED = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
WAYS = ("plain", "checkpointed", "reversible")


class Point(NamedTuple):
    """The bytes that one depth takes, and its number of reversible steps."""

    depth: Any
    steps: int
    bytes: Bytes


def report_memory(cfg: DictConfig) -> None:
    """Measure `cfg.recipe` at each of `cfg.depths` on a batch of zeros; print a table and draw it."""
    depths = OmegaConf.to_container(cfg.depths) if OmegaConf.is_list(cfg.depths) else [cfg.depths]
    if getattr(get_object(cfg.recipe._target_), "is_pretrained", False):
        raise ValueError(
            "depth: a pretrained model has its own; revlib report budget_sweep=true measures it by budgets"
        )
    if not isinstance(depths, list) or not depths:
        raise ValueError(f"depths={cfg.depths}: give one depth or more, such as depths=[2,4,8]")
    torch.manual_seed(cfg.seed)
    points = []
    for depth in depths:
        with open_dict(cfg):
            cfg.depth = depth
        with autocast_of(cfg, "cpu"):
            points.append(measure(build(cfg), depth, cfg.batch_size))
    _print(points, cfg.batch_size, type_name(cfg))
    path = draw(cfg.picture, points, f"{type_name(cfg)}, batch of {cfg.batch_size}")
    print(f"picture: {os.path.relpath(path)}")


def build(cfg: DictConfig) -> Any:
    """Build the recipe's module for the images or tokens of `cfg.data`, in its trainer's precision."""
    data = instantiate(cfg.data) if "_target_" in cfg.get("data", {}) else None
    module = instantiate(cfg.recipe, **getattr(data, "model_arguments", {}))
    return module.to(dtype) if (dtype := TRUE.get(precision_of(cfg))) else module


def precision_of(cfg: DictConfig) -> str:
    """Return the precision of the configuration's trainer."""
    return str(cfg.trainer.get("precision") or "32-true")


def autocast_of(cfg: DictConfig, device: str) -> torch.autocast:
    """Return the autocast of the configuration's precision on a device."""
    dtype = MIXED.get(precision_of(cfg))
    return torch.autocast(torch.device(device).type, dtype, enabled=dtype is not None)


def sample(module: Any, batch_size: Any) -> torch.Tensor:
    """Return the module's `example_input_array`, repeated to a batch.

    Raises ValueError for a module without one, and for a batch size that is no whole number of 1 or more.
    """
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: pass a whole number of 1 or more")
    example = getattr(module, "example_input_array", None)
    if example is None:
        raise ValueError(
            f"{type(module).__name__} has no example_input_array: set it in __init__ to an input of one sample"
        )
    batch = example.expand(batch_size, *example.shape[1:])
    return batch.to(next(module.parameters()).dtype) if batch.is_floating_point() else batch


def measure(module: Any, depth: Any, batch_size: int) -> Point:
    """Run forward and backward of a recipe's module on its `example_input_array`, repeated to a batch."""
    found = activations(module, sample(module, batch_size))
    return Point(depth, sum(len(module.get_submodule(path)) for path in swap(module)), found)


def activations(module: nn.Module, inputs: Any, ways: Sequence[str] = WAYS) -> Bytes:
    """Return the bytes of one forward and backward, without inputs, parameters and their gradients.

    A module that is swapped already is measured as it is for "reversible", with its options and memory plan. It is in
    ordinary execution afterwards, with gradients and running statistics that mean nothing. Raises ValueError if it has
    no stack.
    """
    counts = {path: len(module.get_submodule(path)) for path in swap(module)}  # type: ignore[arg-type]
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    found = {}
    for way in sorted(ways, key=("reversible", "checkpointed", "plain").index):
        if way == "checkpointed":
            swap(module, {path: {"treatments": ["checkpoint"] * count} for path, count in counts.items()})
        with torch.enable_grad(), MemoryMeter() as meter:
            output = module(inputs)
            held = meter.live
            gradient = torch.ones_like(output)
            meter.reset_peak()
            output.backward(gradient)
        found[way] = held, meter.peak
        del output, gradient
        restore(module)
    return found


def draw(path: str | Path, points: Sequence[Point], title: str) -> Path:
    """Write a PNG: bytes held after forward beside the peak in backward, against the number of steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # imported here since it is slow
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    for axis, what, index in zip(
        figure.subplots(1, 2), ("held after forward", "peak in backward"), (0, 1), strict=True
    ):
        for way, marker, line in zip(WAYS, "osD", ("-", "--", ":"), strict=True):
            sizes = [point.bytes[way][index] / 2**20 for point in points]
            axis.plot([point.steps for point in points], sizes, marker=marker, linestyle=line, label=way)
        axis.set(xlabel="reversible steps", ylabel="activations, MiB", title=what, ylim=(0, None))
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
        axis.legend()
    return save(figure, path)


def type_name(cfg: DictConfig) -> str:
    """Return the name of the recipe's network."""
    return str(cfg.recipe["_target_"]).rpartition(".")[2].removesuffix("Module")


def _print(points: Sequence[Point], batch_size: int, name: str) -> None:
    """Print a table with a row for each depth."""
    largest = max(peak for point in points for _, peak in point.bytes.values())
    unit, size = ("MiB", 2**20) if largest >= 10 * 2**20 else ("KiB", 2**10)
    title = f"{name}: {unit} of activations held / peak in backward, batch of {batch_size}"
    table = Table(title=title, title_justify="left")
    for column in ("depth", "steps", *WAYS):
        table.add_column(column, justify="left" if column == "depth" else "right")
    for p in points:
        cells = [" / ".join(f"{count / size:,.1f}" for count in p.bytes[way]) for way in WAYS]
        table.add_row(str(p.depth), str(p.steps), *cells)
    Console().print(table)
