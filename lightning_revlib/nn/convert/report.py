"""`report`: what a swap would do to a model, measured on a batch, with the model left as it was."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_revlib.nn.convert.discover import TOLERANCE, steadier, survey
from lightning_revlib.nn.convert.swap import Match, Targets, find, forget_drift, put_back, record, swap
from lightning_revlib.nn.engine.drift import expected_drift
from lightning_revlib.nn.internals import pytree
from lightning_revlib.nn.meter import MemoryMeter, format_bytes
from lightning_revlib.nn.stacks.module_list import Layerwise
from lightning_revlib.nn.stacks.sequential import CoupledSequential, ReversibleSequential
from lightning_revlib.nn.state.snapshot import preserve_state

Figures: TypeAlias = tuple[int, int, int]


class Stack(NamedTuple):
    """One stack alone, as it would be swapped.

    `drift` was measured on the inputs, `expected` is by dtype, twice: at its depth and at twice that.
    `change` is how far the model's outputs in evaluation are from what they were, relative.
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
        return "\n".join(
            [
                f"  {self.path or '(the model)'}: {self.steps} steps, {self.coupling}",
                f"    drift {drift}; expected at {self.steps} and {2 * self.steps} steps: {expected}",
                f"    the model's outputs in evaluation: {change}",
            ]
        )


