from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import lightning_revlib as revlib


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(8, 8)
        self.first = revlib.CoupledSequential(*[nn.Linear(4, 4) for _ in range(3)], coupling="midpoint")
        self.second = nn.Sequential(*[nn.Linear(4, 4) for _ in range(2)])
        self.listed = nn.ModuleList([nn.Linear(4, 4)])


def snapshot(model: nn.Module) -> Any:
    return (
        [(name, type(m), {k: v for k, v in m.__dict__.items() if k[0] != "_"}) for name, m in model.named_modules()],
        [(name, id(p)) for name, p in model.named_parameters()],
        list(model.state_dict()),
    )


def test_swap_changes_the_class_and_nothing_else() -> None:
    model = Net()
    before, first = snapshot(model), model.first
    assert revlib.swap(model) == ["first"]
    assert model.first is first and type(first) is revlib.ReversibleSequential
    assert snapshot(model)[1:] == before[1:]
    assert first.couplings == (revlib.Midpoint(),)
    assert revlib.swap(model) == ["first"]
    assert revlib.restore(model) == ["first"]
    assert snapshot(model) == before
    assert revlib.restore(model) == []


def test_targets_by_path_and_glob_with_options() -> None:
    model = Net()
    before = snapshot(model)
    options = {"coupling": {"name": "momentum", "gamma": 0.8}, "split_dim": -1}
    assert revlib.swap(model, {"sec*": options, "first": None}) == ["second", "first"]
    assert isinstance(model.second, revlib.ReversibleSequential)
    assert (model.second.couplings, model.second.split_dim) == ((revlib.Momentum(0.8),), -1)
    assert model.first.couplings == (revlib.Midpoint(),)
    assert model.second(torch.randn(2, 8)).shape == (2, 8)
    revlib.swap(model, {"first": {"coupling": "leapfrog"}})
    assert model.first.couplings == (revlib.Leapfrog(),)
    revlib.restore(model)
    assert snapshot(model) == before


def test_options_change_only_what_they_name() -> None:
    model = Net()
    revlib.swap(model, {"first": {"store_last": 1}})
    assert model.first.couplings == (revlib.Midpoint(),) and model.first.treatments[-1] == "store"
    revlib.swap(model, {"first": {"grid_bits": 12}})
    assert model.first.couplings == (revlib.Midpoint().on_grid(12),) and model.first.treatments[-1] == "store"
    revlib.swap(model, {"first": {"treatments": ["checkpoint"] * 3, "coupling_forward": torch.add,
                                  "coupling_inverse": torch.sub, "grid_bits": None}})  # fmt: skip
    assert model.first.couplings[0].coupling_forward is torch.add and set(model.first.treatments) == {"checkpoint"}


def test_a_restored_module_keeps_nothing_of_the_run() -> None:
    model = Net()
    before = {name: set(m.__dict__) for name, m in model.named_modules()}
    revlib.swap(model, {"first": None, "second": {}})
    model.second(model.first(torch.randn(2, 8))).sum().backward()
    revlib.restore(model)
    assert {name: set(m.__dict__) for name, m in model.named_modules()} == before


def test_the_model_itself_can_be_the_stack() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    assert revlib.swap(model, {"": {}}) == [""]
    assert isinstance(model, revlib.ReversibleSequential)


def test_a_container_that_has_two_paths_is_found_by_either() -> None:
    model = Net()
    model.alias = nn.ModuleDict({"shared": model.second})
    assert revlib.swap(model, {"alias.shared": {"coupling": "midpoint"}}) == ["second"]
    assert isinstance(model.alias.shared, revlib.ReversibleSequential)


def test_residual_blocks_compute_their_branch() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.layer(x)

    body = [Residual() for _ in range(3)]
    model, x = nn.Sequential(*body).double(), torch.randn(2, 8).double()
    expected = revlib.CoupledSequential(*[block.layer for block in body]).double()(x)
    revlib.swap(model, {"": {"residual": True}})
    assert torch.allclose(model(x), expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("targets", "error", "message"),
    [
        (
            {"secnd": None},
            ValueError,
            r"target 'secnd' matches no nn\.Sequential or nn\.ModuleList of Net; near it: 'second'",
        ),
        (
            {"x.*": None},
            ValueError,
            r"target 'x\.\*' matches no nn\.Sequential or nn\.ModuleList of Net; near it: 'first', 'second'",
        ),
        ({"stem": None}, TypeError, "target 'stem' is a Linear, which cannot be swapped"),
        ({"first": None, "second": {"coupling": "affin"}}, ValueError, "target 'second': coupling='affin' is unknown"),
        ({"first": None, "second": {"dim": 2}}, TypeError, "target 'second': there is no option 'dim'; did you mean"),
    ],
)
def test_errors_leave_the_model_as_it_was(targets: Any, error: type[Exception], message: str) -> None:
    model = Net()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        revlib.swap(model, targets)
    assert snapshot(model) == before


