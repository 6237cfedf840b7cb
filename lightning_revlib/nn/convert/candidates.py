"""Candidates for the containers that `discover` has found: each is tried on all of them at once, and measured.

Exact momentum is first tried by forwards alone, for each k of gamma = 2^-k; backward runs for those that change little.
"""

from __future__ import annotations

import math
import re
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product, takewhile
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_revlib.nn.convert.call import Call, Costs, change, distance, judged
from lightning_revlib.nn.convert.discover import GRID, TOLERANCE
from lightning_revlib.nn.convert.swap import Match
from lightning_revlib.nn.meter import format_bytes

MOST_BITS = 6  # that a step of exact momentum keeps: gamma is at least 2^-6
ORIGINAL = "the original"
BUDGET = 0.6  # of ordinary autograd's peak
FAILURES = (Exception,)  # of a candidate that does not suit a model: its code may raise anything


class Candidate(NamedTuple):
    """What was measured of targets for `swap`, in training mode.

    `kind` is "same" if they compute the original's function, "near" if perhaps one near it, "scratch" if another one.
    `change` is the absolute difference of the loss from the original's, if the output is one number or has an attribute
    `loss`; else the relative distance of all outputs. `kept_bits` are those that a step keeps for each element of a
    stream. `costs` are None if forward alone was run, `drift` is None if no input was rebuilt.
    """

    kind: str
    name: str
    targets: Mapping[str, Mapping[str, Any]]
    change: float
    kept_bits: int
    costs: Costs | None = None
    drift: float | None = None


