"""Run a program by ordinary autograd and reversibly, and compare all that can be seen of it."""

from __future__ import annotations

import gc
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import cycle
from typing import Any

import torch
from torch import Tensor, nn

import lightning_revlib as revlib
from tests.fuzz.blocks import CHANNELS, SHAPES, Roll, Stretch, TwoBranches, make
from tests.fuzz.programs import BlockSpec, Program, simpler
from tests.fuzz.uses import COPIES, USES

TOLERANCE = {torch.float64: 1e-9, torch.float32: 5e-2}
EXECUTION = ("memory_budget", "treatments", "store_last", "on_drift")


def pair_forward(other: Tensor, f: Tensor) -> Tensor:
    return 0.8 * other + 0.2 * f


def pair_inverse(out: Tensor, f: Tensor) -> Tensor:
    return (out - 0.2 * f) / 0.8


class Net(nn.Module):
    """A model whose layers are a stack, or a list that it calls one by one; returns its output, and losses."""

    def __init__(self, layers: Any) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, list[Tensor]]:
        losses: list[Tensor] = []
        if isinstance(self.layers, nn.Sequential):
            out = self.layers(x, *args, **kwargs)
            y, extras = out if isinstance(out, tuple) else (out, [])
            return y, [extra[0] if isinstance(extra, tuple) else extra["loss"] for extra in extras if extra is not None]
        for layer in self.layers:
            x = _first(layer(x, *args, **kwargs), losses)
        return x, losses


class Formula(nn.Module):
    """The same by ordinary autograd, from the couplings' equations alone."""

    def __init__(self, layers: Any, program: Program) -> None:
        super().__init__()
        self.layers, self.dim = nn.ModuleList(layers), program.options["split_dim"]
        self.residual = program.options.get("residual", False)
        specs = coupling_options(program).get("coupling", [None])
        specs = specs if isinstance(specs, list) else [specs]
        self.couplings = [Pair() if spec is None else revlib.get_coupling(spec) for spec in specs]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, list[Tensor]]:
        losses: list[Tensor] = []
        couplings = cycle(self.couplings)
        a, b = self.couplings[0].start(x) if self.dim is None else map(torch.clone, x.chunk(2, self.dim))
        for layer in self.layers:
            if hasattr(layer, "inverse"):
                a, b = layer(a), layer(b)
            else:
                f = _first(layer(b, *args, **kwargs), losses)
                a, b = next(couplings).forward(a, b, f - b if self.residual else f)
        last = self.couplings[(len(self.layers) - 1) % len(self.couplings)]
        return (last.finish(a, b) if self.dim is None else torch.cat((a, b), self.dim)), losses


class Pair(revlib.Coupling):
    """The pair of callables above, as a coupling."""

    def forward(self, a: Tensor, b: Tensor, f: Tensor) -> tuple[Tensor, Tensor]:
        return b, pair_forward(a, f)

    def recover(self, a_out: Tensor, b_out: Tensor) -> Tensor:
        return a_out

    def inverse(self, a_out: Tensor, b_out: Tensor, b: Tensor, f: Tensor) -> Tensor:
        return pair_inverse(b_out, f)


def _first(out: Any, losses: list[Tensor]) -> Tensor:
    """Return a block's branch, and add its loss, if it returns one, to the others."""
    if isinstance(out, Tensor):
        return out
    losses.append(out[1] if isinstance(out, tuple) else out["loss"])
    return out[0] if isinstance(out, tuple) else out["out"]


def coupling_options(program: Program) -> dict[str, Any]:
    """Return the options of a stack for its coupling; `affine` divides the channels."""

    def read(spec: Any) -> Any:
        if isinstance(spec, list):
            return [read(each) for each in spec]
        return {"name": "affine", "dim": CHANNELS[program.layout]} if spec == "affine" else spec

    coupling = program.options["coupling"]
    if coupling == "pair":
        return {"coupling_forward": pair_forward, "coupling_inverse": pair_inverse}
    return {"coupling": read(coupling)}


def blocks_of(program: Program) -> list[nn.Module]:
    """Make the blocks, each as wide as its coupling needs it."""
    couplings = program.options["coupling"]
    couplings = couplings if isinstance(couplings, list) else [couplings]
    number = 0
    blocks: list[nn.Module] = []

    def block(spec: BlockSpec) -> nn.Module:
        times = 2 if couplings[number % len(couplings)] == "affine" else 1
        options = {key: value for key, value in vars(spec).items() if key != "body"}
        return make(spec.body, program.layout, times=times, **options)

    for spec in program.blocks:
        if spec.body in ("roll", "stretch"):
            blocks.append(Roll() if spec.body == "roll" else Stretch())
            continue
        if spec.body == "the same again" and not isinstance(blocks[-1], (Roll, Stretch)) and len(couplings) == 1:
            blocks.append(blocks[-1])
        else:
            spec = replace(spec, body="mlp") if spec.body == "the same again" else spec
            if "branches" in program.options:
                blocks.append(TwoBranches(block(spec), block(spec)))
                number += 1
            else:
                blocks.append(block(spec))
        number += 1
    return blocks


