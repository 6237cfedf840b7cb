"""What users of other libraries, and of other parts of torch, have tried, and what failed."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.distributed import _composable as composable

import lightning_revlib as revlib
from lightning_revlib.nn.treatments import TREATMENTS
from tests.nn.fake_device import Device


def gradients(stack: nn.Module, *inputs: Tensor) -> list[Tensor]:
    torch.manual_seed(1)
    return list(torch.autograd.grad(stack(*inputs).square().sum(), list(stack.parameters())))


class Graph(nn.Module):
    """A layer of a graph network; its adjacency matrix is an argument or a buffer."""

    adjacency: Tensor

    def __init__(self, adjacency: Tensor | None = None) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4).double()
        self.register_buffer("adjacency", adjacency)

    def forward(self, x: Tensor, adjacency: Tensor | None = None) -> Tensor:
        return self.layer(torch.sparse.mm(self.adjacency if adjacency is None else adjacency, x))


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
@pytest.mark.parametrize("where", ["argument", "buffer"])
def test_sparse_matrices(layout: torch.layout, where: str) -> None:
    adjacency = torch.rand(5, 5, dtype=torch.float64).gt(0.5).double().to_sparse(layout=layout)
    stack = revlib.ReversibleSequential(*[Graph(adjacency if where == "buffer" else None) for _ in range(3)])
    inputs = (torch.randn(5, 8, dtype=torch.float64), *([adjacency] if where == "argument" else []))
    expected = gradients(revlib.CoupledSequential(*stack), *inputs)
    assert all(map(torch.allclose, gradients(stack, *inputs), expected))


def test_an_input_with_the_negative_bit() -> None:
    stack = revlib.ReversibleSequential(*[nn.Linear(4, 4).double() for _ in range(3)])
    x = torch.randn(3, 8, dtype=torch.complex128).conj().imag
    assert x.is_neg()
    expected = gradients(revlib.CoupledSequential(*stack), x)
    assert all(map(torch.allclose, gradients(stack, x), expected))


class Spectral(nn.Module):
    """Saves a conjugate, or what is negative by a bit only: lazy views."""

    def __init__(self, width: int, negative: bool) -> None:
        super().__init__()
        self.layer, self.negative = nn.Linear(width, width).double(), negative

    def forward(self, x: Tensor) -> Tensor:
        z = torch.fft.fft(self.layer(x))
        return z.conj().imag * z.roll(1, -1).real if self.negative else (z.roll(1, -1) * z.conj()).imag


@pytest.mark.parametrize("negative", [True, False])
def test_offload_keeps_conjugates_and_negatives(device: Device, negative: bool) -> None:
    stack = revlib.ReversibleSequential(*[Spectral(64, negative) for _ in range(2)], treatments=["offload"] * 2)
    x = torch.randn(128, 128, dtype=torch.float64)
    expected = gradients(revlib.CoupledSequential(*stack), x)
    with device:
        found = gradients(stack, x)
    assert device.pinned
    assert all(map(torch.allclose, found, expected))


def test_batched_gradients_of_a_large_output() -> None:
    stack = revlib.ReversibleSequential(*[nn.Linear(64, 64).double() for _ in range(2)])
    x = torch.randn(2048, 128, dtype=torch.float64, requires_grad=True)
    vectors = torch.randn(2, 2048, 128, dtype=torch.float64)

    def batched(stack: nn.Module) -> Tensor:
        return torch.autograd.grad(stack(x), x, vectors, is_grads_batched=True)[0]

    assert torch.allclose(batched(stack), batched(revlib.CoupledSequential(*stack)))


def test_a_model_restored_between_forward_and_backward() -> None:
    model = nn.Sequential(revlib.CoupledSequential(*[nn.Linear(4, 4).double() for _ in range(3)]))
    x = torch.randn(3, 8, dtype=torch.float64)
    expected = gradients(model, x)
    revlib.swap(model)
    loss = model(x).square().sum()
    revlib.restore(model)
    assert all(map(torch.allclose, torch.autograd.grad(loss, list(model.parameters())), expected))


def test_a_coupling_alone_as_a_target() -> None:
    body = nn.Sequential(*[nn.Linear(4, 4) for _ in range(3)])
    models = [nn.ModuleDict({"body": copy.deepcopy(body)}) for _ in range(2)]
    revlib.swap(models[0], {"body": "midpoint"})
    revlib.swap(models[1], {"body": {"coupling": "midpoint"}})
    assert models[0].body.couplings == models[1].body.couplings == (revlib.get_coupling("midpoint"),)
    with pytest.raises(TypeError, match=r"target 'body': 3 are no options; pass a mapping"):
        revlib.swap(models[0], {"body": 3})  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"treatments": "checkpoint"}, r"treatments='checkpoint': pass a list, one treatment for each block"),
        ({"memory_budget": 0.001}, r"need at least .* for this input, .* more; take a larger fraction"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, object], message: str) -> None:
    blocks: Callable[[], list[nn.Module]] = lambda: [nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3)]  # noqa: E731
    with pytest.raises((TypeError, ValueError), match=message):
        revlib.ReversibleSequential(*blocks(), **options)(torch.randn(3, 8)).sum().backward()  # type: ignore[arg-type]


@pytest.mark.parametrize("treatment", TREATMENTS)
def test_every_treatment(treatment: str) -> None:
    blocks = [nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Tanh()).double() for _ in range(3)]
    stack = revlib.ReversibleSequential(*blocks, treatments=[treatment] * 3)
    x = torch.randn(3, 8, dtype=torch.float64)
    assert all(map(torch.allclose, gradients(stack, x), gradients(revlib.CoupledSequential(*blocks), x)))


class Norm(nn.Module):
    """A norm that changes its buffers without their versions telling, unless it is frozen."""

    mean: Tensor
    var: Tensor

    def __init__(self, frozen: bool) -> None:
        super().__init__()
        self.frozen = frozen
        self.register_buffer("mean", torch.zeros(4).double())
        self.register_buffer("var", torch.ones(4).double())

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.batch_norm(x, self.mean, self.var, training=not self.frozen)


def test_a_frozen_instance_hides_no_other() -> None:
    x, stack = (
        torch.randn(8, 8).double(),
        revlib.ReversibleSequential(Norm(True), nn.Linear(4, 4).double(), Norm(False)),
    )
    plain = revlib.CoupledSequential(*copy.deepcopy(list(stack)))
    for each in (plain, stack):
        gradients(each, x)
    assert torch.allclose(stack[2].mean, plain[2].mean)
    assert torch.equal(stack[0].mean, torch.zeros(4).double())


class Masked(nn.Module):
    """Takes a mask from a dict, in which it also leaves something."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4).double()

    def forward(self, x: Tensor, context: dict[str, list[Tensor]]) -> Tensor:
        context["seen"].append(x.mean())
        return self.layer(x).tanh() * context["masks"][0]