@dataclass
class Trials:
    """Candidates for containers, tried one after the other while there is time.

    `outputs` are the model's in evaluation. `branches` are those of the containers' blocks, by path, as far as they are
    known. `untried` has the reason for each candidate that was not measured.
    """

    call: Call
    found: Sequence[Match]
    outputs: list[Tensor]
    branches: dict[str, Any]
    max_change: float
    deadline: float  # in seconds of `time.monotonic`
    progress: Callable[[str], Any]
    original: list[Tensor] = field(init=False)  # what the model is judged by, in training
    tried: dict[str, Candidate] = field(default_factory=dict)
    untried: dict[str, str] = field(default_factory=dict)

    def run(self) -> None:
        """Try all candidates."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the model, which has warned before
            self.branches = {path: names for path, names in self.branches.items() if self._is_original(path, names)}
            with self.call.in_mode(True):
                self.original = self.call.forward(judged)
                self._try_all()

    def _is_original(self, path: str, branches: Any) -> bool:
        """Return whether blocks made of these branches compute what they did, up to rounding."""
        targets = {path: self._targets(0.0, {path: branches})[path]}
        eps = max(torch.finfo(y.dtype).eps for y in self.outputs)
        try:
            with self.call.swapped(self.found, targets):
                return distance(self.call.evaluate(), self.outputs) < max(2 * eps, 1e-5)
        except FAILURES:
            return False

    def _try_all(self) -> None:
        targets = self._targets
        needs_grid = any("grid_bits" in (options or {}) for _, _, options in self.found)
        ways: dict[str, dict[str, Any]] = {"": {}} | ({", by branches": self.branches} if self.branches else {})
        self._try("same", ORIGINAL, {})
        for way, branches in ways.items():
            self._try("same", f"{ORIGINAL}, checkpointed{way}", targets(0.0, branches, checkpoint_each=1))
        self._try("same", f"{ORIGINAL}, memory_budget={BUDGET}", targets(0.0, {}, memory_budget=BUDGET))
        for way, branches in ways.items():
            self._try_exact_momentum(way, branches)
        for (way, branches), name in product(ways.items(), ("additive", "midpoint")):
            self._try("scratch", name + way, targets(name, branches, **(GRID if needs_grid else {})))
        self._try("near", "bdia", targets("bdia", {}, **GRID))
        if not needs_grid:
            self._try("near", "momentum 0.05, each third block checkpointed", targets(0.05, {}, checkpoint_each=3))

    def _try_exact_momentum(self, way: str, branches: Mapping[str, Any]) -> None:
        """Try each k forward; then backward, with the least k from which on changes are small, or the least change."""
        ways = {f"exact momentum 2^-{k}{way}": 2.0**-k for k in range(MOST_BITS, 0, -1)}
        trials = [
            self._try("near", name, self._targets(gamma, branches, **GRID), backward=False)
            for name, gamma in ways.items()
        ]
        rows = [row for row in trials if row is not None]
        near = list(takewhile(lambda row: row.change <= self.max_change, rows))
        for row in near[-1:] or sorted(rows, key=lambda row: row.change)[:1]:
            self._try("near", row.name, row.targets)

    def _targets(
        self, coupling: Any, branches: Mapping[str, Any], *, checkpoint_each: int = 0, **changes: Any
    ) -> dict[str, Any]:
        """Return options for all containers: those that were found, with another coupling, or gamma, and changes."""
        targets: dict[str, Any] = {}
        for path, blocks, found in self.found:
            named = coupling if isinstance(coupling, str) else {"name": "momentum", "gamma": coupling}
            kept = {name: value for name, value in (found or {}).items() if name not in GRID}
            options = targets[path] = {**kept, "coupling": named, **changes}
            if path in branches:
                del options["residual"]
                options["branches"] = branches[path]
            if checkpoint_each:
                options["treatments"] = [
                    "reversible" if i % checkpoint_each else "checkpoint" for i, _ in enumerate(blocks.children())
                ]
        return targets

    def _try(self, kind: str, name: str, targets: Mapping[str, Any], *, backward: bool = True) -> Candidate | None:
        """Run forward, and backward, with the targets swapped; return None, and note the reason, if that fails."""
        if time.monotonic() > self.deadline:
            self.untried[name] = "no time was left"
            return None
        self.progress(f"{name}: {'forward and backward' if backward else 'forward'}")
        try:
            with self.call.swapped(self.found, targets):
                stacks: list[Any] = [self.call.model.get_submodule(path) for path in targets]
                costs, outputs = self.call.costs() if backward else (None, self.call.forward(judged))
                drift = max((stack.drift for stack in stacks if stack.drift is not None), default=None)
                kept_bits = max((c.kept_bits for stack in stacks for c in stack.couplings), default=0)
        except FAILURES as error:
            self.untried[name] = str(error).partition("\n")[0]
            return None
        row = self.tried[name] = Candidate(kind, name, targets, change(outputs, self.original), kept_bits, costs, drift)
        return row


def best(candidates: Sequence[Candidate], max_change: float) -> dict[str, Candidate]:
    """Return the candidate with the least memory for each aim: the least sum of bytes held and peak.

    The peak alone may be that of the parameters' gradients, equal for all.
    """
    aims: dict[str, Callable[[Candidate], bool]] = {
        "the same function": lambda row: row.kind == "same",
        f"the least memory with a change of at most {max_change:g}": lambda row: (
            row.change <= max_change and (row.drift or 0) <= TOLERANCE
        ),
        "training from new weights, at any depth": lambda row: row.kind == "scratch",
    }
    measured = [row for row in candidates if row.targets and row.costs]
    measured.sort(key=lambda row: sum(row.costs[:2]) if row.costs else 0)
    found = {aim: next(filter(suits, measured), None) for aim, suits in aims.items()}
    return {aim: row for aim, row in found.items() if row is not None}


def table(candidates: Sequence[Candidate]) -> list[str]:
    """Return a table of candidates, those with the least change first."""
    flops = next((row.costs.flops for row in candidates if row.costs and not row.targets), 0)
    lines = [
        f"  {'candidates, in training mode':<46}{'change':>8}{'bits':>6}{'held':>12}{'peak':>12}{'FLOPs':>8}  drift"
    ]
    for row in sorted(candidates, key=lambda row: (math.isnan(row.change), row.change)):
        line = f"  {row.name:<46}{row.change:>8.1e}{row.kept_bits:>6}"
        if row.costs:
            held, peak = format_bytes(row.costs.held), format_bytes(row.costs.peak)
            line += f"{held:>12}{peak:>12}{f'x {row.costs.flops / max(flops, 1):.2f}':>8}"
        lines.append(line if row.drift is None else f"{line}  {row.drift:.0e}")
    return lines


def paste(targets: Mapping[str, Any]) -> str:
    """Return the line of Python that swaps a model's targets."""
    line = f"lightning_revlib.swap(model, {dict(targets)!r})"
    return re.sub(r"\['checkpoint'(, 'checkpoint')+\]", lambda m: f"['checkpoint'] * {m[0].count(',') + 1}", line)