def test_nothing_to_swap_is_an_error() -> None:
    with pytest.raises(
        ValueError, match=r"nothing to swap: Linear has no CoupledSequential.*report\(model, batch\)\) proposes"
    ):
        revlib.swap(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"nothing to swap: targets=\{\} is empty"):
        revlib.swap(nn.Sequential(nn.Linear(2, 2)), {})


def test_a_subclass_is_refused_and_left() -> None:
    class Mine(nn.Sequential):
        pass

    model = nn.ModuleDict({"mine": Mine(nn.Linear(2, 2))})
    with pytest.raises(TypeError, match="target 'mine' is a Mine"):
        revlib.swap(model, {"mine": None})


def test_a_swapped_model_can_be_copied_and_restored() -> None:
    model = Net()
    revlib.swap(model, {"second": {"coupling": "additive"}})
    again = copy.deepcopy(model)
    assert revlib.restore(again) == ["second"]
    assert type(again.second) is nn.Sequential and isinstance(model.second, revlib.ReversibleSequential)


def test_errors_in_a_run_name_the_path_in_the_model() -> None:
    model = Net()
    model.first[1] = nn.Linear(4, 3)
    revlib.swap(model)
    with pytest.raises(ValueError, match=r"first\.1 \(Linear\) returned shape \[2, 3\]"):
        model.first(torch.randn(2, 8))


@pytest.mark.parametrize("treatment", ["reversible", "checkpoint", "store"])
def test_an_error_of_a_block_gets_its_path(treatment: str) -> None:
    model = nn.ModuleDict({"body": nn.Sequential(*[nn.Sequential(nn.BatchNorm1d(8)) for _ in range(2)])})
    message = r"body\.0 \(Sequential\), called with a stream of shape \[5, 4\]: running_mean should contain 4 elements"
    with pytest.raises(RuntimeError, match=message):
        revlib.swap(model, {"body": {"treatments": [treatment] * 2}})
        model["body"](torch.randn(5, 8))
    revlib.restore(model)
    model["body"](torch.randn(5, 8))


class Block(nn.Module):
    def __init__(self, i: int = 4, o: int = 4) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(i, o), nn.BatchNorm1d(o)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.linear(x))


class Reading(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.layers = nn.ModuleList([Block(), Block(4, 6 if how == "shape" else 4), Block(6 if how == "shape" else 4)])

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        states = []
        for layer in self.layers:
            x = layer(layer(x)) if self.how == "twice" else layer(x)
            states.append(x)
        return (sum(states) if self.how == "pyramid" else x) * scale  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("shape", r"layers\.1 \(Block\) returned shape \[5, 6\]; for a stream of shape \[5, 4\]"),
        ("twice", r"layers\.0 \(Block\) was called a second time"),
    ],
)
def test_a_swap_that_is_tried_and_fails_leaves_the_model_untouched(how: str, message: str) -> None:
    model, x = Reading(how), torch.randn(5, 4)
    before, state, generator = snapshot(model), copy.deepcopy(model.state_dict()), torch.get_rng_state()
    with pytest.raises((ValueError, RuntimeError), match=message):
        revlib.swap(model, {"layers": {"coupling": "midpoint"}}, inputs=x)
    assert snapshot(model) == before and not any("forward" in layer.__dict__ for layer in model.layers)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters()) and torch.equal(generator, torch.get_rng_state())


def test_a_swap_that_is_tried_and_works() -> None:
    for inputs in (torch.randn(5, 4), (torch.randn(5, 4), 2.0), {"x": torch.randn(5, 4)}):
        model = Reading("pyramid")
        assert revlib.swap(model, {"layers": {"coupling": "midpoint"}}, inputs=inputs) == ["layers"]
        assert model.layers[0].norm.num_batches_tracked == 0  # type: ignore[union-attr]


def test_layers_that_were_cut_off_a_swapped_list_are_restored() -> None:
    model: Any = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(4, 4) for _ in range(4)])})
    revlib.swap(model, {"layers": {"coupling": "midpoint", "residual": True}})
    model["layers"] = model["layers"][:2]
    assert revlib.restore(model) == ["layers.0", "layers.1"]
    x, first = torch.randn(2, 4), model["layers"][0]
    assert torch.equal(first(x), nn.functional.linear(x, first.weight, first.bias))
    assert revlib.swap(model, {"layers": "midpoint"}) == ["layers"]


@pytest.mark.parametrize("given", [["layers"], "layers"])
def test_targets_that_are_no_mapping(given: Any) -> None:
    with pytest.raises(TypeError, match="pass a mapping of paths"):
        revlib.swap(nn.ModuleDict({"layers": nn.Sequential(nn.Linear(4, 4))}), given)


def test_a_model_that_is_a_class() -> None:
    with pytest.raises(TypeError, match="an object and no class"):
        revlib.swap(Net)  # type: ignore[arg-type]