@pytest.mark.parametrize("treatment", ["reversible", "checkpoint"])
def test_a_dict_that_is_filled_anew_before_backward(treatment: str) -> None:
    stack = revlib.ReversibleSequential(*[Masked() for _ in range(3)], treatments=[treatment] * 3)
    xs, masks = torch.randn(2, 5, 8).double(), torch.rand(2, 5, 1).gt(0.5).double()

    def both(stack: nn.Module) -> tuple[list[Tensor], int]:
        context: dict[str, list[Tensor]] = {"seen": [], "masks": []}
        losses = []
        for x, mask in zip(xs, masks, strict=True):
            context["masks"][:] = [mask]
            losses.append(stack(x, context).square().sum())
        found = list(torch.autograd.grad(sum(losses), list(stack.parameters())))
        return found, len(context["seen"])

    (found, seen), (expected, count) = both(stack), both(revlib.CoupledSequential(*stack))
    assert all(map(torch.allclose, found, expected))
    assert seen == count == 6


@pytest.mark.parametrize("x", [None, "text", torch.ones(3, 8, dtype=torch.int64)])
def test_an_input_that_is_no_tensor_of_floats(x: object) -> None:
    with pytest.raises(TypeError, match="the input must be a floating-point tensor, not"):
        revlib.ReversibleSequential(nn.Linear(4, 4))(x)


class Counts(nn.Module):
    """Makes a counter in its first call."""

    def forward(self, x: Tensor) -> Tensor:
        self.calls = getattr(self, "calls", 0) + 1
        return (x * self.calls).sin()


def test_a_counter_that_the_first_call_makes() -> None:
    stack = revlib.ReversibleSequential(*[nn.Sequential(nn.Linear(4, 4), Counts()).double() for _ in range(3)])
    plain, x = revlib.CoupledSequential(*copy.deepcopy(list(stack))), torch.randn(3, 8, dtype=torch.float64)
    for _ in range(2):
        assert all(map(torch.allclose, gradients(stack, x), gradients(plain, x)))
    assert [block[1].calls for block in stack] == [2, 2, 2]


@pytest.mark.parametrize("treatment", ["reversible", "checkpoint"])
def test_the_meta_device(treatment: str) -> None:
    blocks = [nn.Sequential(nn.Linear(4, 4), nn.Tanh()).to("meta") for _ in range(3)]
    stack = revlib.ReversibleSequential(*blocks, treatments=[treatment] * 3)
    stack(torch.randn(3, 8, device="meta")).sum().backward()
    assert all(p.grad is not None and p.grad.is_meta for p in stack.parameters())


