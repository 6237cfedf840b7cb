"""A call of a model, run with some of its containers swapped and measured. The model is left as it was."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_revlib.nn.convert.swap import Match, Targets, find, preserve_stacks, swap_one
from lightning_revlib.nn.internals import pytree
from lightning_revlib.nn.meter import ColumnMeter, CostMeter
from lightning_revlib.nn.stacks.module_list import Layerwise
from lightning_revlib.nn.stacks.sequential import CoupledSequential, ReversibleSequential
from lightning_revlib.nn.state.preserve import preserve_state

SILENT = {"on_drift": "warn_once", "drift_tolerance": math.inf}  # options of a stack whose drift the report tells


class Costs(NamedTuple):
    """Bytes held after forward, peak bytes in backward, and FLOPs."""

    held: int
    peak: int
    flops: int


class Call:
    """A call of a model, which each method but `run` leaves as it was."""

    def __init__(self, model: nn.Module, inputs: Any, kwargs: Any) -> None:
        self.model = model
        self.inputs, self.kwargs = pytree.tree_map_only(Tensor, torch.detach, (inputs, kwargs))

    def run(self) -> Any:
        """Run the model."""
        return self.model(*self.inputs, **self.kwargs)

    def try_inputs(self) -> list[Tensor]:
        """Return the model's outputs in evaluation. Raises TypeError if the input is a batch that it does not take."""
        try:
            return self.evaluate()
        except Exception as error:
            if self.kwargs or len(self.inputs) != 1 or not isinstance(self.inputs[0], (Mapping, list, tuple)):
                raise
            raise TypeError(
                f"report: {type(self.model).__name__} cannot be called with a {type(self.inputs[0]).__name__}"
                f" ({type(error).__name__}: {error}); pass the arguments of its forward: report(model, **batch) for a"
                " mapping, report(model, batch[0]) for a batch of inputs and targets"
            ) from error

    def evaluate(self) -> list[Tensor]:
        """Return the model's floating-point outputs in evaluation."""
        with self.in_mode(False):
            return self.forward(floating)

    def forward(self, select: Any) -> list[Tensor]:
        """Return those of the outputs that `select` chooses, `floating` or `judged`, without gradients."""
        with preserve_state(self.model), torch.no_grad():
            return [y.clone() for y in select(self.run())]

    @contextmanager
    def in_mode(self, training: bool) -> Iterator[None]:
        """Have the model in training mode inside, or in evaluation; modules of a model that trains keep their modes."""
        modes = [(m, m.training) for m in self.model.modules()]
        if not (training and self.model.training):
            self.model.train(training)
        try:
            yield
        finally:
            for m, mode in modes:
                m.training = mode

    @contextmanager
    def swapped(self, found: Iterable[Match], targets: Targets) -> Iterator[None]:
        """Have the targets swapped inside, and the other stacks that were found run by ordinary autograd.

        A grid and a plan that the first forward chooses are chosen. Stacks measure their drift and do not warn of it.
        """
        with preserve_stacks(module for _, module, _ in found):
            for path, module, _ in found:
                if path not in targets and isinstance(module, ReversibleSequential):
                    module.__class__ = CoupledSequential  # type: ignore[assignment]
                elif path not in targets and isinstance(module, Layerwise):
                    module.treatments, module.budget = ("store",) * len(module), None
            for path, module, options in find(self.model, targets):
                swap_one(path, module, {**(options or {}), **SILENT})
            stacks: list[Any] = [self.model.get_submodule(path) for path in targets]
            if any(getattr(stack, "grid_bits", None) == "auto" for stack in stacks):
                self.forward(floating)
            if any(getattr(stack, "budget", None) for stack in stacks):
                self.costs()
            yield

    def logits_held(self) -> int:
        """Return the bytes that forward in training leaves in tensors with a column for each word of the vocabulary.

        These are the logits of a language model that computes its loss, casts of them and their probabilities. It is
        0 for other models, and with `chunk_loss`.
        """
        weight = getattr(getattr(self.model, "get_output_embeddings", lambda: None)(), "weight", None)
        if weight is None:
            return 0
        meter = ColumnMeter(weight.shape[0])
        with self.in_mode(True), preserve_state(self.model), torch.enable_grad(), meter:
            out = self.run()
            return meter.live if isinstance(getattr(out, "loss", None), Tensor) else 0

    def costs(self) -> tuple[Costs, list[Tensor]]:
        """Return the costs of one forward and backward, and the outputs that it is judged by."""
        with preserve_state(self.model), torch.enable_grad(), CostMeter() as meter:
            for parameter in self.model.parameters():
                parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
            before = meter.live
            out = self.run()
            outputs = [y for y in judged(out) if y.requires_grad]
            if not outputs:
                raise ValueError(
                    f"report: no output of {type(self.model).__name__} requires grad; unfreeze a parameter"
                )
            held = meter.live - before
            grads = [torch.ones_like(y) for y in outputs]
            meter.reset_peak()
            torch.autograd.backward(outputs, grads)
            return Costs(held, meter.peak - before, meter.flops), [y.detach() for y in judged(out)]


def floating(out: Any) -> list[Tensor]:
    """Return the floating-point tensors of a model's output."""
    return [y for y in pytree.tree_leaves(out) if isinstance(y, Tensor) and y.is_floating_point()]


def judged(out: Any) -> list[Tensor]:
    """Return the loss of a model's output, if it has an attribute `loss`; else its floating-point tensors."""
    loss = getattr(out, "loss", None)
    return [loss] if isinstance(loss, Tensor) else floating(out)


def change(xs: list[Tensor], ys: list[Tensor]) -> float:
    """Return |x - y| of one number, as a loss; else the relative distance."""
    return abs((xs[0] - ys[0]).item()) if len(ys) == 1 and ys[0].numel() == 1 else distance(xs, ys)


def distance(xs: list[Tensor], ys: list[Tensor]) -> float:
    """Return |x - y| / |y| in the 2-norm, of all together."""
    difference = sum((x - y).double().square().sum().item() for x, y in zip(xs, ys, strict=True))
    return math.sqrt(difference / max(sum(y.double().square().sum().item() for y in ys), 1e-300))
