from __future__ import annotations

import copy
import warnings
from collections import UserDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_revlib as revlib


def model() -> nn.Module:
    blocks = [nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 8), nn.Dropout(0.1), nn.Tanh()) for _ in range(12)]
    return nn.Sequential(nn.Linear(4, 16), revlib.CoupledSequential(*blocks), nn.Linear(16, 1))


def test_report_measures_and_leaves_the_model_as_it_was() -> None:
    net, x = model(), torch.randn(4096, 4)
    state, generator, modes = (
        copy.deepcopy(net.state_dict()),
        torch.get_rng_state(),
        [m.training for m in net.modules()],
    )
    report = revlib.report(net, x)
    assert report.held_after < 0.2 * report.held_before and report.peak_after < 0.5 * report.peak_before
    assert report.flops_after == pytest.approx(4 / 3 * report.flops_before, rel=0.05)
    assert [row[:2] for row in report.stacks] == [("1", 12)]
    assert "1: 12 steps, Additive()" in str(report) and "KiB" in str(report)
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters()) and type(net[1]) is revlib.CoupledSequential  # type: ignore[index]
    assert torch.equal(generator, torch.get_rng_state()) and modes == [m.training for m in net.modules()]


def test_report_is_the_same_for_a_model_already_swapped() -> None:
    net, x = model(), torch.randn(64, 4)
    before = revlib.report(net, x)
    revlib.swap(net)
    assert revlib.report(net, x) == before
    assert type(net[1]) is revlib.ReversibleSequential  # type: ignore[index]


def test_report_takes_targets() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.Sequential(*[nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(8)]))
    wide = nn.Sequential(nn.Linear(4, 4), nn.Sequential(*[nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(8)]))
    report = revlib.report(wide, torch.randn(64, 4), targets={"1": {"coupling": "additive", "split_dim": None}})
    assert report.held_after < report.held_before and type(wide[1]) is nn.Sequential
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):  # plain, its blocks see the whole width
        revlib.report(net, torch.randn(64, 4), targets={"1": {"coupling": "additive"}})
    assert type(net[1]) is nn.Sequential


class Block(nn.Module):
    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(i, o), nn.Tanh(), nn.Linear(o, o))
        self.skip = nn.Identity() if i == o else nn.Linear(i, o)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.skip(x) + self.net(x)