class Listed(nn.Module):
    """Calls the layers of its list one by one."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers or [nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3)]).double()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


MIDPOINT = {"layers": {"coupling": "midpoint"}}
X = torch.randn(3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def replica(model: nn.Module) -> tuple[nn.Module, list[Tensor]]:
    """Return a copy as nn.DataParallel makes it, on this device, and its weights."""
    copies = {m: m._replicate_for_data_parallel() for m in model.modules()}  # type: ignore[operator]
    weights: list[Tensor] = []
    for original, each in copies.items():
        for name, child in original.named_children():
            setattr(each, name, copies[child])
        for name, parameter in original.named_parameters(recurse=False):
            weights.append(parameter.clone())
            setattr(each, name, weights[-1])
    return copies[model], weights


def test_data_parallel_of_a_sequence_has_its_own_weights() -> None:
    stack = revlib.ReversibleSequential(*[nn.Linear(4, 4).double() for _ in range(3)])
    copied, weights = replica(stack)
    found = torch.autograd.grad(copied(X).square().sum(), weights)
    assert all(map(torch.allclose, found, gradients(revlib.CoupledSequential(*stack), X)))


def test_data_parallel_of_a_list_is_refused() -> None:
    model = Listed()
    revlib.swap(model, MIDPOINT)
    with pytest.raises(RuntimeError, match=r"layers: nn\.DataParallel cannot copy a reversible list"):
        replica(model)
    revlib.restore(model)
    assert replica(model)[0](X).shape == X.shape


def wrap(layer: nn.Module) -> list[int]:
    """Wrap the layer's forward, as hooks of other libraries do, and return a list that grows with each call."""
    inner, calls = layer.forward, list[int]()

    def forward(*args: Tensor) -> Tensor:
        calls.append(1)
        return inner(*args)

    layer.forward = forward
    return calls


def test_layers_whose_forward_is_wrapped_after_the_swap() -> None:
    model, expected = Listed(), Listed()
    expected.load_state_dict(model.state_dict())
    revlib.swap(expected, MIDPOINT)
    plain = model(X)
    revlib.swap(model, MIDPOINT)
    calls = wrap(model.layers[1])
    with pytest.raises(RuntimeError, match=r"layers: its layers are others .*, or the forward of one; call swap"):
        model(X)
    revlib.swap(model, MIDPOINT)
    assert all(map(torch.allclose, gradients(model, X), gradients(expected, X)))
    assert len(calls) == 2  # in forward and in backward
    revlib.restore(model)
    assert torch.equal(model(X), plain)
    revlib.swap(model, MIDPOINT)
    wrap(model.layers[2])
    revlib.restore(model)
    assert torch.equal(model(X), plain)
    revlib.swap(model, MIDPOINT)
    assert all(map(torch.allclose, gradients(model, X), gradients(expected, X)))


@pytest.mark.parametrize("treatment", TREATMENTS)
def test_a_checkpoint_around_layers_of_a_list(treatment: str) -> None:
    model, expected = Listed(), Listed()
    expected.load_state_dict(model.state_dict())
    for each in (model, expected):
        revlib.swap(each, {"layers": {"coupling": "midpoint", "treatments": [treatment] * 3}})
    for layer in model.layers:
        composable.checkpoint(layer)
    if treatment == "reversible":  # saves nothing that the checkpoint could recompute
        assert all(map(torch.allclose, gradients(model, X), gradients(expected, X)))
    else:
        with pytest.raises(ValueError, match=r"layers\.2 .* was called again in backward, by a checkpoint around it"):
            gradients(model, X)


def test_checkpointing_inside_the_layers_is_told() -> None:
    layers: list[nn.Module] = [nn.Linear(8, 8) for _ in range(3)]
    model = Listed(*layers)
    revlib.swap(model, MIDPOINT)
    for layer in layers:
        layer.gradient_checkpointing = True  # type: ignore[assignment]
    with pytest.warns(UserWarning, match=r"layers: gradient checkpointing is on, and runs layers a third time"):
        gradients(model, X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gradients(model.eval(), X)


def test_what_bdia_stores_in_evaluation_is_told() -> None:
    model = Listed()
    revlib.swap(model, {"layers": {"coupling": "bdia", "grid_bits": 12}})
    with pytest.warns(UserWarning, match="layers: bdia has no inverse in evaluation mode: activations are stored"):
        model.eval()(X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.train()(X)
        with torch.no_grad():
            model.eval()(X)
        revlib.swap(model, {"layers": {"coupling": "bdia", "grid_bits": 12, "treatments": ["store"] * 3}})
        model(X)


def test_a_swapped_list_shows_its_coupling() -> None:
    model = Listed()
    revlib.swap(model, {"layers": {"coupling": {"name": "momentum", "gamma": 0.3}}})
    text = str(model.layers)
    assert text.startswith(
        "ReversibleModuleList(\n  split_dim=None, coupling=Momentum(gamma=0.3, init=None)\n  (0-2): 3 x"
    )
    revlib.restore(model)
    assert str(model.layers) == str(Listed().layers)


def test_an_option_of_another_coupling() -> None:
    with pytest.raises(ValueError, match="'additive' has no option 'gamma'; it has none; momentum, bdia has it"):
        revlib.get_coupling("additive", gamma=0.5)