@dataclass(frozen=True)
class Report:
    """What `report` found; print it. Bytes and FLOPs are of one forward and backward of the whole model.

    `held` is what lives after forward and did not before, outputs included; `peak` is the most that
    lives during backward, parameter gradients left out. `before` is the model by ordinary autograd,
    `after` with all `stacks` swapped; a stack's own figures are with it alone. `others` are the paths
    of containers that cannot be swapped, and why.
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

    def __str__(self) -> str:
        lines = []
        for stack in self.stacks:
            lines.append(str(stack))
            if len(self.stacks) > 1:
                lines.append("    alone: " + "; ".join(self._compare(stack.held, stack.peak, stack.flops)))
        if self.others:
            lines += ["not to be swapped:", *[f"  {path or '(the model)'}: {reason}" for path, reason in self.others]]
        if self.stacks:
            lines = ["reversible stacks:", *lines, *self._compare(self.held_after, self.peak_after, self.flops_after)]
        if self.targets:
            lines.append(f"lightning_revlib.swap(model, {dict(self.targets)!r})")
        return "\n".join(lines or ["no stack of blocks was found"])

    def _compare(self, held: int, peak: int, flops: int) -> list[str]:
        return [
            f"held after forward {format_bytes(self.held_before)} -> {format_bytes(held)}"
            f" (x {held / max(self.held_before, 1):.3f})",
            f"peak in backward {format_bytes(self.peak_before)} -> {format_bytes(peak)}"
            f" (x {peak / max(self.peak_before, 1):.3f})",
            f"FLOPs x {flops / max(self.flops_before, 1):.3f}",
        ]


def report(model: nn.Module, *inputs: Any, targets: Targets | None = None, **kwargs: Any) -> Report:
    """Run the model forward and backward, before and after `swap(model, targets)`, and compare.

    >>> print(report(model, batch))
    >>> print(report(hugging_face_model, **batch))

    Without targets, and without a stack that was built as such, it looks for containers that could be
    swapped, proposes options for them and says why others could not. Weights, gradients, buffers,
    modes, classes and random states are as before when it returns. The loss is the sum of the
    model's floating-point outputs.

    Raises:
        ValueError, TypeError: as `swap` does for targets that are given, and the model for its inputs.
    """
    call = _Call(model, inputs, kwargs)
    others: dict[str, str] = {}
    given = targets is not None or bool(find(model, None, strict=False))
    if not given:
        found = survey(model, call.watched)
        targets, others = found.targets, found.others
    before, outputs = call.measure(find(model, targets), stored=True), call.evaluate()
    stacks: list[Stack] = []
    for path, _, options in find(model, targets):
        try:
            stack = call.alone(path, {path: options}, outputs)
            while not given and (stack.drift or 0) > TOLERANCE and (options := steadier(options)):
                stack, targets = call.alone(path, {path: options}, outputs), {**(targets or {}), path: options}
            stacks.append(stack)
        except (ValueError, TypeError, RuntimeError) as error:
            if given:
                raise
            others[path] = str(error)
            assert targets is not None
            targets = {each: options for each, options in targets.items() if each != path}
    after = before
    if len(stacks) == 1:
        after = stacks[0][3:6]
    elif stacks:
        after = call.measure(find(model, targets), targets)
    return Report(
        tuple(stacks), before[0], after[0], before[1], after[1], before[2], after[2], targets, tuple(others.items())
    )


class _Call:
    """A call of a model that leaves no trace in it."""

    def __init__(self, model: nn.Module, inputs: Any, kwargs: Any) -> None:
        self.model = model
        self.inputs, self.kwargs = pytree.tree_map_only(Tensor, torch.detach, (inputs, kwargs))

    def run(self) -> list[Tensor]:
        leaves = pytree.tree_leaves(self.model(*self.inputs, **self.kwargs))
        return [y for y in leaves if isinstance(y, Tensor) and y.is_floating_point()]

    def watched(self) -> None:
        with preserve_state(self.model):
            self.run()

    def evaluate(self) -> list[Tensor]:
        training = [(m, m.training) for m in self.model.modules()]
        try:
            with preserve_state(self.model), torch.no_grad():
                self.model.eval()
                return [y.clone() for y in self.run()]
        finally:
            for m, mode in training:
                m.training = mode

    def alone(self, path: str, targets: Targets, outputs: list[Tensor]) -> Stack:
        """The figures of one stack, swapped alone."""
        found = find(self.model, None, strict=False)
        found += [match for match in find(self.model, targets) if match[1] not in [m for _, m, _ in found]]
        records = record(found)
        forget_drift(records)
        try:
            _store([match for match in found if match[0] != path])
            swap(self.model, targets)
            stack: Any = self.model.get_submodule(path)
            stack.on_drift = "warn_once" if stack.on_drift == "ignore" else stack.on_drift
            figures = _measure(self)
            drift = stack.drift
            change = _distance(self.evaluate(), outputs)
            steps = stack.step_count
            expected = tuple(
                (
                    str(dtype).removeprefix("torch."),
                    *[max(expected_drift(c, n * steps, dtype) for c in stack.couplings) for n in (1, 2)],
                )
                for dtype in (torch.float64, torch.float32, torch.bfloat16)
            )
            return Stack(path, steps, ", ".join(map(str, stack.couplings)), *figures, drift, expected, change)  # type: ignore[arg-type]
        finally:
            put_back(records)

    def measure(self, found: list[Match], targets: Targets | None = None, *, stored: bool = False) -> Figures:
        """The figures with the stacks swapped, or by ordinary autograd."""
        records = record(found)
        forget_drift(records)
        try:
            if stored:
                _store(found)
            else:
                swap(self.model, targets)
            return _measure(self)
        finally:
            put_back(records)


def _store(found: list[Match]) -> None:
    """Make stacks that are reversible already run by ordinary autograd."""
    for _, module, _ in found:
        if isinstance(module, ReversibleSequential):
            module.__class__ = CoupledSequential  # type: ignore[assignment]
        elif isinstance(module, Layerwise):
            module.treatments = tuple("store" for _ in module)


def _distance(xs: list[Tensor], ys: list[Tensor]) -> float:
    """|x - y| / |y| in the 2-norm, of all together."""
    difference = sum((x - y).double().square().sum().item() for x, y in zip(xs, ys, strict=True))
    return math.sqrt(difference / max(sum(y.double().square().sum().item() for y in ys), 1e-300))


def _measure(call: _Call) -> Figures:
    """Bytes held after forward, peak bytes in backward, FLOPs."""
    model = call.model
    with preserve_state(model), torch.enable_grad(), MemoryMeter() as meter:
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        before = meter.live
        outputs = [y for y in call.run() if y.requires_grad]
        if not outputs:
            raise ValueError(f"report: no output of {type(model).__name__} requires grad; unfreeze a parameter")
        held = meter.live - before
        grads = [torch.ones_like(y) for y in outputs]
        meter.reset_peak()
        torch.autograd.backward(outputs, grads)
        peak = meter.peak - before
    # A run of its own: the counter's hooks keep tensors alive.
    with preserve_state(model), torch.enable_grad(), FlopCounterMode(display=False) as flops:
        outputs = [y for y in call.run() if y.requires_grad]
        torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])
    return held, peak, flops.get_total_flops()