class Zoo(nn.Module):
    """Containers that can be swapped, and each kind of those that cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.stage = nn.Sequential(Block(4, 8), *[Block(8, 8) for _ in range(6)])
        self.layers = nn.ModuleList([Block(8, 8) for _ in range(6)])
        self.read = nn.ModuleList([Block(8, 8) for _ in range(3)])
        self.twice = nn.ModuleList([Block(8, 8) for _ in range(3)])
        self.recurrent = nn.ModuleList([Block(8, 8) for _ in range(3)])
        self.added = nn.ModuleList([Block(8, 8) for _ in range(3)])
        self.unused = nn.ModuleList([Block(8, 8) for _ in range(3)])
        self.backwards = nn.ModuleList([Block(8, 8) for _ in range(3)])
        self.shapes = nn.Sequential(Block(8, 16), Block(16, 8))
        self.mixed = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.1))

    def forward(self, batch: torch.Tensor, *, scale: float = 1.0) -> dict[str, torch.Tensor]:
        x = self.stage(batch)
        for layer in self.layers:
            x = layer(x)
        states = []
        for layer in self.read:
            x = layer(x)
            states.append(x)
        x = torch.stack(states).mean(0)
        for layer in self.twice:
            x = layer(layer(x))
        for _ in range(3):
            for layer in self.recurrent:
                x = layer(x)
        for layer in self.added:
            x = x + layer(x)
        for layer in reversed(self.backwards):
            x = layer(x)
        return {"y": self.mixed(self.shapes(x)) * scale}


def test_candidates_are_found_and_the_others_explained() -> None:
    net, x = Zoo().train(), torch.randn(16, 4)
    state = copy.deepcopy(net.state_dict())
    before = [(name, type(m), m.training, set(m.__dict__), len(m._forward_hooks)) for name, m in net.named_modules()]
    generator = torch.get_rng_state()
    report = revlib.report(net, x, scale=2.0)
    assert [(name, type(m), m.training, set(m.__dict__), len(m._forward_hooks)) for name, m in net.named_modules()] == (
        before
    )
    assert torch.equal(generator, torch.get_rng_state()) and all(p.grad is None for p in net.parameters())
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert [(s.path, s.steps) for s in report.stacks] == [("stage", 6), ("layers", 6), ("read", 3), ("recurrent", 3)]
    momentum = {"name": "momentum", "gamma": 0.2}
    assert report.targets == {
        "stage": {"coupling": momentum, "residual": True, "split_dim": None, "ordinary": 1},
        "layers": {"coupling": momentum, "residual": True},
        "read": {"coupling": {"name": "momentum", "gamma": 0.05}, "residual": True},
        "recurrent": {"coupling": {"name": "momentum", "gamma": 0.05}, "residual": True},
    }
    others = dict(report.others)
    for path, reason in {
        "twice": "twice.0 is called 2 times in a forward",
        "added": "added.1 is not called with what added.0 returns: the model does something in between",
        "unused": "its blocks are not called with these inputs",
        "backwards": "its blocks are called in the order 2, 1, 0",
        "shapes": "shapes.1 (Block) changes the shape from [16, 16] to [16, 8]",
        "mixed": "its blocks are of different kinds: Linear, BatchNorm1d, Dropout",
    }.items():
        assert reason in others[path]
    for stack in report.stacks:
        assert report.held_after < stack.held < report.held_before and stack.flops > report.flops_before
        assert 0 < stack.drift < 1e-3 and stack.change > 0  # type: ignore[operator]
        assert stack.drift < 10 * dict((e[0], e[1]) for e in stack.expected)["float32"]  # type: ignore[operator]
    line = str(report).splitlines()[-1]
    assert line.startswith("lightning_revlib.swap(model, {'stage': ")
    eval(line.removeprefix("lightning_"), {"revlib": revlib, "model": net})
    assert isinstance(net.layers, revlib.ReversibleModuleList)
    again = revlib.report(net, x, scale=2.0)
    assert (again.held_after, again.peak_after) == (report.held_after, report.peak_after)
    assert [s.change for s in again.stacks] == [0, 0, 0, 0]


def test_a_model_without_stacks() -> None:
    report = revlib.report(nn.Linear(4, 4), torch.randn(2, 4))
    assert report.stacks == () and str(report) == "no stack of blocks was found"
    with pytest.raises(ValueError, match="no output of Linear requires grad"):
        revlib.report(nn.Linear(4, 4).requires_grad_(False), torch.randn(2, 4))


def test_random_states_of_devices_without_the_model_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    forked: list[list[torch.device]] = []
    fork = torch.random.fork_rng

    def watched(devices: Any = None) -> Any:
        forked.append(devices and list(devices))
        return fork(devices)

    monkeypatch.setattr(torch.random, "fork_rng", watched)
    revlib.report(model(), torch.randn(64, 4))
    assert forked and all(devices is not None and not devices for devices in forked)


def test_drift_of_a_stack_that_ignores_it() -> None:
    stack = revlib.ReversibleSequential(
        *[nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(2)], on_drift="ignore"
    )
    stack(torch.randn(2, 8)).sum().backward()
    drift = revlib.report(stack, torch.randn(2, 8)).stacks[0].drift
    assert drift is not None and drift < 1e-5
    assert stack.drift is None and stack.on_drift == "ignore"


class Deep(nn.Module):
    """A residual network whose blocks amplify errors."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.body = nn.Sequential(*[Block(8, 8) for _ in range(8)])
        for p in self.parameters():
            nn.init.normal_(p, std=0.7, generator=generator)

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        return self.body(x)