class Runner:
    """A model of a program, with what it is called with."""

    def __init__(self, program: Program, reversible: bool, budget: float = 1.0) -> None:
        self.program, self.reversible, self.budget = program, reversible, budget
        self.dtype = torch.float32 if program.autocast else torch.float64
        self.model = self.fresh(program.seed)
        shape, dim = list(SHAPES[program.layout]), program.options["split_dim"]
        self.arguments = {name: self._argument(name) for name in program.arguments}
        self.params = [*self.model.parameters(), *self.arguments.values()]
        if dim is not None:
            shape[dim] *= 2
        self.shape, self.inputs = shape, []
        self.generator = torch.Generator().manual_seed(program.seed)

    def fresh(self, seed: int = 1) -> nn.Module:
        torch.manual_seed(seed)
        program, options = self.program, dict(self.program.options)
        blocks = blocks_of(program)
        coupling = coupling_options(program)
        del options["coupling"]
        execution = {key: options.pop(key) for key in EXECUTION if key in options}
        if "treatments" in execution:
            execution["treatments"] = execution["treatments"][: len(blocks)]
        if "memory_budget" in execution:
            execution["memory_budget"] = self.budget
        if self.reversible and program.kind == "list":
            model = Net(nn.ModuleList(blocks))
            revlib.swap(model, {"layers": {**options, **coupling, **execution}})
        elif self.reversible:
            model = Net(revlib.ReversibleSequential(*blocks, **options, **coupling, **execution))
        elif options.keys() & {"grid_bits", "branches", "chunks"}:
            model = Net(revlib.CoupledSequential(*blocks, **options, **coupling))
        else:
            model = Formula(blocks, program)
        return model.to(self.dtype).train(program.training)

    def _argument(self, name: str) -> Tensor:
        shape = SHAPES[self.program.layout][1:] if name == "shift" else ()
        return (0.1 * torch.ones(shape, dtype=self.dtype)).requires_grad_()

    def input(self) -> Tensor:
        how = self.program.input
        x = torch.randn(self.shape, dtype=self.dtype, generator=self.generator)
        if how == "transposed":
            x = x.transpose(0, -1).contiguous().transpose(0, -1)
        x.requires_grad_(how != "without grad")
        self.inputs.append(x)
        return x * 1.0 if how == "computed" else x

    def call(self, x: Tensor, model: Any = None) -> tuple[Tensor, list[Tensor]]:
        args = [self.arguments["shift"]] if "shift" in self.arguments else []
        kwargs = {"memory": {"scale": self.arguments["memory"] * 2}} if "memory" in self.arguments else {}
        with torch.autocast("cpu", torch.bfloat16) if self.program.autocast else nullcontext():
            return (model or self.model)(x, *args, **kwargs)

    def loss(self, y: Tensor, losses: list[Tensor]) -> Tensor:
        weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
        return (y * weights).sum() + y.square().mean() + sum(0.1 * k * each for k, each in enumerate(losses, 1))

    def run(self) -> list[Tensor | None]:
        """Do what the program does, and return all that can be seen of it."""
        torch.manual_seed(self.program.seed + 1)
        found = [t for name in self.program.uses for t in USES[name](self)]
        grads = [t.grad for t in (*self.inputs, *self.params)]
        return [*found, *grads, *self.model.buffers(), *[p.detach() for p in self.params], torch.rand(3)]


