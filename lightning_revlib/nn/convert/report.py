"""`report`: the effect of a swap on a model, measured on a batch. The model is left as it was."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_revlib.nn.convert.discover import TOLERANCE, discover, with_larger_gamma
from lightning_revlib.nn.convert.swap import Match, Targets, find, put_back, record, swap
from lightning_revlib.nn.engine.drift import expected_drift
from lightning_revlib.nn.internals import pytree
from lightning_revlib.nn.meter import CostMeter, format_bytes
from lightning_revlib.nn.stacks.module_list import Layerwise
from lightning_revlib.nn.stacks.sequential import CoupledSequential, ReversibleSequential
from lightning_revlib.nn.state.snapshot import preserve_state


class Costs(NamedTuple):
    """Bytes held after forward, peak bytes in backward, and FLOPs."""

    held: int
    peak: int
    flops: int


class Stack(NamedTuple):
    """One stack, and the model's costs with this stack alone swapped.

    `drift` is measured on the inputs. `expected` has for each dtype the drift expected at the stack's depth and at
    twice that. `change` is the relative difference of the model's outputs in evaluation from those before.
    """

    path: str
    steps: int
    coupling: str
    held: int
    peak: int
    flops: int
    drift: float | None
    expected: tuple[tuple[str, float, float], ...]
    change: float

    def __str__(self) -> str:
        expected = ", ".join(f"{dtype} {once:.0e}, {twice:.0e}" for dtype, once, twice in self.expected)
        change = "equal" if self.change == 0 else f"{self.change:.1e} from the original's"
        drift = "stored in this mode" if self.drift is None else f"{self.drift:.1e}"
        return (
            f"  {self.path or '(the model)'}: {self.steps} steps, {self.coupling}\n"
            f"    drift {drift}; expected at {self.steps} and {2 * self.steps} steps: {expected}\n"
            f"    the model's outputs in evaluation: {change}"
        )


@dataclass(frozen=True)
class Report:
    """The result of `report`; print it. Bytes and FLOPs are of one forward and backward of the whole model.

    `held` are the bytes that forward leaves, outputs included; `peak` is their maximum during backward, without the
    parameters' gradients. `before` is the model by ordinary autograd, `after` with all `stacks` swapped. `others` are
    the paths of containers that cannot be swapped, and why.
    """

    stacks: tuple[Stack, ...]
    held_before: int
    held_after: int
    peak_before: int
    peak_after: int
    flops_before: int
    flops_after: int
    targets: Targets | None = None  # what to swap with: those given, or those suggested
    others: tuple[tuple[str, str], ...] = ()
    precision: str = ""  # in which the drift was measured

    def __str__(self) -> str:
        lines = []
        for stack in self.stacks:
            lines.append(str(stack))
            if len(self.stacks) > 1:
                lines.append("    alone: " + "; ".join(self._compare(stack)))
        if self.others:
            lines += ["not to be swapped:", *[f"  {path or '(the model)'}: {reason}" for path, reason in self.others]]
        if self.stacks:
            after = Costs(self.held_after, self.peak_after, self.flops_after)
            head = f"reversible stacks in {self.precision} (drift differs in others: call report under torch.autocast):"
            lines = [head, *lines, *self._compare(after)]
        if self.targets:
            lines.append(f"lightning_revlib.swap(model, {dict(self.targets)!r})")
        return "\n".join(lines or ["no stack of blocks was found"])

    def _compare(self, after: Costs | Stack) -> list[str]:
        def compare(before: int, after: int) -> str:
            return f"{format_bytes(before)} -> {format_bytes(after)} (x {after / max(before, 1):.3f})"

        return [
            f"held after forward {compare(self.held_before, after.held)}",
            f"peak in backward {compare(self.peak_before, after.peak)}",
            f"FLOPs x {after.flops / max(self.flops_before, 1):.3f}",
        ]


def report(model: nn.Module, *inputs: Any, targets: Targets | None = None, **kwargs: Any) -> Report:
    """Run the model forward and backward, before and after `swap(model, targets)`, and compare.

    >>> print(report(model, batch))
    >>> print(report(hugging_face_model, **batch))
    >>> with torch.autocast("cuda", torch.bfloat16):  # for a training in bf16-mixed
    ...     print(report(model, batch))

    Without targets, and without a stack that was built as such, it looks for containers that could be
    swapped, proposes options for them and says why others could not. Weights, gradients, buffers,
    modes, classes and random states are as before when it returns. The loss is the sum of the
    model's floating-point outputs.

    Raises:
        ValueError, TypeError: as `swap` does for targets that are given, and the model for its inputs; for a batch
            that is not its forward's arguments.
    """
    call = _Call(model, inputs, kwargs)
    outputs = call.try_inputs()
    others: dict[str, str] = {}
    is_given = targets is not None or bool(find(model))
    if not is_given:
        with preserve_state(model):
            targets, others = discover(model, call.run)
    found = find(model, targets)
    before = call.costs_with(found, {})
    stacks: list[Stack] = []
    swapped: dict[str, Any] = {}
    tolerance, tolerated = (math.inf, ()) if is_given else (TOLERANCE, (ValueError, TypeError, RuntimeError))
    for path, _, options in found:
        try:
            stack, swapped[path] = call.measure_alone(path, options, outputs, tolerance)
            stacks.append(stack)
        except tolerated as error:
            others[path] = str(error)
    after: Costs | Stack = stacks[0] if len(stacks) == 1 else before
    if len(stacks) > 1:
        after = call.costs_with([match for match in found if match[0] in swapped], swapped)
    costs = before.held, after.held, before.peak, after.peak, before.flops, after.flops
    return Report(tuple(stacks), *costs, targets if is_given else swapped, tuple(others.items()), _precision(model))


class _Call:
    """A call of a model, which each method but `run` leaves as it was."""

    def __init__(self, model: nn.Module, inputs: Any, kwargs: Any) -> None:
        self.model = model
        self.inputs, self.kwargs = pytree.tree_map_only(Tensor, torch.detach, (inputs, kwargs))

    def run(self) -> list[Tensor]:
        """Run the model, and return its floating-point outputs."""
        leaves = pytree.tree_leaves(self.model(*self.inputs, **self.kwargs))
        return [y for y in leaves if isinstance(y, Tensor) and y.is_floating_point()]

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
        """Return the model's outputs in evaluation."""
        training = [(m, m.training) for m in self.model.modules()]
        try:
            with preserve_state(self.model), torch.no_grad():
                self.model.eval()
                return [y.clone() for y in self.run()]
        finally:
            for m, mode in training:
                m.training = mode

    def costs_with(self, found: list[Match], targets: Targets) -> Costs:
        """Return the costs with the targets swapped, and the other stacks that were found run by ordinary autograd."""
        with self._swapped(found, targets):
            return self._costs()

    def measure_alone(
        self, path: str, options: Any, outputs: list[Tensor], tolerance: float
    ) -> tuple[Stack, Mapping[str, Any] | None]:
        """Return the stack swapped alone, and its options: with a larger gamma while its drift is above the tolerance.

        `outputs` are the model's in evaluation without the swap.
        """
        found = {match[0]: match for match in (*find(self.model), *find(self.model, {path: options}))}
        with self._swapped(found.values(), {path: options}):
            stack = self._measure_stack(path, outputs)
        larger = None if (stack.drift or 0) <= tolerance else with_larger_gamma(options)  # NaN is larger
        return (stack, options) if larger is None else self.measure_alone(path, larger, outputs, tolerance)

    def _measure_stack(self, path: str, outputs: list[Tensor]) -> Stack:
        stack: Any = self.model.get_submodule(path)
        stack.on_drift, stack.drift_tolerance = "warn_once", math.inf  # the report itself tells
        costs, drift, steps = self._costs(), stack.drift, stack.step_count
        expected = tuple(
            (
                str(dtype).removeprefix("torch."),
                *[max(expected_drift(c, n * steps, dtype) for c in stack.couplings) for n in (1, 2)],
            )
            for dtype in (torch.float64, torch.float32, torch.bfloat16)
        )
        change = _distance(self.evaluate(), outputs)
        return Stack(path, steps, ", ".join(map(str, stack.couplings)), *costs, drift, expected, change)  # type: ignore[arg-type]

    @contextmanager
    def _swapped(self, found: Iterable[Match], targets: Targets) -> Iterator[None]:
        """Have the targets swapped inside, and the other stacks that were found run by ordinary autograd."""
        records = record(list(found))
        for module, _, _ in records:
            vars(module).pop("_history", None)  # drift is measured anew
        try:
            for path, module, _ in found:
                if path not in targets and isinstance(module, ReversibleSequential):
                    module.__class__ = CoupledSequential  # type: ignore[assignment]
                elif path not in targets and isinstance(module, Layerwise):
                    module.treatments = ("store",) * len(module)
            if targets:
                swap(self.model, targets)
            yield
        finally:
            put_back(records)

    def _costs(self) -> Costs:
        """Return the costs of one forward and backward."""
        with preserve_state(self.model), torch.enable_grad(), CostMeter() as meter:
            for parameter in self.model.parameters():
                parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
            before = meter.live
            outputs = [y for y in self.run() if y.requires_grad]
            if not outputs:
                raise ValueError(
                    f"report: no output of {type(self.model).__name__} requires grad; unfreeze a parameter"
                )
            held = meter.live - before
            grads = [torch.ones_like(y) for y in outputs]
            meter.reset_peak()
            torch.autograd.backward(outputs, grads)
            return Costs(held, meter.peak - before, meter.flops)


def _precision(model: nn.Module) -> str:
    """Return the dtype that autocast computes in, or else that of the parameters."""
    parameter = next(model.parameters())
    kind = parameter.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else parameter.dtype
    return str(dtype).removeprefix("torch.")


def _distance(xs: list[Tensor], ys: list[Tensor]) -> float:
    """Return |x - y| / |y| in the 2-norm, of all together."""
    difference = sum((x - y).double().square().sum().item() for x, y in zip(xs, ys, strict=True))
    return math.sqrt(difference / max(sum(y.double().square().sum().item() for y in ys), 1e-300))
