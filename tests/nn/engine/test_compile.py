"""torch.compile of a model, a stack or a block."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

import lightning_revlib as revlib
from tests.nn.fake_device import Device


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"overlap": True},
        {"on_drift": "ignore"},
        *[{"treatments": [t] * 3} for t in ("offload", "checkpoint", "selective")],
    ],
    ids=str,
)
@pytest.mark.parametrize("what", ["model", "stack", "block"])
def test_compile_gives_the_same_gradients_and_compiles_once(what: str, options: dict[str, Any], device: Device) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    body = [nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.GELU(), nn.Linear(8, 4)) for _ in range(3)]
    x, results = torch.randn(4096, 8), []  # a stream is 64 KiB, which offload carries
    for cls, compiled in ((revlib.CoupledSequential, False), (revlib.ReversibleSequential, True)):
        model = nn.Sequential(nn.Linear(8, 8), cls(*copy.deepcopy(body), **options), nn.Tanh())
        model[0].load_state_dict(results[0][1]) if results else None
        start, run = copy.deepcopy(model[0].state_dict()), model
        if compiled and what == "model":
            run = torch.compile(model, backend="aot_eager")  # type: ignore[assignment]
        for part in {"stack": [model[1]], "block": list(model[1])}.get(what, []) if compiled else []:
            part.compile(backend="aot_eager")
        for step in range(3):
            with torch._dynamo.config.patch(error_on_recompile=step > 0):
                model.zero_grad()
                run(x).square().mean().backward()
        results.append(([p.grad for p in model.parameters()], start, model[1].state_dict()))
    for expected, got in zip(results[0][0], results[1][0], strict=True):
        assert torch.allclose(expected, got, rtol=1e-4, atol=1e-5)  # type: ignore[arg-type]
    assert all(torch.allclose(v, results[1][2][k]) for k, v in results[0][2].items())


def stack_and_model(kind: str) -> tuple[Any, nn.Module]:
    """Return a reversible stack and the model that runs it: a sequence, or a list that its model walks through."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    blocks = [Block() for _ in range(2)]
    if kind == "sequence":
        stack: Any = revlib.ReversibleSequential(*blocks)
        return stack, nn.Sequential(nn.Linear(16, 16), stack)
    model = Walk(revlib.ReversibleModuleList(blocks, coupling="momentum"))
    return model.layers, model


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).tanh()


class Walk(nn.Module):
    def __init__(self, layers: nn.ModuleList) -> None:
        super().__init__()
        self.first, self.layers = nn.Linear(16, 8), layers

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize("kind", ["sequence", "list"])
def test_releases_of_torch_that_take_compiling_for_exporting(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamo took `is_exporting()` for True up to torch 2.12 (pytorch#176347): nothing was rebuilt then."""
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: torch.compiler.is_compiling())
    stack, model = stack_and_model(kind)
    torch.compile(model, backend="aot_eager")(torch.randn(4, 16)).sum().backward()
    assert stack.drift is not None  # backward has rebuilt the entrance


@pytest.mark.parametrize("kind", ["sequence", "list"])
def test_a_full_graph_is_refused_with_the_way_out(kind: str) -> None:
    stack, model = stack_and_model(kind)
    x = torch.randn(4, 16)
    with pytest.raises(Exception, match=r"fullgraph=True: .* leave fullgraph out"):
        torch.compile(model, backend="aot_eager", fullgraph=True)(x)
    torch._dynamo.reset()
    torch.compile(model, backend="aot_eager")(x).sum().backward()
    assert stack.drift is not None


class Observed(nn.Module):
    """A model whose blocks are compiled each by itself, and the number of frames that were compiled."""

    def __init__(self, fullgraph: bool = False, **options: Any) -> None:
        super().__init__()
        torch._dynamo.reset()
        torch.manual_seed(0)
        self.counter = CompileCounterWithBackend("aot_eager_decomp_partition")  # which saves less than eager code does
        blocks = [torch.compile(Block(), backend=self.counter, fullgraph=fullgraph) for _ in range(3)]
        self.body = revlib.ReversibleSequential(*blocks, **options)
        self.x = torch.randn(64, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)

    def frames(self) -> int:
        """Return how many frames further steps compile."""
        before = self.counter.frame_count
        for _ in range(2):
            self(self.x).sum().backward()
        return self.counter.frame_count - before


def meter(model: Observed) -> None:
    with revlib.MemoryMeter():
        model(model.x).sum().backward()


@pytest.mark.parametrize(
    "measure",
    [
        meter,
        lambda model: revlib.report(model, model.x),
        lambda model: revlib.memory(model, model.x),
        lambda model: revlib.swap(model, inputs=model.x),
    ],
    ids=["meter", "report", "memory", "swap"],
)
def test_blocks_are_compiled_after_a_measurement(measure: Any) -> None:
    model = Observed()
    measure(model)
    assert model.counter.frame_count == 0  # no time goes into what runs once
    assert model.frames()


def test_a_meter_that_is_entered_twice() -> None:
    model, meter = Observed(), revlib.MemoryMeter()
    with meter:
        with meter:
            pass
        assert model.frames() == 0
    assert model.frames()


@pytest.mark.parametrize("treatment", ["reversible", "checkpoint", "selective"])
def test_a_meter_round_the_forward_of_compiled_blocks(treatment: str) -> None:
    model = Observed(treatments=[treatment] * 3)
    model.frames()
    grads = []
    for surrounding in (nullcontext(), revlib.MemoryMeter()):
        model.zero_grad()
        with surrounding:
            loss = model(model.x).sum()
        loss.backward()
        grads.append([p.grad for p in model.parameters()])
    for expected, got in zip(*grads, strict=True):
        assert torch.allclose(expected, got, rtol=1e-4, atol=1e-4)  # type: ignore[arg-type]


@pytest.mark.parametrize("budget", [1.0, "20KiB"])
def test_compiled_blocks_under_a_memory_budget(budget: Any) -> None:
    assert Observed(fullgraph=True, memory_budget=budget).frames()


def test_selective_runs_compiled_blocks() -> None:
    if hasattr(TorchDispatchMode, "ignore_compile_internals"):  # else blocks run eagerly
        assert Observed(fullgraph=True, treatments=["selective"] * 3).frames()
    torch._dynamo.reset()
    found = []
    for treatment in ("store", "selective"):
        torch.manual_seed(0)
        blocks = [nn.Sequential(Block(), nn.Dropout(0.5)) for _ in range(3)]
        stack = revlib.ReversibleSequential(*blocks, treatments=[treatment] * 3)
        for block in stack:
            block.compile(backend="aot_eager")
        torch.manual_seed(1)
        stack(torch.ones(4, 16)).square().sum().backward()
        found.append([p.grad for p in stack.parameters()])
    for expected, got in zip(*found, strict=True):
        assert torch.allclose(expected, got, rtol=1e-5)  # type: ignore[arg-type]
