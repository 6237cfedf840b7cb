from __future__ import annotations

import copy
import gc
import pickle
from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import lightning_revlib as revlib

Pair = namedtuple("Pair", ["hidden", "norm"])


@dataclass
class Output:
    hidden: Tensor
    norm: Tensor


RETURNS = {
    "tensor": lambda y, n: y,
    "tuple": lambda y, n: (y, n),
    "list": lambda y, n: [y, n],
    "named tuple": Pair,
    "dict": lambda y, n: OrderedDict(hidden=y, norm=n),
    "dataclass": Output,
}


class Layer(nn.Module):
    """A residual layer with a mask, dropout and a further output."""

    def __init__(self, width: int, returns: str = "tensor", dropout: float = 0.0) -> None:
        super().__init__()
        self.norm, self.linear, self.dropout = nn.LayerNorm(width), nn.Linear(width, width), nn.Dropout(dropout)
        self.returns = returns

    def forward(self, hidden: Tensor, mask: Tensor | None = None, scale: Any = 1.0) -> Any:
        out = self.dropout(torch.tanh(self.linear(self.norm(hidden)))) * scale
        out = hidden + (out if mask is None else out * mask)
        return RETURNS[self.returns](out, out.pow(2).mean())


class Model(nn.Module):
    """What people write: a loop over a ModuleList between an embedding and a head."""

    def __init__(self, depth: int = 5, width: int = 6, **options: Any) -> None:
        super().__init__()
        self.stem = nn.Linear(width, width)
        self.layers = nn.ModuleList([Layer(width, **options) for _ in range(depth)])
        self.head = nn.Linear(width, 1)

    def forward(self, x: Tensor, mask: Tensor | None = None, scale: Any = 1.0) -> Tensor:
        x, norms = self.stem(x), x.new_zeros(())
        for layer in self.layers:
            out = layer(hidden=x, mask=mask, scale=scale) if scale is not None else layer(x, mask)
            if isinstance(out, Tensor):
                x = out
            else:
                values = list(out.values()) if isinstance(out, dict) else list(vars(out).values()) if isinstance(
                    out, Output) else out  # fmt: skip
                x, norms = values[0], norms + values[1]
        return self.head(x).sum() + norms


def gradients(model: nn.Module, *args: Any) -> list[Tensor]:
    torch.manual_seed(1)
    inputs = [a.detach().requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
    loss = model(*inputs)
    targets = [*model.parameters(), *[a for a in inputs if isinstance(a, Tensor) and a.requires_grad]]
    return [loss.detach(), *torch.autograd.grad(loss, [t for t in targets if t.requires_grad], allow_unused=True)]  # type: ignore[list-item]


def stored(model: Any, path: str = "layers") -> Any:
    """The same function by ordinary autograd."""
    twin = copy.deepcopy(model)
    revlib.swap(twin, {path: {"treatments": ["store"] * len(twin.get_submodule(path))}})
    return twin


def close(xs: list[Tensor], ys: list[Tensor], tolerance: float = 1e-10) -> None:
    for x, y in zip(xs, ys, strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


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
        close(gradients(again, x), expected)
        assert again.layers[0].forward.owner is again.layers
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


class Order(Model):
    order: tuple[Any, ...] = ()

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        for entry in self.order:
            x = entry(x) if callable(entry) else self.layers[entry](x)
        return x.sum()


@pytest.mark.parametrize(
    ("order", "message"),
    [
        ((0, 1, 1, 2, 3, 4), r"layers\.1 \(Layer\) was called a second time, after layers\.1 \(Layer\)"),
        ((0, 0, 1, 2, 3, 4), r"layers\.0 \(Layer\) was called a second time, after layers\.0 \(Layer\)"),
        ((0, 2, 3, 4), r"layers\.2 \(Layer\) was called where layers\.1 \(Layer\) was due, after layers\.0"),
        ((1, 0, 2, 3, 4), r"layers\.1 \(Layer\) was called before layers\.0 \(Layer\)"),
        ((0, 1, 0, 1, 2, 3, 4), r"layers\.0 \(Layer\) was called where layers\.2 \(Layer\) was due, after layers\.1"),
        ((0, 1, 2, 3, 4, 2), r"layers\.2 \(Layer\) was called before layers\.0"),
        ((0, lambda x: x + 1, 1, 2, 3, 4), r"layers\.1 .* with something else than what layers\.0 .* had returned"),
        ((0, lambda x: x.add_(1), 1, 2, 3, 4), "was modified in place between two layers"),
    ],
)
@pytest.mark.parametrize("grad", [True, False])
def test_calls_that_cannot_be_reversed_are_explained(order: Any, message: str, grad: bool) -> None:
    model = Order()
    model.order = order
    plain = copy.deepcopy(model)
    revlib.swap(model, {"layers": {"coupling": "midpoint", "residual": True}})
    with torch.set_grad_enabled(grad), pytest.raises((ValueError, RuntimeError), match=message):
        model(torch.randn(2, 6))
    revlib.restore(model)
    x = torch.randn(2, 6)
    assert torch.equal(model(x), plain(x))


def test_leaving_early_is_noticed_in_backward() -> None:
    model = Order()
    model.order = (0, 1, 2)
    revlib.swap(model, {"layers": {"coupling": "midpoint", "residual": True}})
    with pytest.raises(RuntimeError, match=r"what layers\.2 .* or a model that leaves the list early"):
        model(torch.randn(2, 6)).backward()
    model.order = (0, 1, 2, 3, 4)
    model(torch.randn(2, 6)).backward()


def test_states_read_between_the_layers_are_an_error_unless_detached() -> None:
    class Pyramid(Model):
        detach = False

        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            states = []
            for layer in self.layers:
                x = layer(x)
                states.append(x.detach() if self.detach else x)
            return self.head(torch.stack(states)).sum() + x.sum()

    model, x = Pyramid(), torch.randn(2, 6)
    revlib.swap(model, {"layers": {"coupling": "midpoint", "residual": True}})
    with pytest.raises(RuntimeError, match=r"what layers\.3 \(Layer\) returned is also used by something else"):
        model(x).backward()
    with torch.no_grad():
        model(x)
    model.detach = True
    model(x).backward()


def test_layers_that_change_the_shape() -> None:
    class Wider(nn.Module):
        def __init__(self, i: int, o: int) -> None:
            super().__init__()
            self.linear = nn.Linear(i, o)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x)

    model = Order()
    model.layers = nn.ModuleList([Wider(6, 8), Wider(8, 8), Wider(8, 4)])
    model.order = (0, 1, 2)
    revlib.swap(model, {"layers": {"ordinary": 1}})
    with pytest.raises(ValueError, match=r"layers\.2 \(Wider\) returned shape \[2, 4\]"):
        model(torch.randn(2, 6))
    model.layers[2] = Wider(8, 8)
    with pytest.raises(RuntimeError, match="layers: its layers are others than when it was swapped"):
        model(torch.randn(2, 6))
    revlib.swap(model, {"layers": {"ordinary": 1}})
    model(torch.randn(2, 6)).backward()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split_dim": 1}, "target 'layers': split_dim=1: layers that their model calls see the whole stream"),
        ({"ordinary": 5}, "target 'layers': ordinary=5: of 5 blocks, 0 to 4"),
        ({"coupling": "bdia"}, "target 'layers': coupling 'bdia' works on the exact grid only"),
    ],
)
def test_wrong_options_leave_the_model_as_it_was(options: Any, message: str) -> None:
    model = Model()
    before = [(name, type(m), set(m.__dict__)) for name, m in model.named_modules()]
    with pytest.raises(ValueError, match=message):
        revlib.swap(model, {"layers": options})
    assert [(name, type(m), set(m.__dict__)) for name, m in model.named_modules()] == before


