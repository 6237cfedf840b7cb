"""`report`: the effect of a swap on a model, measured on a batch. The model is left as it was."""

from __future__ import annotations

import html
import math
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_revlib.nn.convert.call import Call, Costs, distance
from lightning_revlib.nn.convert.candidates import FAILURES, Candidate, Trials, best, paste, table
from lightning_revlib.nn.convert.discover import TOLERANCE, Discovery, discover, discover_routers, with_larger_gamma
from lightning_revlib.nn.convert.swap import Match, Targets, find
from lightning_revlib.nn.engine.drift import expected_drift
from lightning_revlib.nn.meter import format_bytes
from lightning_revlib.nn.state.preserve import preserve_state


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
    parameters' gradients. `before` is the model by ordinary autograd, `after` with all `stacks` swapped. `others` has
    the paths of containers that cannot be swapped, and the reasons. `candidates` are other targets that were measured
    for the containers that were found, `untried` those that were not, and why; `best` has one for each of three aims.
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
    candidates: tuple[Candidate, ...] = ()
    untried: tuple[tuple[str, str], ...] = ()
    max_change: float = 0.0  # that "least memory" may have
    routers: tuple[str, ...] = ()  # paths of stacks in whose blocks shapes depend on values
    logits: int = 0  # bytes of `held_after`, in training, of a language model's logits, casts and probabilities

    @property
    def best(self) -> dict[str, Candidate]:
        """The measured candidate with the least memory, for each aim."""
        return best(self.candidates, self.max_change)

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"

    def __str__(self) -> str:
        lines = self._stack_lines()
        if self.candidates:
            lines += table(self.candidates)
        if self.untried:
            lines += ["not measured:", *[f"  {name}: {reason}" for name, reason in self.untried]]
        for aim, candidate in self.best.items():
            lines += [f"# {aim}: {candidate.name}", paste(candidate.targets)]
        if self.targets:
            lines += ["# the options measured at the top:"] * bool(self.candidates) + [paste(self.targets)]
        return "\n".join(lines or ["no stack of blocks was found"])

    def _stack_lines(self) -> list[str]:
        """Return the lines about the stacks, all of them together, and what is none."""
        lines = []
        for stack in self.stacks:
            lines.append(str(stack))
            if stack.path in self.routers:
                lines.append(
                    "    shapes depend on values in its blocks, as in a router: inputs are rebuilt exactly by a grid"
                )
            if len(self.stacks) > 1:
                lines.append("    alone: " + "; ".join(self._compare(stack)))
        if self.others:
            lines += ["not to be swapped:", *[f"  {path or '(the model)'}: {reason}" for path, reason in self.others]]
        if not self.stacks:
            return lines
        head = f"reversible stacks in {self.precision} (drift differs in others: call report under torch.autocast):"
        lines += self._compare(Costs(self.held_after, self.peak_after, self.flops_after))
        if self.logits:
            lines.append(
                f"outside of the stacks: logits and their probabilities hold {format_bytes(self.logits)} of that in"
                " training; lightning_revlib.chunk_loss(model) computes the loss without them"
            )
        return [head, *lines]

    def _compare(self, after: Costs | Stack) -> list[str]:
        def compare(before: int, after: int) -> str:
            return f"{format_bytes(before)} -> {format_bytes(after)} (x {after / max(before, 1):.3f})"

        return [
            f"held after forward {compare(self.held_before, after.held)}",
            f"peak in backward {compare(self.peak_before, after.peak)}",
            f"FLOPs x {after.flops / max(self.flops_before, 1):.3f}",
        ]