def check(program: Program) -> list[str]:
    """Return what is wrong with a program, if anything: nothing, too, if ordinary autograd cannot run it either."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            expected = Runner(program, False).run()
        except Exception as error:
            return [] if _raises(program) else [f"ordinary autograd alone raises {error!r}"]
        try:
            budget = _budget(program)
            runner = Runner(program, True, budget)
            faults = [*_differences(expected, runner.run(), program)]
            return [*faults, *_leaks(runner), *_overrun(program)]
        except Exception as error:
            return [f"raises {type(error).__name__}: {error}"]


def _raises(program: Program) -> bool:
    try:
        Runner(program, True, _budget(program)).run()
    except Exception:
        return True
    return False


def _differences(expected: Sequence[Tensor | None], found: Sequence[Tensor | None], program: Program) -> Iterator[str]:
    if [t is None for t in expected] != [t is None for t in found]:
        yield f"None among {len(expected)} tensors at {_nones(expected)}, now among {len(found)} at {_nones(found)}"
        return
    tolerance = TOLERANCE[torch.float32 if program.autocast else torch.float64]
    floor = 1e-3 * max((t.detach().double().norm().item() for t in expected if t is not None), default=0)
    # In bfloat16 a sum that cancels is off by more than its own size, in ordinary autograd as well.
    exact = Runner(replace(program, autocast=False), False).run() if program.autocast else expected
    for index, (x, y, z) in enumerate(zip(expected, found, exact, strict=True)):
        if x is not None and y is not None:
            x, y, z = x.detach().double(), y.detach().double(), (x if z is None else z).detach().double()
            scale = max(x.norm().item(), (x - z).norm().item(), floor)
            error = (x - y).norm().item() / scale if x.shape == y.shape else math.inf
            if not error <= tolerance and not (x.isnan().any() and torch.equal(x.isnan(), y.isnan())):
                yield f"tensor {index} of {len(expected)}, shape {list(x.shape)}, is off by {error:.1e}"


def _nones(tensors: Sequence[Tensor | None]) -> list[int]:
    return [index for index, t in enumerate(tensors) if t is None]


def _budget(program: Program, x: Tensor | None = None) -> float:
    """Return the bytes of the program's budget, which it gives as a part of the way from the least to the most.

    They are those for input x, or for the one that needs most: a leaf, computed, or with rows one after the other.
    """
    if "memory_budget" not in program.options:
        return 1.0
    leaf = Runner(program, True).input()
    computed = leaf.detach().requires_grad_() * 1.0
    budgets = [1.0]
    for given in (leaf, computed, computed.contiguous()) if x is None else (x,):
        runner = Runner(program, True)  # one that has run takes the costs of one layout for those of another
        runner.call(given)
        if (plan := runner.model.layers.plan) is not None:  # type: ignore[union-attr]
            budgets.append(int(plan.minimum + program.options["memory_budget"] * (plan.plain - plan.minimum)))
    return max(budgets)


@contextmanager
def _without_collector() -> Iterator[None]:
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _leaks(runner: Runner) -> Iterator[str]:
    """Run the program twice more, and compare the bytes that are alive."""
    if runner.program.seed % 3 or any(name in COPIES for name in runner.program.uses):
        return  # of the rest a third, as it takes time
    live = []
    with _without_collector(), revlib.MemoryMeter() as meter:
        for _ in range(2):
            runner.inputs.clear()
            runner.run()
            live.append(meter.live)
    if live[0] != live[1]:
        yield f"{live[1] - live[0]} bytes stay alive after each run"


def _overrun(program: Program) -> Iterator[str]:
    """Compare the peak of a step with the budget, without gradients of parameters, which are large here."""
    options = program.options
    if "memory_budget" not in options or program.input == "computed" or program.autocast:
        return
    if "grid_bits" in options and options["split_dim"] == 0:  # the halves of the rounded input are views of it
        return
    is_short = len(program.blocks) < 3  # a plan adds up steps; the ends of so short a stack hold up to a stream more
    if is_short and program.input == "without grad" and any(b.body == "autograd inside" for b in program.blocks):
        return  # backward goes into a graph that a frozen block has made by itself
    runner = Runner(program, True)
    x = runner.input()
    runner = Runner(program, True, _budget(program, x))
    runner.call(x)
    for t in (x, *runner.params):
        t.grad = torch.zeros_like(t)
    with revlib.MemoryMeter() as meter:
        y, losses = runner.call(x)
        if y.requires_grad:
            y.backward(torch.ones_like(y))
    plan = runner.model.layers.plan  # type: ignore[union-attr]
    slack = sum(t.nbytes for t in runner.params) + is_short * x.nbytes
    if plan is not None and meter.peak > plan.limit + slack:
        yield f"{meter.peak} bytes at the peak, {meter.peak / plan.limit:.3f} of the budget; {plan}"
    del losses


def simplest(program: Program) -> Program:
    """Return a program with the same fault, or another one, from which nothing can be left out."""
    while (smaller := next((each for each in simpler(program) if check(each)), None)) is not None:
        program = smaller
    return program


def describe(program: Program, faults: Sequence[str]) -> str:
    """Return a report of a program's faults, to be pasted."""
    lines = "\n  ".join(faults)
    return f"seed {program.seed}: python -m tests.fuzz --seed {program.seed} --programs 1\n  {lines}\n{program!r}"