def test_a_layer_that_raises_leaves_nothing_behind() -> None:
    class Failing(Layer):
        def forward(self, hidden: Tensor, **kwargs: Any) -> Any:
            raise KeyError("out of luck")

    model = Model()
    model.layers[3] = Failing(6)
    revlib.swap(model, {"layers": {"coupling": "midpoint", "residual": True}})
    with revlib.MemoryMeter() as meter:
        with pytest.raises(KeyError, match="out of luck"):
            model(torch.randn(2, 6))
        gc.collect()
        assert meter.live == 0
    y = torch.randn(3, requires_grad=True)
    assert (y * y).grad_fn._saved_self is not None  # type: ignore[union-attr]  # no hooks are left


def test_graphs_are_freed() -> None:
    model = Model(returns="tuple")
    revlib.swap(model, {"layers": {"coupling": "midpoint", "residual": True}})
    gc.disable()
    try:
        with revlib.MemoryMeter() as meter:
            model(torch.randn(2, 6))
            assert meter.live == 0
    finally:
        gc.enable()


def test_compiled_models() -> None:
    torch._dynamo.reset()
    model, x = Model().double(), torch.randn(3, 6).double()
    revlib.swap(model, {"layers": {"coupling": "midpoint", "residual": True}})
    expected = gradients(stored(model), x)
    close(gradients(torch.compile(model, backend="aot_eager"), x), expected)  # type: ignore[arg-type]
    torch._dynamo.reset()
    for layer in model.layers:
        layer.compile(backend="aot_eager")
    close(gradients(model, x), expected)
    torch._dynamo.reset()


def test_torch_func_is_refused_with_the_way_out() -> None:
    model = Model()
    revlib.swap(model, {"layers": {"coupling": "midpoint", "residual": True}})
    with pytest.raises(RuntimeError, match=r"restore\(model\) makes them ordinary"):
        torch.func.grad(model)(torch.randn(2, 6))


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


def test_checkpointing_round_the_layers_is_refused() -> None:
    class Layer(nn.Linear):
        gradient_checkpointing = True

        def __call__(self, x: Tensor) -> Any:
            return checkpoint(super().__call__, x, use_reentrant=False)

    layers = revlib.ReversibleModuleList([Layer(8, 8) for _ in range(3)], coupling="midpoint")
    with pytest.raises(ValueError, match=r"0 \(Layer\): gradient checkpointing is on.*gradient_checkpointing_disable"):
        layers[0](torch.randn(4, 8))
