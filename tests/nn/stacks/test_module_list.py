"""Layers that a model calls in a loop of its own: gradients, bytes, copies, restoring."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import lightning_revlib as revlib
from tests.nn.stacks.looping_model import RETURNS, Layer, Model, close, gradients, stored

COUPLINGS: list[Any] = ["additive", {"name": "momentum", "gamma": 0.8}, "midpoint", "leapfrog", "scaled"]


@pytest.mark.parametrize("returns", RETURNS)
@pytest.mark.parametrize("coupling", COUPLINGS, ids=str)
def test_gradients_are_those_of_ordinary_autograd(coupling: Any, returns: str) -> None:
    model = Model(returns=returns, dropout=0.2).double()
    revlib.swap(model, {"layers": {"coupling": coupling, "residual": True}})
    args = torch.randn(3, 6).double(), torch.rand(3, 6).double(), torch.rand(6).double()
    close(gradients(model, *args), gradients(stored(model), *args))
    assert model.layers.drift is not None and model.layers.drift < 1e-12


def test_the_function_is_the_one_that_its_equations_say() -> None:
    model = Model().double()
    revlib.swap(model, {"layers": {"coupling": {"name": "momentum", "gamma": 0.7}, "residual": True}})
    twin = copy.deepcopy(model)
    revlib.restore(twin)
    x = torch.randn(3, 6).double()

    def by_hand(x: Tensor) -> Tensor:
        x = twin.stem(x)
        v = torch.zeros_like(x)
        for layer in twin.layers:
            v = 0.7 * v + 0.3 * (layer(x) - x)
            x = x + v
        return twin.head(x).sum()

    expected = by_hand(x)
    expected.backward()
    loss = model(x)
    loss.backward()
    assert torch.allclose(loss, expected, rtol=1e-12)
    close([p.grad for p in model.parameters()], [p.grad for p in twin.parameters()])  # type: ignore[misc]


@pytest.mark.parametrize(
    "options",
    [
        {"store_last": 2},
        {"treatments": ["reversible", "checkpoint", "store", "reversible", "reversible"]},
        {"grid_bits": 12, "coupling": "bdia"},
        {"grid_bits": 12},
        {"ordinary": 2},
        {"coupling": ["additive", "midpoint"]},
        {"residual": False, "coupling": "scaled"},
    ],
    ids=str,
)
def test_options(options: Any) -> None:
    model = Model(dropout=0.1).double()
    revlib.swap(model, {"layers": {"residual": True, **options}})
    x = torch.randn(3, 6).double()
    close(gradients(model, x), gradients(stored(model), x))
    model.eval()
    close(gradients(model, x), gradients(stored(model), x))


def test_it_holds_two_streams_at_any_depth() -> None:
    def held(depth: int, swapped: bool) -> tuple[int, int]:
        model, x = Model(depth, 64), torch.randn(32, 64)
        if swapped:
            revlib.swap(model, {"layers": {"coupling": "midpoint", "residual": True}})
        with revlib.MemoryMeter() as meter:
            loss = model(x)
            live = meter.live
            for p in model.parameters():
                p.grad = torch.zeros_like(p)
            before = meter.live - live
            meter.reset_peak()
            loss.backward()
        return live, meter.peak - before

    assert held(4, True) == held(16, True)  # though backward asks for nothing that `norm`'s graph has saved
    assert held(16, False)[0] > 10 * held(16, True)[0]


class Partly(Model):
    """Runs its first layers without gradients."""

    without = 0

    def forward(self, x: Tensor, *_: Any) -> Tensor:
        for index, layer in enumerate(self.layers):
            with torch.set_grad_enabled(index >= self.without):
                x = layer(x)
        return self.head(x).sum()


@pytest.mark.parametrize("options", [{}, {"memory_budget": "1MiB"}, {"grid_bits": 12}], ids=str)
def test_first_layers_without_gradients(options: Any) -> None:
    model, x = Partly(6, 64).double(), torch.randn(32, 64).double()
    revlib.swap(model, {"layers": {"coupling": "midpoint", "residual": True, "on_drift": "raise", **options}})
    held = []
    for model.without in (0, 2):
        with revlib.MemoryMeter() as meter:
            loss = model(x)
            held.append(meter.live)
        del loss
        close(gradients(model, x), gradients(stored(model), x))
    assert "memory_budget" in options or held[0] == held[1]


def test_a_copy_attribute_by_attribute_is_refused() -> None:
    model = Model()
    revlib.swap(model, {"layers": {"coupling": "midpoint"}})
    clones = {}
    for name, module in model.named_modules():
        clones[name] = clone = module.__new__(type(module))
        clone.__dict__ = {**vars(module), "_modules": dict(module._modules)}
        if name:
            parent, _, child = name.rpartition(".")
            clones[parent]._modules[child] = clone
    with pytest.raises(RuntimeError, match=r"layers: a copy .* take torch.func.functional_call"):
        clones[""](torch.randn(3, 6))
    with pytest.raises(RuntimeError, match=r"layers: a copy .* take torch.func.functional_call"):
        clones[""].layers[0]


def test_flops_are_four_thirds() -> None:
    model, x = Model(8, 16), torch.randn(4, 16, requires_grad=True)
    model.stem = model.head = nn.Identity()  # type: ignore[assignment]
    flops = []
    for _ in range(2):
        with FlopCounterMode(display=False) as counter:
            model(x).backward()
        flops.append(counter.get_total_flops())
        revlib.swap(model, {"layers": {"coupling": "midpoint", "residual": True}})
    assert 3 * flops[1] == 4 * flops[0]


def test_grad_mode_off_frozen_parts_and_half_precision() -> None:
    model, x = Model(), torch.randn(3, 6)
    revlib.swap(model, {"layers": {"coupling": "midpoint", "residual": True}})
    expected = model(x)
    with torch.no_grad():
        assert torch.equal(model(x), expected)
    with torch.inference_mode():
        assert torch.equal(model(x), expected)
    model.stem.requires_grad_(False)
    model.layers[:2].requires_grad_(False)
    twin = stored(model)
    model(x).backward()
    twin(x).backward()
    assert all(p.grad is None for p in model.layers[0].parameters())
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None) and (p.grad is None or torch.allclose(p.grad, q.grad, atol=1e-6))
    half = Model().bfloat16()
    revlib.swap(half, {"layers": {"coupling": "midpoint", "residual": True}})
    close(gradients(half, x.bfloat16()), gradients(stored(half), x.bfloat16()), 1e-2)
    with torch.autocast("cpu", torch.bfloat16):
        loss, again = model(x), twin(x)
    model.zero_grad()
    twin.zero_grad()
    loss.backward()
    again.backward()
    assert torch.allclose(model.layers[4].linear.weight.grad, twin.layers[4].linear.weight.grad, rtol=1e-2)


def test_what_surrounds_it() -> None:
    """Hooks that pass tensors on, checkpointing outside, anomaly mode, retain_graph, two forwards in turn."""
    model = Model().double()
    revlib.swap(model, {"layers": {"coupling": "midpoint", "residual": True}})
    x = torch.randn(3, 6).double()
    expected = gradients(stored(model), x)
    seen: list[Any] = []
    handles = [layer.register_full_backward_hook(lambda m, i, o: seen.append(m)) for layer in model.layers]
    close(gradients(model, x), expected)
    assert len(seen) == 5
    half = copy.deepcopy(model).bfloat16()
    close(gradients(half, x.bfloat16()), gradients(stored(half), x.bfloat16()), 1e-2)
    for handle in handles:
        handle.remove()
    with torch.autograd.detect_anomaly(check_nan=False):
        close(gradients(model, x), expected)
    close(gradients(lambda_module(model, lambda x: checkpoint(model, x, use_reentrant=False)), x), expected)
    y = model(x)
    first = torch.autograd.grad(y, list(model.parameters()), retain_graph=True)
    close(list(first), list(torch.autograd.grad(y, list(model.parameters()))))
    a, b = model(x), model(2 * x)
    (a + b).backward()
    twin = stored(model)
    (twin(x) + twin(2 * x)).backward()
    close([p.grad for p in model.parameters()], [p.grad for p in twin.parameters()])  # type: ignore[misc]


def lambda_module(model: nn.Module, function: Any) -> Any:
    class Outside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            return function(x)

    return Outside()


def test_lists_in_lists() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.ModuleList([Layer(6) for _ in range(2)])

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.inner:
                x = layer(x)
            return x

    model = Model(3).double()
    model.layers = nn.ModuleList([Outer() for _ in range(3)]).double()
    model.forward = lambda_forward(model)  # type: ignore[method-assign]
    targets = {"layers*": {"coupling": "midpoint", "residual": True}}
    assert len(revlib.swap(model, targets)) == 4
    twin = stored(model)
    for i in range(3):
        revlib.swap(twin, {f"layers.{i}.inner": {"store_last": 2}})
    x = torch.randn(3, 6).double()
    close(gradients(model, x), gradients(twin, x))


class lambda_forward:
    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, x: Tensor) -> Tensor:
        for layer in self.model.layers:
            x = layer(x)
        return x.sum()


def test_copies_and_pickles_run_by_themselves() -> None:
    model, x = Model().double(), torch.randn(3, 6).double()
    revlib.swap(model, {"layers": {"coupling": "midpoint", "residual": True}})
    expected = gradients(model, x)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        drift = model.layers.drift
        close(gradients(again, x), expected)
        gradients(again, 2 * x)
        assert again.layers.drift != drift == model.layers.drift
        assert revlib.restore(again) == ["layers"] and type(again.layers) is nn.ModuleList
        assert "forward" not in again.layers[0].__dict__
    model.layers[0](torch.randn(3, 6).double())  # a forward that is given up leaves nothing that cannot be copied
    close(gradients(copy.deepcopy(model), x), expected)


def test_keys_parameters_and_restore() -> None:
    model = Model()
    keys, parameters = list(model.state_dict()), list(model.parameters())
    before = [(name, type(m), set(m.__dict__)) for name, m in model.named_modules()]
    revlib.swap(model, {"layers": {"coupling": "midpoint", "residual": True}})
    revlib.swap(model)  # idempotent
    assert list(model.state_dict()) == keys
    assert all(p is q for p, q in zip(model.parameters(), parameters, strict=True))
    assert type(model.layers[1:]) is nn.ModuleList and len(model.layers[1:]) == 4
    model(torch.randn(2, 6)).backward()
    assert revlib.restore(model) == ["layers"]
    assert [(name, type(m), set(m.__dict__)) for name, m in model.named_modules()] == before
    assert revlib.restore(model) == []


def test_a_list_built_as_such_keeps_its_function_when_restored() -> None:
    model = Model()
    model.layers = revlib.ReversibleModuleList([Layer(6) for _ in range(3)], coupling="midpoint", residual=True)
    x = torch.randn(3, 6)
    expected = gradients(model, x)
    assert revlib.swap(model) == ["layers"]
    assert revlib.restore(model) == ["layers"] and set(model.layers.treatments) == {"store"}  # type: ignore[arg-type]
    close(gradients(model, x), expected, 1e-5)


def test_compiled_models() -> None:
    torch._dynamo.reset()
    model, x = Model(depth=2).double(), torch.randn(3, 6).double()
    revlib.swap(model, {"layers": {"coupling": "midpoint", "residual": True}})
    expected = gradients(stored(model), x)
    close(gradients(torch.compile(model, backend="aot_eager"), x), expected)  # type: ignore[arg-type]
    torch._dynamo.reset()
    for layer in model.layers:
        layer.compile(backend="aot_eager")
    close(gradients(model, x), expected)
    torch._dynamo.reset()


def test_a_sequential_whose_blocks_are_called_one_by_one() -> None:
    model = Model(dropout=0.1).double()
    model.layers = nn.Sequential(OrderedDict((f"block{i}", layer) for i, layer in enumerate(model.layers)))  # type: ignore[assignment]
    x, keys = torch.randn(3, 6).double(), list(model.state_dict())
    report = revlib.report(model, x)
    assert report.targets == {
        "layers": {"coupling": {"name": "momentum", "gamma": 0.2}, "residual": True, "iterated": True}
    }
    assert report.held_after < report.held_before
    for _ in range(2):  # as strategies do
        revlib.swap(model, {"layers": {"coupling": "midpoint", "residual": True, "iterated": True}})
    close(gradients(model, x), gradients(stored(model), x))
    assert model.layers.drift is not None and list(model.state_dict()) == keys and len(model.layers[1:]) == 4
    with pytest.raises(ValueError, match=r"layers\.block2 \(Layer\) was called before layers\.block0"):
        model.layers.block2(x)
    assert revlib.restore(model) == ["layers"] and type(model.layers) is nn.Sequential


@pytest.mark.gpu
@pytest.mark.parametrize("half", [False, True])
def test_on_cuda(half: bool) -> None:
    model, x = Model(dropout=0.2).cuda(), torch.randn(3, 6, device="cuda")
    revlib.swap(model, {"layers": {"coupling": "midpoint", "residual": True}})
    with torch.autocast("cuda", torch.bfloat16, enabled=half):
        close(gradients(model, x), gradients(stored(model), x), 1e-2 if half else 1e-5)


class LinearAttentionCache:
    """Has a state in place of a length, as the caches of Mamba's models."""

    def __init__(self, is_filled: bool) -> None:
        self.is_filled = is_filled

    def get_seq_length(self) -> int:
        raise ValueError("there is no attention layer")

    def has_previous_state(self) -> bool:
        return self.is_filled


