"""The two stacks that are called as a whole: names, options, shapes, inverse."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_revlib as revlib

TREATMENTS = ("reversible", "checkpoint", "selective", "offload", "store")
BOTH = pytest.mark.parametrize("cls", [revlib.CoupledSequential, revlib.ReversibleSequential])


def blocks(depth: int = 4, width: int = 4) -> list[nn.Module]:
    return [nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(depth)]


def test_output_and_gradients_equal_revlib() -> None:
    peer = pytest.importorskip("revlib")
    body, x = blocks(5), torch.randn(3, 8, requires_grad=True)
    ours, theirs = revlib.ReversibleSequential(*body), peer.ReversibleSequential(*copy.deepcopy(body), split_dim=1)
    y, expected = ours(x), theirs(x)
    assert torch.equal(y, expected)
    assert torch.allclose(*(torch.autograd.grad(out.square().sum(), x)[0] for out in (y, expected)), rtol=1e-5)


@BOTH
@pytest.mark.parametrize("coupling", [name for name, cls in revlib.COUPLINGS.items() if not cls.needs_grid])
def test_inverse(cls: type[Any], coupling: str) -> None:
    width = revlib.get_coupling(coupling).branch_shape(torch.Size([3, 4]))[1]
    body = [nn.Sequential(nn.Linear(4, width), nn.Tanh()) for _ in range(5)]
    stack, x = cls(*body, coupling=coupling).double(), torch.randn(3, 8).double()
    assert torch.allclose(stack.inverse(stack(x)), x, rtol=1e-10, atol=1e-10)


@BOTH
def test_inverse_changes_shapes_back(cls: type[Any]) -> None:
    stack = cls(nn.Conv2d(2, 2, 3, padding=1), revlib.SpaceToDepth(2), nn.Conv2d(8, 8, 3, padding=1))
    x = torch.randn(2, 4, 6, 6)
    assert stack(x).shape == (2, 16, 3, 3)
    assert torch.allclose(stack.inverse(stack(x)), x, atol=1e-5)


@BOTH
def test_names_keys_and_slices_are_those_of_sequential(cls: type[Any]) -> None:
    body = blocks(3)
    stack = cls(*body, split_dim=-1, coupling="midpoint")
    assert list(stack.state_dict()) == list(nn.Sequential(*body).state_dict())
    assert isinstance(stack, nn.Sequential) and len(stack) == 3 and stack[1] is body[1]
    part = stack[1:]
    assert type(part) is cls and list(part) == body[1:]
    assert (part.split_dim, part.couplings) == (stack.split_dim, stack.couplings)
    assert next(iter(cls(OrderedDict(first=body[0], second=body[1])).state_dict())) == "first.0.weight"
    assert "split_dim=-1" in repr(stack) and "Midpoint" in repr(stack)


@BOTH
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_input_has_float32_streams(cls: type[Any], half: torch.dtype) -> None:
    seen: list[torch.dtype] = []

    class Watch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x.dtype)
            return x.tanh() / 3

    x = torch.randn(64, 8, dtype=half, requires_grad=True)
    stack = cls(*[Watch() for _ in range(24)])
    y = stack(x)
    assert y.dtype == half and set(seen) == {half}
    y.sum().backward()
    assert x.grad is not None and x.grad.dtype == half
    assert y.float().sub(cls(*[Watch() for _ in range(24)])(x.float())).norm() / y.float().norm() < 2e-2
    if isinstance(stack, revlib.ReversibleSequential):
        assert stack.drift is not None and stack.drift < 1e-6
        coarse = revlib.ReversibleSequential(*stack, stream_dtype=half)
        coarse(x).sum().backward()
        assert coarse.drift is not None and coarse.drift > 1e-4


@BOTH
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"coupling": "aditive"}, ValueError, r"coupling='aditive' is unknown; did you mean 'additive'\?"),
        ({"coupling": {"name": "momentum", "beta": 0.9}}, ValueError, "'momentum' has no option 'beta'; it has gamma"),
        ({"coupling": {"gamma": 0.9}}, ValueError, "has no name"),
        ({"coupling": {"name": "momentum", "gamma": -1}}, ValueError, "gamma=-1"),
        ({"coupling": {"name": "midpoint", "h": 0}}, ValueError, "h=0"),
        ({"coupling": []}, ValueError, "empty"),
        ({"coupling_forward": torch.add}, ValueError, "coupling_forward was given without coupling_inverse"),
        ({"coupling_inverse": torch.sub}, ValueError, "coupling_inverse was given without coupling_forward"),
        (
            {"coupling_forward": [torch.add] * 2, "coupling_inverse": [torch.sub]},
            ValueError,
            "coupling_forward has 2 entries and coupling_inverse 1",
        ),
        ({"split_dim": 1.0}, TypeError, "split_dim=1.0"),
        ({"on_drift": "shout"}, ValueError, "on_drift='shout' is none of 'ignore', 'warn_once', 'warn', "),
        ({"store_last": 5}, ValueError, "store_last=5: the stack has 4 blocks"),
        ({"store_last": 1, "treatments": ["store"] * 4}, ValueError, "say the same"),
        ({"treatments": ["store"] * 3}, ValueError, "for each of 4 blocks"),
        (
            {"treatments": ["hold"] * 4},
            ValueError,
            "'checkpoint', 'selective', 'offload', 'store'",
        ),
        ({"grid_bits": 24}, ValueError, "grid_bits=24: .* from 0 to 23"),
        ({"grid_bits": True}, ValueError, "grid_bits=True: .* from 0 to 23"),
        ({"residual": "yes"}, TypeError, "residual='yes': pass True or False"),
        ({"stream_dtype": "float32"}, TypeError, "stream_dtype='float32': pass a floating-point dtype such as"),
        ({"stream_dtype": torch.int32}, TypeError, "stream_dtype=torch.int32: pass a floating-point dtype such as"),
        ({"drift_tolerance": "x"}, ValueError, "drift_tolerance='x': pass a number, at least 0"),
        ({"grid_bits": 12, "coupling": "affine"}, ValueError, "affine cannot be exact"),
        ({"grid_bits": 12, "coupling": "momentum"}, ValueError, "gamma=0.9: on the grid it must be a power of two"),
        (
            {"coupling": {"name": "momentum", "gamma": "abc"}},
            ValueError,
            "coupling 'momentum': gamma='abc' is no number; take one, such as 0.9",
        ),
        ({"coupling": {"name": "midpoint", "h": True}}, ValueError, "h=True is no number; take one, such as 0.5"),
        ({"coupling": "bdia"}, ValueError, "coupling 'bdia' works on the exact grid only; set grid_bits"),
    ],
)
def test_bad_options_are_named(cls: type[Any], options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        cls(*blocks(), **options)


@BOTH
def test_bad_stacks_and_inputs_are_named(cls: type[Any]) -> None:
    with pytest.raises(ValueError, match="got no blocks"):
        cls()
    with pytest.raises(TypeError, match="int"):
        cls(nn.Linear(2, 2), 3)
    with pytest.raises(ValueError, match=r"split_dim=1: size 7 of an input of shape \[2, 7\] cannot be halved"):
        cls(*blocks())(torch.randn(2, 7))
    with pytest.raises(ValueError, match=r"split_dim=2 is out of range for an input of shape \[2, 8\]"):
        cls(*blocks(), split_dim=2)(torch.randn(2, 8))
    with pytest.raises(TypeError, match=r"floating-point tensor, not torch\.int64"):
        cls(*blocks())(torch.ones(2, 8, dtype=torch.long))
    with pytest.raises(
        ValueError, match=r"stack\.1 \(Linear\) returned shape \[2, 1\]; for a stream of shape \[2, 4\]"
    ):
        cls(nn.Linear(4, 4), nn.Linear(4, 1))(torch.randn(2, 8))
    with pytest.raises(ValueError, match="layerwise has 1 entries; pass one"):
        cls(*blocks())(torch.randn(2, 8), layerwise=[((), {})])
    with pytest.raises(ValueError, match="inverse with split_dim=None"):
        cls(*blocks(), split_dim=None).inverse(torch.randn(2, 4))
    with pytest.raises(TypeError, match=r"stack\.0 \(Double\) returned torch\.float64 for a stream of torch\.float32"):
        cls(Double())(torch.randn(2, 8))
    with pytest.raises(
        TypeError, match=r"stack\.0 \(Talks\) returned str for its branch; a block returns a tensor, or"
    ):
        cls(Talks())(torch.randn(2, 8))


class Talks(nn.Module):
    def forward(self, x: Tensor) -> str:
        return "no tensor"


class Double(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.double()


@BOTH
def test_couplings_cycle_over_blocks_and_pass_over_invertible_steps(cls: type[Any]) -> None:
    f, g, h = blocks(3)
    turn = revlib.Permutation(4)
    x = torch.randn(3, 8)
    a, b = x.chunk(2, 1)
    a, b = b, a + f(b)
    a, b = turn(a), turn(b)
    a, b = revlib.Midpoint().forward(a, b, g(b))
    a, b = b, a + h(b)
    found = cls(f, turn, g, h, coupling=["additive", "midpoint"])(x)
    assert torch.allclose(found, torch.cat((a, b), 1))


def test_a_coupling_that_works_in_place_leaves_the_input_alone() -> None:
    pair = {"coupling_forward": lambda a, f: a.add_(f), "coupling_inverse": torch.sub}
    x = torch.randn(4, 16)
    before = x.clone()
    stack = revlib.ReversibleSequential(nn.Linear(8, 8), nn.Linear(8, 8), on_drift="raise", **pair)  # type: ignore[arg-type]
    stack(x).sum().backward()
    assert torch.equal(x, before)
    assert stack.drift is None  # the input's first half is no more what it was


@pytest.mark.parametrize("cls", [revlib.CoupledSequential, revlib.ReversibleSequential])
def test_blocks_that_are_appended_or_deleted(cls: Any) -> None:
    stack = cls(*blocks())
    stack.append(nn.Linear(4, 4))
    del stack[0]
    del stack[0]
    assert stack(torch.randn(2, 8)).shape == (2, 8)
    stack = cls(*blocks(), treatments=["store", *["reversible"] * (len(stack) - 1), "reversible"])
    del stack[0]
    with pytest.raises(
        ValueError, match=rf"stack has {len(stack)} blocks, and was made of {len(stack) + 1} with treat"
    ):
        stack(torch.randn(2, 8))


def test_torch_func_is_refused_with_the_way_out() -> None:
    stack = revlib.ReversibleSequential(*blocks())
    with pytest.raises(RuntimeError, match=r"torch\.func .*restore\(model\)"):
        torch.func.grad(lambda x: stack(x).sum())(torch.randn(2, 8))
    revlib.restore(stack)
    assert torch.func.grad(lambda x: stack(x).sum())(torch.randn(2, 8)).shape == (2, 8)


def test_ordinary_blocks_come_before_the_streams() -> None:
    blocks = [nn.Linear(3, 8), *[nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3)]]
    plain = revlib.CoupledSequential(*blocks[1:], split_dim=None)
    stack = revlib.ReversibleSequential(*blocks, split_dim=None, ordinary=1)
    x = torch.randn(2, 3)
    assert torch.equal(stack(x), plain(blocks[0](x)))
    stack(x).sum().backward()
    assert stack.drift is not None and blocks[0].weight.grad is not None
    assert stack[1:].ordinary == 0 and stack[:2].ordinary == 1
    with pytest.raises(ValueError, match=r"ordinary=4: of 4 blocks, 0 to 3 can be ordinary"):
        revlib.ReversibleSequential(*blocks, ordinary=4)
    with pytest.raises(ValueError, match="inverse with ordinary blocks"):
        stack.inverse(stack(x))


@pytest.mark.parametrize("coupling", [revlib.Momentum(0), revlib.Scaled(0)], ids=str)
def test_couplings_without_an_inverse_store(coupling: revlib.Coupling) -> None:
    stack, x = revlib.ReversibleSequential(*[nn.Linear(4, 4) for _ in range(3)], coupling=coupling), torch.randn(2, 8)
    stack(x).sum().backward()
    assert stack.drift is None and all(p.grad.isfinite().all() for p in stack.parameters())
    with pytest.raises(ValueError, match="inverse with coupling"):
        stack.inverse(stack(x))


def test_the_inverse_names_a_block_of_another_shape() -> None:
    with pytest.raises(ValueError, match=r"stack\.0 \(Linear\) returned shape \[2, 1\]"):
        revlib.CoupledSequential(nn.Linear(4, 1)).inverse(torch.randn(2, 8))


@pytest.mark.parametrize("cls", [revlib.CoupledSequential, revlib.ReversibleSequential])
def test_slices_compute_what_their_blocks_do_in_the_stack(cls: type[Any]) -> None:
    blocks = [nn.Linear(8, 8), *[nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(5)]]
    couplings = ["additive", {"name": "scaled", "scale": 0.5}, "additive"]
    names = ["store", "reversible", "checkpoint", "reversible", "store", "checkpoint"]
    stack = cls(*blocks, ordinary=1, coupling=couplings, chunks=[1, 2], treatments=names)
    x = torch.randn(4, 8)
    for cut in range(2, 6):
        first, second = stack[:cut], stack[cut:]
        assert torch.equal(second(first(x)), stack(x))
        assert (*first.treatments, *second.treatments) == tuple(names)
        revlib.swap(second, {"": {"on_drift": "ignore"}})  # options of the whole do not come back
        assert torch.equal(second(first(x)), stack(x)) and second.treatments == tuple(names[cut:])
    assert revlib.ReversibleSequential(*blocks[1:], store_last=1)[:3].options.store_last == 0


def test_slices_have_hooks_and_buffers_of_their_own() -> None:
    stack, called = revlib.ReversibleSequential(*[nn.Linear(4, 4) for _ in range(3)]), []
    part = stack.eval()[:2]
    part.register_forward_hook(lambda *_: called.append(1))
    part.register_buffer("late", torch.ones(1))
    stack(torch.randn(2, 8))
    assert not called and "late" not in stack.state_dict() and not part.training


def test_sums_and_multiples_of_stacks() -> None:
    a, b = (revlib.ReversibleSequential(nn.Linear(4, 4), nn.Linear(4, 4), coupling="midpoint") for _ in range(2))
    x = torch.randn(2, 8)
    for both, blocks in ((a + b, [*a, *b]), (a * 2, [*a, *a]), (2 * a, [*a, *a]), (a + nn.Sequential(*b), [*a, *b])):
        assert type(both) is revlib.ReversibleSequential and list(both) == blocks and len(a) == 2
        assert torch.equal(both(x), revlib.CoupledSequential(*blocks, coupling="midpoint")(x))
    part = revlib.ReversibleSequential(*a, *b, coupling="midpoint")[1:3]
    assert [*(part + a), *(part * 2)] == [*part, *a, *part, *part]  # whose blocks have the names "1" and "2"
    for other in (revlib.ReversibleSequential(nn.Linear(4, 4)), revlib.ReversibleSequential(*a, store_last=1)):
        with pytest.raises(ValueError, match="with other options, ordinary blocks or treatments of their own"):
            a + other


def test_a_slice_of_a_subclass_has_its_parameters() -> None:
    class Scaled(revlib.ReversibleSequential):
        def __init__(self, *blocks: nn.Module) -> None:
            super().__init__(*blocks)
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x: torch.Tensor) -> Any:  # type: ignore[override]
            return super().forward(x) * self.scale

    stack = Scaled(nn.Linear(4, 4), nn.Linear(4, 4))
    assert stack[:1].scale is stack.scale and stack[:1](torch.randn(2, 8)).shape == (2, 8)


def test_a_sparse_input() -> None:
    with pytest.raises(TypeError, match="to_dense"):
        revlib.ReversibleSequential(nn.Linear(4, 4))(torch.eye(8).to_sparse())


@pytest.mark.parametrize("treatments", [["reversible"], ["reversible", "store"], ["checkpoint", "reversible"]])
def test_an_earlier_backward_through_what_made_the_input(treatments: list[str]) -> None:
    stack = revlib.ReversibleSequential(*[nn.Linear(4, 4) for _ in treatments], split_dim=None, treatments=treatments)
    z = torch.randn(2, 4, requires_grad=True)
    x = z + 1
    y = stack(x)
    x.sum().backward()
    y.sum().backward()
    expected = torch.autograd.grad(revlib.CoupledSequential(*stack, split_dim=None)(z + 1).sum(), z)[0] + 1
    torch.testing.assert_close(z.grad, expected)


def test_an_input_outside_of_the_grid() -> None:
    stack = revlib.ReversibleSequential(nn.Linear(4, 4), coupling="leapfrog", grid_bits=16)
    with pytest.raises(
        ValueError, match="stack: its input reaches 1e\\+03, and on the grid of grid_bits=16 it must stay"
    ):
        stack(torch.full((2, 8), 1000.0))
    assert stack(torch.zeros(0, 8)).shape == (0, 8)


def test_a_grid_that_is_chosen_between_the_two_runs_of_a_block() -> None:
    class Nest(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            blocks = [nn.Linear(2, 2) for _ in range(2)]
            self.stack = revlib.ReversibleSequential(*blocks, coupling="midpoint", grid_bits="auto")

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.stack(x)

    stack, x = revlib.ReversibleSequential(Nest()), torch.randn(2, 8)
    with pytest.raises(RuntimeError, match="has chosen its grid in between: give it grid_bits as a number"):
        stack(x).sum().backward()
    stack(x).sum().backward()


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize(
    "options", [{}, {"grid_bits": "auto"}, {"memory_budget": 1.0}, *[{"treatments": [t] * 3} for t in TREATMENTS]]
)
def test_an_input_made_in_inference_mode(options: dict[str, Any], grad: bool) -> None:
    with torch.inference_mode():
        x = torch.randn(64, 8)
    stack = revlib.ReversibleSequential(*blocks(3), **options)
    with torch.set_grad_enabled(grad):
        y = stack(x)
    if grad:
        y.sum().backward()
        assert all(p.grad is not None for p in stack.parameters())


@pytest.mark.parametrize(
    "option", [{"grid_bits": 12}, {"ordinary": 1}, {"residual": True}, {"branches": [["0"]]}], ids=str
)
def test_options_from_which_others_follow_are_set_by_swap(option: Any) -> None:
    stack = revlib.ReversibleSequential(*blocks())
    ((name, value),) = option.items()
    with pytest.raises(AttributeError, match=rf"stack: set {name} by lightning_revlib.swap\(model, "):
        setattr(stack, name, value)
    assert getattr(stack, name) == getattr(revlib.ReversibleSequential(*blocks()), name)


def test_an_exact_stack_in_a_transform_is_refused() -> None:
    stack, x = revlib.ReversibleSequential(*blocks(), grid_bits=12), torch.randn(3, 2, 8)
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"grid_bits=12: torch\.func\.jvp and vmap cannot run"):
        torch.vmap(stack)(x)