def report(
    model: nn.Module,
    *inputs: Any,
    targets: Targets | None = None,
    max_change: float = 0.05,
    seconds: float = math.inf,
    progress: Callable[[str], Any] | None = None,
    **kwargs: Any,
) -> Report:
    """Run the model forward and backward, before and after `swap(model, targets)`, and compare.

    >>> print(report(model, batch))
    >>> print(report(hugging_face_model, **batch))
    >>> with torch.autocast("cuda", torch.bfloat16):  # for a training in bf16-mixed
    ...     print(report(model, batch))

    Without targets, and for a model built without stacks, it looks for containers that can be swapped, proposes options
    for them and says why others cannot be swapped. It then measures other options, and prints the line to paste for the
    best of three aims: the same function; the least memory with a small change; training from scratch. Weights,
    gradients, buffers, modes, classes, configs and random states are as before when it returns. Backward begins with
    the output's attribute `loss`, if it has one, or with the sum of the model's floating-point outputs.

    Args:
        model: any module.
        *inputs: positional arguments of the model's forward.
        targets: those of `swap` to measure; nothing else is tried then.
        max_change: the largest change that "least memory" may have: of the loss, in the loss's unit, if the output has
            a loss, else the relative change of the outputs.
        seconds: the time after which no candidate is begun; the report names those left out.
        progress: is called with a line of text before each candidate, such as `print`. Without, the line is
            shown on stderr if that is a terminal.
        **kwargs: arguments of the model's forward by name.

    Raises:
        ValueError, TypeError: for wrong targets, as `swap`; for a batch that does not fit the model's forward; and what
            the model itself raises for its inputs.
    """
    deadline = time.monotonic() + seconds
    call = Call(model, inputs, kwargs)
    outputs = call.try_inputs()
    discovery = Discovery({}, {}, {}, [])
    is_given = targets is not None or bool(find(model))
    if targets is None:
        with preserve_state(model):
            discovery = (discover_routers if is_given else discover)(model, call.run)
        targets = discovery.targets or (None if is_given else {})
    others = discovery.others
    found = find(model, targets)
    before = _costs_with(call, found, {})
    tell = progress or _show_on_terminal
    stacks, swapped, failures = _measure_each(call, found, outputs, is_given, tell)
    others.update(failures)
    suitable = [match for match in found if match[0] in swapped]
    after: Costs | Stack = stacks[0] if len(stacks) == 1 else before
    if len(stacks) > 1:
        after = _costs_with(call, suitable, swapped)
    trials = Trials(call, suitable, outputs, discovery.branches, max_change, deadline, tell)
    if suitable and not is_given:
        trials.run()
    if progress is None:
        tell("")
    costs = before.held, after.held, before.peak, after.peak, before.flops, after.flops
    return Report(
        tuple(stacks),
        *costs,
        targets if is_given else swapped,
        tuple(others.items()),
        _precision(model),
        tuple(trials.tried.values()),
        tuple(trials.untried.items()),
        max_change,
        tuple(discovery.routers),
        call.logits_held(),
    )


def _costs_with(call: Call, found: list[Match], targets: Targets) -> Costs:
    """Return the costs with the targets swapped, and the other stacks that were found run by ordinary autograd."""
    with call.swapped(found, targets):
        return call.costs()[0]


def _measure_each(
    call: Call, found: list[Match], outputs: list[Tensor], is_given: bool, tell: Callable[[str], Any]
) -> tuple[list[Stack], dict[str, Any], dict[str, str]]:
    """Return the stacks, each swapped alone, their options, and why others cannot run; what is given must run."""
    stacks, swapped, failures = [], {}, {}
    tolerance, tolerated = (math.inf, ()) if is_given else (TOLERANCE, FAILURES)
    for path, _, options in found:
        tell(f"{path or 'the model'}: forward and backward")
        try:
            stack, swapped[path] = _measure_alone(call, path, options, outputs, tolerance)
            stacks.append(stack)
        except tolerated as error:
            failures[path] = str(error)
    return stacks, swapped, failures


def _measure_alone(
    call: Call, path: str, options: Any, outputs: list[Tensor], tolerance: float
) -> tuple[Stack, Mapping[str, Any] | None]:
    """Return the stack swapped alone, and its options: with a larger gamma while its drift is above the tolerance.

    `outputs` are the model's in evaluation without the swap.
    """
    found = {match[0]: match for match in (*find(call.model), *find(call.model, {path: options}))}
    with call.swapped(found.values(), {path: options}):
        stack = _measure_stack(call, path, outputs)
    larger = None if (stack.drift or 0) <= tolerance else with_larger_gamma(options)  # NaN is larger
    return (stack, options) if larger is None else _measure_alone(call, path, larger, outputs, tolerance)


def _measure_stack(call: Call, path: str, outputs: list[Tensor]) -> Stack:
    """Return what is to be told of the stack at `path`, which is swapped."""
    stack: Any = call.model.get_submodule(path)
    costs, drift, steps = call.costs()[0], stack.drift, stack.step_count
    expected = tuple(
        (
            str(dtype).removeprefix("torch."),
            *[max(expected_drift(c, n * steps, dtype) for c in stack.couplings) for n in (1, 2)],
        )
        for dtype in (torch.float64, torch.float32, torch.bfloat16)
    )
    change = distance(call.evaluate(), outputs)
    return Stack(path, steps, ", ".join(map(str, stack.couplings)), *costs, drift, expected, change)  # type: ignore[arg-type]


def _show_on_terminal(text: str) -> None:
    """Show a line on stderr in the place of the last one, if it is a terminal."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def _precision(model: nn.Module) -> str:
    """Return the dtype that autocast computes in, or else that of the parameters."""
    parameter = next(model.parameters())
    kind = parameter.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else parameter.dtype
    return str(dtype).removeprefix("torch.")