def test_the_precision_of_a_report_and_its_silent_trials() -> None:
    net, x = Deep(), torch.randn(16, 8, generator=torch.Generator().manual_seed(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        single = revlib.report(net, x)
        with torch.autocast("cpu", torch.bfloat16):
            half = revlib.report(net, x)
    assert str(single).startswith("reversible stacks in float32 (drift differs in others: call report under torch.auto")
    assert str(half).startswith("reversible stacks in bfloat16")
    for report, enabled in ((single, False), (half, True)):
        model = copy.deepcopy(net)
        revlib.swap(model, report.targets)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = model(x)
        out.sum().backward()
        assert model.body.drift < 1e-3 and report.stacks[0].drift < 1e-3


@pytest.mark.parametrize("kind", [dict, UserDict, list])
def test_a_batch_that_is_not_the_arguments(kind: Any) -> None:
    net, x = Deep(), torch.randn(16, 8)
    batch = [x, x] if kind is list else kind({"x": x, "labels": x})
    before = copy.deepcopy(net.state_dict())
    message = (
        rf"Deep cannot be called with a {kind.__name__} .*report\(model, \*\*batch\) .*report\(model, batch\[0\]\)"
    )
    with pytest.raises(TypeError, match=message):
        revlib.report(net, batch)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert revlib.report(net, *batch[:1] if kind is list else (), **({} if kind is list else batch)).stacks


def test_a_batch_that_is_the_argument() -> None:
    class Whole(Deep):
        def forward(self, batch: Any) -> torch.Tensor:  # type: ignore[override]
            return super().forward(batch["x"])

    assert revlib.report(Whole(), {"x": torch.randn(16, 8)}).stacks


class CountsOnce(nn.Module):
    """Adds a hook to its layers in the first forward, as transformers does to give out hidden states."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.is_hooked, self.seen = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)]), False, list[int]()

    def forward(self, x: Tensor) -> Tensor:
        if not self.is_hooked:
            self.is_hooked = True
            for number, layer in enumerate(self.layers):
                layer.register_forward_hook(lambda *_, number=number: self.seen.append(number))
        for layer in self.layers:
            x = layer(x)
        return x


def test_hooks_that_the_first_forward_adds_are_taken_back() -> None:
    model, x = CountsOnce(), torch.randn(2, 4)
    targets = {"layers": {"coupling": "midpoint", "residual": True}}
    revlib.report(model, x)
    revlib.memory(model, x, torch.optim.SGD)
    revlib.swap(model, targets, inputs=x)
    revlib.restore(model)
    model.seen.clear()
    model(x)
    assert model.seen == [0, 1, 2]


class Attention(nn.Sequential):
    pass


class Mamba(nn.Sequential):
    pass


def test_layers_of_two_kinds_that_take_turns_are_proposed() -> None:
    class Hybrid(nn.Module):
        def __init__(self, kinds: list[type[nn.Sequential]]) -> None:
            super().__init__()
            self.layers = nn.ModuleList([kind(nn.Linear(4, 4), nn.Tanh()) for kind in kinds])

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
            return x

    assert list(revlib.report(Hybrid([Mamba, Attention] * 2), torch.randn(2, 4)).targets) == ["layers"]
    others = dict(revlib.report(Hybrid([Mamba, Attention]), torch.randn(2, 4)).others)
    assert "its blocks are of different kinds: Mamba, Attention" in others["layers"]


def test_a_block_that_returns_no_tensor() -> None:
    class Nested(nn.Linear):
        def forward(self, x: Any) -> Any:
            return ((super().forward(x[0] if isinstance(x, tuple) else x), 1), 2)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Nested(4, 4) for _ in range(2)])

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x, _ = block(x)
            return x[0]

    others = dict(revlib.report(Net(), torch.randn(2, 4)).others)
    assert "blocks.1 is not called with what blocks.0 returns" in others["blocks"]


class WithNone(nn.Module):
    """Has a place in its list that is left empty."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList([nn.LayerNorm(8), nn.Linear(8, 8), None])  # type: ignore[list-item]

    def forward(self, x: Tensor) -> Tensor:
        return x + self.parts[1](self.parts[0](x))


def test_lists_with_none() -> None:
    net, x = nn.Sequential(*[WithNone() for _ in range(3)]), torch.randn(2, 8)
    assert [stack.path for stack in revlib.report(net, x).stacks] == [""]
    assert revlib.memory(net, x).highest.total > 0
    with pytest.raises(ValueError, match="has None for a block"):
        revlib.swap(net, {"0.parts": {"coupling": "midpoint"}})