@pytest.mark.parametrize("is_filled", [False, True])
def test_a_cache_of_linear_attention(is_filled: bool) -> None:
    class Cached(Layer):
        def forward(self, hidden: Tensor, cache: Any = None) -> Any:
            given.append(cache)
            return super().forward(hidden)

    given: list[Any] = []
    layers = revlib.ReversibleModuleList([Cached(8) for _ in range(2)], coupling="midpoint", residual=True)
    x, cache = torch.randn(2, 8), LinearAttentionCache(is_filled)
    with pytest.warns(UserWarning, match="activations are stored" if is_filled else "the cache stays empty"):
        for layer in layers:
            x = layer(x, cache=cache)
    assert given == [cache if is_filled else None] * 2


class Prefixed(Layer):
    def forward(self, hidden: Tensor, cache: Any = None, scale: Any = 1.0) -> Any:  # type: ignore[override]
        return hidden + torch.tanh(self.linear(hidden) + (0 if cache is None else cache.prefix))


class Prefix:
    prefix = 0.5

    def get_seq_length(self) -> int:
        return 1


def test_a_filled_cache_that_some_layers_get() -> None:
    layers = nn.ModuleList([Prefixed(6) for _ in range(4)])
    stack = revlib.ReversibleModuleList(
        copy.deepcopy(layers), coupling={"name": "momentum", "gamma": 0.0}, residual=True
    )
    x, found = torch.randn(3, 6), []
    for each in (layers, stack):
        h = x
        for index, layer in enumerate(each):
            h = layer(h, Prefix() if index % 2 == 0 else None)
        found.append(h)
    assert torch.allclose(*found, atol=1e-6)
