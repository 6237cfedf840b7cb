from __future__ import annotations

import io
import logging
import pickle
import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lightning_revlib as revlib
from lightning_revlib.nn.engine import release as alone
from lightning_revlib.nn.plan.budget import Budget, share_budget
from lightning_revlib.nn.plan.fingerprint import digest
from lightning_revlib.nn.plan.profile import CPU, DEVICE, _Meter
from lightning_revlib.nn.plan.solver import Plan, lay_out, walk
from lightning_revlib.nn.stacks.options import read_budget
from lightning_revlib.strategies.base import save_memory_plan


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(-2, -3) for t in self.qkv(self.norm(x)).chunk(3, -1))
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(-2, -3).flatten(-2))


def mlp(width: int) -> nn.Module:
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


def conv(width: int) -> nn.Module:
    return nn.Sequential(nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1), nn.Dropout(0.1))


def pyramid() -> list[nn.Module]:
    return [conv(8), conv(8), revlib.SpaceToDepth(2), conv(32), conv(32)]


# The blocks, the input's shape, options.
STACKS: dict[str, tuple[Any, tuple[int, ...], dict[str, Any]]] = {
    "mlp": (lambda: [mlp(16) for _ in range(6)], (256, 32), {}),
    "momentum": (lambda: [mlp(32) for _ in range(6)], (128, 32), {"split_dim": None, "coupling": "momentum"}),
    "bdia": (lambda: [mlp(32) for _ in range(5)], (128, 32), {"split_dim": None, "coupling": "bdia", "grid_bits": 12}),
    "affine": (lambda: [nn.Sequential(mlp(16), nn.Linear(16, 32)) for _ in range(5)], (64, 32), {"coupling": "affine"}),
    "transformer": (lambda: [f(16) for _ in range(3) for f in (Attention, mlp)], (4, 32, 32), {"split_dim": 2}),
    "conv": (pyramid, (4, 16, 8, 8), {}),
    "light end": (lambda: [conv(8), conv(8), revlib.SpaceToDepth(2), nn.Tanh()], (32, 16, 8, 8), {}),
}  # fmt: skip


def autocast(enabled: bool) -> Any:
    return torch.autocast("cpu", torch.bfloat16, enabled=enabled)


def peak(stack: nn.Module, x: Tensor, half: bool = False) -> tuple[int, int]:
    """Peak bytes of forward and backward, and the output's."""
    for p in stack.parameters():
        p.grad = torch.zeros_like(p)
    with revlib.MemoryMeter() as meter:
        with autocast(half):
            y = stack(x)
        g, forward = torch.ones_like(y), meter.peak
        meter.reset_peak()
        y.backward(g)
    return max(forward, meter.peak), y.nbytes


def planned(stack: revlib.ReversibleSequential, x: Tensor) -> Plan:
    state, buffers = torch.get_rng_state(), [b.clone() for b in stack.buffers()]
    stack(x)
    torch.set_rng_state(state)
    for b, start in zip(stack.buffers(), buffers, strict=True):
        b.copy_(start)
    assert stack.plan is not None
    return stack.plan


def gradients(stack: nn.Module, x: Tensor) -> list[Tensor]:
    torch.manual_seed(1)
    return list(torch.autograd.grad(stack(x).square().sum(), [x, *stack.parameters()]))


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("kind", STACKS)
def test_never_over_budget_and_close_to_it(kind: str, half: bool) -> None:
    make, shape, options = STACKS[kind]
    blocks, x = make(), torch.randn(shape, requires_grad=True)
    plain, output = peak(revlib.CoupledSequential(*blocks, **options), x, half)
    least, _ = peak(revlib.ReversibleSequential(*blocks, **options), x, half)
    works = []
    for fraction in (0.1, 0.25, 0.5, 0.75, 1.2):
        budget = int(least + fraction * (plain - least) + 4096)
        stack = revlib.ReversibleSequential(*blocks, memory_budget=budget, **options)
        assert stack.plan is None
        with autocast(half):
            stack(x)
        assert stack.plan is not None
        taken, _ = peak(stack, x, half)
        assert taken <= budget
        assert taken <= stack.plan.peak <= taken + 2 * output + 64  # what is counted on is counted well
        works.append(stack.plan.work)
    assert works == sorted(works, reverse=True)
    assert stack.plan.treatments["stack"] == ("store",) * len(blocks) and works[-1] == 1


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("kind", STACKS)
@pytest.mark.parametrize("treatment", ["reversible", "checkpoint", "selective", "store"])
def test_what_one_treatment_takes_is_known(kind: str, treatment: Any, half: bool) -> None:
    if half and "grid_bits" in STACKS[kind][2]:
        pytest.skip("without a budget, exact stacks keep weights as they were cast")
    make, shape, options = STACKS[kind]
    blocks, x = make(), torch.randn(shape, requires_grad=True)
    budget = revlib.ReversibleSequential(*blocks, memory_budget=1.0, **options)
    with autocast(half):
        budget(x)
    assert budget.budget is not None
    ((measured, output),) = budget.budget._known["stack"].values()
    predicted, _ = walk(
        lay_out({"stack": (measured, output)}), [treatment if treatment in m.figures else "store" for m in measured]
    )
    taken, _ = peak(revlib.ReversibleSequential(*blocks, treatments=[treatment] * len(blocks), **options), x, half)
    assert taken <= predicted <= taken + 2 * output + 64


@pytest.mark.parametrize("large", [0, alone.LARGE])
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("kind", STACKS)
def test_no_mixture_of_treatments_takes_more_than_is_known(
    kind: str, half: bool, large: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(alone, "LARGE", large)
    make, shape, options = STACKS[kind]
    if half and "grid_bits" in options:
        pytest.skip("without a budget, exact stacks keep weights as they were cast")
    blocks, x, draw = make(), torch.randn(shape, requires_grad=True), random.Random(1)
    stack = revlib.ReversibleSequential(*blocks, memory_budget=1.0, **options)
    with autocast(half):
        stack(x)
    assert stack.budget is not None
    ((measured, output),) = stack.budget._known["stack"].values()
    for _ in range(12):
        mixed = [draw.choice(list(m.figures)) for m in measured]
        predicted, _ = walk(lay_out({"stack": (measured, output)}), mixed)
        taken, _ = peak(revlib.ReversibleSequential(*blocks, treatments=mixed, **options), x, half)
        assert taken <= predicted, mixed


@pytest.mark.parametrize("kind", STACKS)
@pytest.mark.parametrize("fraction", [0.1, 0.4, 0.8])
def test_gradients_and_buffers_are_those_of_autograd(kind: str, fraction: float) -> None:
    make, shape, options = STACKS[kind]
    torch.manual_seed(0)
    blocks, x = make(), torch.randn(shape, dtype=torch.float64, requires_grad=True)
    plan = planned(revlib.ReversibleSequential(*blocks, memory_budget=1.0, **options).double(), x)
    budget = int(plan.minimum + fraction * (plan.plain - plan.minimum))
    plain = revlib.CoupledSequential(*blocks, **options).double()
    buffers = [b.clone() for b in plain.buffers()]
    expected = [gradients(plain, x) for _ in range(2)]
    after = [b.clone() for b in plain.buffers()]
    for b, start in zip(plain.buffers(), buffers, strict=True):
        b.copy_(start)
    stack = revlib.ReversibleSequential(*blocks, memory_budget=budget, **options)
    for step in expected:  # the first measures, the second follows the plan
        for ours, theirs in zip(gradients(stack, x), step, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    for ours, theirs in zip(stack.buffers(), after, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("split_dim", [1, None])
def test_streams_in_channels_last_are_counted(split_dim: int | None) -> None:
    options: dict[str, Any] = {"split_dim": split_dim, "coupling": "additive" if split_dim else "momentum"}
    blocks = [nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)) for _ in range(6)]
    stack = revlib.ReversibleSequential(*blocks, memory_budget=0.9, **options).to(memory_format=torch.channels_last)
    x = torch.randn(8, 16 if split_dim else 8, 8, 8).to(memory_format=torch.channels_last).requires_grad_()
    peak(stack, x)
    assert stack.plan is not None
    assert peak(stack, x)[0] <= stack.plan.limit


class Further(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branch, self.further = mlp(16), nn.Linear(16, 64)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.branch(x), self.further(x).softmax(-1)


def test_further_outputs_are_counted_while_they_are_held() -> None:
    blocks, x = [Further() for _ in range(5)], torch.randn(128, 32, requires_grad=True)
    for value in (0.9, 0.95, 1.0):
        stack = revlib.ReversibleSequential(*blocks, memory_budget=value)
        stack(x)
        for p in [x, *stack.parameters()]:
            p.grad = torch.zeros_like(p)
        with revlib.MemoryMeter() as meter:
            y, further = stack(x)
            y.backward(torch.ones_like(y))
        assert stack.plan is not None and len(further) == 5
        assert meter.peak <= stack.plan.peak <= stack.plan.limit, value


def test_measuring_leaves_no_trace() -> None:
    stack = revlib.ReversibleSequential(*pyramid(), memory_budget=0.9)
    fired: list[Any] = []
    next(stack.parameters()).register_post_accumulate_grad_hook(fired.append)
    x, state = torch.randn(4, 16, 8, 8), torch.get_rng_state()
    y = stack(x)
    assert not fired and all(p.grad is None for p in stack.parameters())
    assert stack.get_buffer("0.0.num_batches_tracked") == 1
    torch.set_rng_state(state)
    reference = revlib.restore(stack) and stack
    for m in reference.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.reset_running_stats()
    torch.testing.assert_close(reference(x), y)


def test_alike_blocks_are_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_revlib.nn.plan import profile as module

    count = []
    measure = module.measure
    monkeypatch.setattr(module, "measure", lambda *args, **kwargs: count.append(1) or measure(*args, **kwargs))
    revlib.ReversibleSequential(*[mlp(16) for _ in range(32)], memory_budget=0.5)(
        torch.randn(8, 32, requires_grad=True)
    )
    assert len(count) == 12  # four treatments, of the first, the last and the others


class Applies(nn.Module):
    def __init__(self, does: Any) -> None:
        super().__init__()
        self.up, self.does, self.down = nn.Linear(16, 64), does, nn.Linear(64, 16)

    def forward(self, x: Tensor) -> Tensor:
        x, does = self.up(x), self.does
        if isinstance(does, dict):
            does = does["what"][0]
        return self.down(getattr(does, "of", does)(x))


class Method:
    def __init__(self, count: int) -> None:
        self.count = count

    def of(self, x: Tensor) -> Tensor:
        for _ in range(self.count):
            x = x.tanh()
        return x


@pytest.mark.parametrize(
    ("light", "heavy"),
    [(torch.relu, torch.logit), (lambda: Method(1), lambda: Method(5)),
     (lambda: {"what": [torch.tanh]}, lambda: {"what": [lambda x: x.tanh().sin() * x.sigmoid()]})],
)  # fmt: skip
def test_blocks_that_differ_in_an_attribute_are_measured_each(light: Any, heavy: Any) -> None:
    made = [what if what in (torch.relu, torch.logit) else what() for what in [light] * 4 + [heavy] * 4]
    stack, x = revlib.ReversibleSequential(*map(Applies, made), memory_budget=0.8), torch.randn(64, 32)
    peak(stack, x.requires_grad_())
    assert stack.plan is not None and stack.budget is not None
    assert peak(stack, x)[0] <= stack.plan.limit
    ((measured, _),) = stack.budget._known["stack"].values()
    assert len({id(m.figures) for m in measured}) == 4  # one of either kind, the first, on views, and the last


def test_a_digest_does_not_depend_on_addresses() -> None:
    def of(count: int) -> str:
        does = [Method(count), {"what": [torch.relu, lambda x: x]}, {"a", "b"}, object(), (torch.relu, Method)]
        stack = revlib.ReversibleSequential(*map(Applies, does), coupling_forward=torch.add, coupling_inverse=torch.sub)
        kept.append(stack)
        return digest(stack)

    kept: list[Any] = []
    assert of(1) == of(1) != of(2)


def test_replans_for_larger_shapes_only() -> None:
    stack = revlib.ReversibleSequential(*[mlp(16) for _ in range(4)], memory_budget=0.5)
    plans = []
    for rows in (64, 32, 64, 128, 64):
        stack(torch.randn(rows, 32))
        plans.append(stack.plan)
    assert plans[0] is plans[1] is plans[2] is plans[4] and plans[3] is not plans[0]


def test_plan_is_deterministic_printed_and_survives_pickling(caplog: pytest.LogCaptureFixture) -> None:
    blocks, x = [mlp(16) for _ in range(6)], torch.randn(64, 32)
    with caplog.at_level(logging.INFO, "lightning_revlib"):
        plans = []
        for _ in range(2):
            stack = revlib.ReversibleSequential(*blocks, memory_budget="100 kB")
            stack(x)
            plans.append(stack.plan)
    assert plans[0] == plans[1] and "memory plan:" in caplog.text and "of 97.7 KiB" in str(plans[0])
    assert pickle.loads(pickle.dumps(stack)).plan == stack.plan


def test_figures_go_through_a_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_revlib.nn.plan import profile as module

    def net() -> nn.Module:
        stacks = [revlib.ReversibleSequential(*[mlp(16) for _ in range(4)]) for _ in range(2)]
        share_budget({str(k): stack for k, stack in enumerate(stacks)}, Budget(0.6, announce=list))
        return nn.Sequential(*stacks)

    model, file = net(), io.BytesIO()
    for rows in (32, 64):
        model(torch.randn(rows, 32))
    torch.save(model[0].budget.state_dict(), file)  # type: ignore[union-attr, operator]
    count: list[int] = []
    measure = module.measure
    monkeypatch.setattr(module, "measure", lambda *args, **kwargs: count.append(1) or measure(*args, **kwargs))
    for change, measured in (("none", 0), ("a module", 12), ("the input", 28)):
        again = net()
        file.seek(0)
        again[0].budget.load_state_dict(torch.load(file, weights_only=True))  # type: ignore[union-attr, operator]
        if change == "a module":
            again[1][0][0].eps = 1e-3  # type: ignore[index, union-attr]
        count.clear()
        again(torch.randn(128 if change == "the input" else 50, 32))
        assert len(count) == measured, change
        assert change != "none" or again[0].plan == model[0].plan


def test_a_budget_that_goes_on_with_other_stacks(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_revlib.nn.plan import profile as module

    def net(*hidden: int) -> nn.Module:
        torch.manual_seed(0)
        stacks = [
            revlib.ReversibleSequential(*[nn.Sequential(nn.Linear(16, h), nn.Linear(h, 16)) for _ in range(4)])
            for h in hidden
        ]
        return nn.Sequential(*stacks)

    def fit(model: nn.Module, budget: Budget) -> Plan | None:
        share_budget(dict(model.named_children()), budget)
        for _ in range(2):
            model(torch.randn(32, 32, requires_grad=True))
        return budget.plan

    count: list[int] = []
    measure = module.measure
    monkeypatch.setattr(module, "measure", lambda *args, **kwargs: count.append(1) or measure(*args, **kwargs))
    first, other, budget = net(16, 16), net(16, 64), Budget("60KB", announce=list)
    plan = fit(first, budget)
    for model, measured in ((first, 0), (net(16, 16), 0), (other, 12), (net(16), 0)):
        count.clear()
        assert fit(model, budget) == fit(model, Budget("60KB", announce=list))
        assert len(count) - measured == 12 * len(model), "the second budget's own, and those of what has changed"
    assert plan is not None and budget.plan is not None and set(budget.plan.treatments) == {"0"}
    fit(first, budget)
    count.clear()
    resumed = Budget("60KB", announce=list)
    resumed.load_state_dict(budget.state_dict())
    assert fit(other, resumed) == fit(other, Budget("60KB", announce=list))
    assert len(count) == 12 + 24


def test_figures_that_fit_no_budget_are_not_saved() -> None:
    stack = revlib.ReversibleSequential(*[mlp(16) for _ in range(4)], memory_budget=100)
    with pytest.raises(ValueError, match="memory_budget=100"):
        stack(torch.randn(8, 32))
    assert stack.budget is not None and stack.budget.state_dict() == {}


def test_measuring_leaves_numbers_and_generators_as_they_are() -> None:
    class Warmup(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.calls, self.generator = nn.Linear(8, 8), 0, torch.Generator()

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            noise = torch.rand(x.shape, generator=self.generator, dtype=x.dtype)
            return self.linear(x).tanh() * noise * self.calls  # type: ignore[no-any-return]

    found: list[list[Any]] = []
    x = torch.randn(8, 16, dtype=torch.float64)
    for budget in ("1MiB", None):
        torch.manual_seed(0)
        stack = revlib.ReversibleSequential(*[Warmup() for _ in range(4)], memory_budget=budget).double()
        found.append([])
        for _ in range(3):
            found[-1] += torch.autograd.grad(stack(x).square().sum(), list(stack.parameters()))
        assert [block.calls for block in stack] == [3] * 4
    assert all(torch.allclose(p, q, rtol=1e-12) for p, q in zip(*found, strict=True))


def test_blocks_that_are_exchanged_are_measured() -> None:
    def block(hidden: int) -> nn.Module:
        return nn.Sequential(nn.Linear(32, hidden), nn.GELU(), nn.Linear(hidden, 32))

    stack = revlib.ReversibleSequential(*[block(32) for _ in range(6)], memory_budget="300KiB")
    x = torch.randn(64, 64, requires_grad=True)
    stack(x).sum().backward()
    for i in range(6):
        stack[i] = block(1024)
    with pytest.raises(ValueError, match=r"memory_budget='300KiB' is 300\.0 KiB, and .* need at least"):
        stack(x)


def test_blocks_with_reentrant_checkpoints_cannot_be_measured() -> None:
    class Reentrant(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(super().forward, x, use_reentrant=True)  # type: ignore[no-any-return]

    stack = revlib.ReversibleSequential(Reentrant(4, 4), memory_budget="1MiB")
    with pytest.raises(RuntimeError, match=r"0 \(Reentrant\) calls .* memory_budget='1MiB' .* use_reentrant=False"):
        stack(torch.randn(2, 8, requires_grad=True))


def test_stacks_built_as_reversible_have_figures_by_path_in_a_checkpoint() -> None:
    net = nn.Sequential(*[revlib.ReversibleSequential(mlp(8), mlp(8), memory_budget="1MiB") for _ in range(2)])
    revlib.swap(net)
    net(torch.randn(4, 16, requires_grad=True)).sum().backward()
    saved: dict[str, Any] = {}
    save_memory_plan(saved, None, net)
    assert list(saved["memory_figures"]) == ["0", "1"]


def test_a_smaller_batch_after_one_that_fits_no_budget() -> None:
    model = nn.Sequential(*[revlib.ReversibleSequential(*[mlp(16) for _ in range(4)]) for _ in range(2)])
    x = torch.randn(512, 32)
    least, _ = peak(model, x[:256])
    share_budget(dict(model.named_children()), Budget(least + 4096))
    for _ in range(2):
        with pytest.raises(ValueError, match="take a smaller batch"):
            model(x)
    model(x[:64])
    assert peak(model, x[:64])[0] <= least + 4096 and set(model[0].plan.treatments) == {"0", "1"}  # type: ignore[union-attr]


def test_a_call_with_another_number_of_tensors_is_measured() -> None:
    class Block(nn.Linear):
        def forward(self, x: Tensor, *masks: Tensor) -> Tensor:
            return super().forward(x) * masks[0] if masks else super().forward(x)

    stack, x = revlib.ReversibleSequential(*[Block(8, 8) for _ in range(4)], memory_budget="1MiB"), torch.randn(4, 16)
    for masks in ((), (torch.ones(4, 1),), ()):
        assert stack(x, *masks).shape == x.shape
    assert stack.budget is not None and len(stack.budget._known["stack"]) == 2


class Called(nn.Module):
    """With what it is called decides on what it takes."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.drop, self.down = nn.Linear(16, 64), nn.Dropout(0.1), nn.Linear(64, 16)

    def forward(self, x: Tensor, mask: Tensor | None = None, act: str = "relu", often: bool = False) -> Tensor:
        x = getattr(self.drop(self.up(x)), act)()
        for _ in range(4 if often else 0):
            x = x.tanh()
        return self.down(x if mask is None else (x.to(mask.dtype) * mask).to(x.dtype))


@pytest.mark.parametrize("how", ["dtype", "text", "flag", "nothing", "mode", "lent"])
def test_a_call_that_takes_more_is_measured(how: str) -> None:
    stack, x = revlib.ReversibleSequential(*[Called() for _ in range(4)], memory_budget=1.0), torch.randn(64, 32)
    x.requires_grad_()
    ways: dict[str, list[Any]] = {
        "dtype": [{"mask": torch.ones(64, 64)}, {"mask": torch.ones(64, 64, dtype=torch.float64)}],
        "text": [{"act": "relu"}, {"act": "cos"}],
        "flag": [{"often": False}, {"often": True}],
        "nothing": [{"mask": None}, {}],
    }
    plans = []
    for second in (False, True):
        if how == "mode":
            for block in stack:
                block.train(second)
        given = x.view_as(x) if how == "lent" and second else x
        for _ in range(2):
            stack(given, **ways.get(how, [{}, {}])[second])
        plans.append(stack.plan)
    assert stack.budget is not None and len(stack.budget._known["stack"]) == 2
    assert how == "nothing" or plans[0] != plans[1]
    for step in range(3):  # a number may be another in each step
        stack(x, often=step)
    assert len(stack.budget._known["stack"]) <= 3


def test_plans_of_other_signatures_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_revlib.nn.plan import profile as module

    count = []
    measure = module.measure
    monkeypatch.setattr(module, "measure", lambda *args, **kwargs: count.append(1) or measure(*args, **kwargs))
    stack = revlib.ReversibleSequential(*[mlp(16) for _ in range(4)], memory_budget=0.6)
    plans, measured = [], []
    for _ in range(3):
        for training, shape in ((True, (8, 20, 32)), (False, (8, 20, 32)), (True, (20, 8, 32))):
            stack.train(training).split_dim = 2
            stack(torch.randn(shape))
            plans.append(stack.plan)
        measured.append(len(count))
    assert plans[:3] == plans[3:6] == plans[6:] and measured[0] == measured[2]
    next(stack.parameters()).requires_grad_(False)
    stack(torch.randn(8, 20, 32))
    assert len(count) > measured[0]


def test_stacks_that_never_run_and_slices() -> None:
    model = nn.ModuleList([revlib.ReversibleSequential(*[mlp(16) for _ in range(4)]) for _ in range(2)])
    x = torch.randn(64, 32, requires_grad=True)
    for value in (0.5, 0.9):
        share_budget(dict(model.named_children()), Budget(value))
        for _ in range(2):
            model[0](x)
        assert model[0].plan.limit == int(value * model[0].plan.plain) and set(model[0].plan.treatments) == {"0"}
    model[0][:2](x)
    assert len(model[0].plan.treatments["0"]) == 4
    model[0](x)
    share_budget(dict(model.named_children()), None)
    assert model[0].plan is None


def test_stored_layers_are_not_planned() -> None:
    layers = revlib.ReversibleModuleList([mlp(32) for _ in range(3)], coupling="midpoint", memory_budget=0.5)
    revlib.restore(layers)
    y = x = torch.randn(64, 32, requires_grad=True)
    for layer in layers:
        y = layer(y)
    assert layers.plan is None and x.requires_grad


def test_several_stacks_share_a_budget() -> None:
    model = nn.Sequential(*[revlib.ReversibleSequential(*[mlp(16) for _ in range(4)]) for _ in range(2)])
    x = torch.randn(64, 32, requires_grad=True)
    least, _ = peak(model, x)
    plain, _ = peak(nn.Sequential(*[revlib.CoupledSequential(*stack) for stack in model]), x)  # type: ignore[misc]
    budget = (least + plain) // 2
    found = {path: m for path, m in model.named_modules() if isinstance(m, revlib.ReversibleSequential)}
    share_budget(found, Budget(budget))
    model(x)
    assert peak(model, x)[0] <= budget
    assert model[0].plan is model[1].plan and set(model[0].plan.treatments) == {"0", "1"}


def test_stacks_that_share_a_budget_and_batches_that_alternate() -> None:
    model = nn.Sequential(*[revlib.ReversibleSequential(*[mlp(16) for _ in range(4)]) for _ in range(2)])
    told: list[str] = []
    budget, x = Budget("600KiB", announce=told.append), torch.randn(256, 32, requires_grad=True)
    share_budget(dict(model.named_children()), budget)
    for rows in (16, 16, 256, 256, 256, 16, 256, 256, 16, 256):
        assert peak(model, x[:rows])[0] <= 600 << 10, rows
        assert budget.plan is not None and budget.plan.peak <= 600 << 10
    assert len(told) == 2
    planned = budget.plan.treatments["0"]
    model[0](x[:256])  # together with 256 rows in the second stack, which are 16 now
    model[1](x[:16])
    assert budget.plan.treatments["0"] == planned != ("store",) * 4 == budget.plan.treatments["1"]
    model[0](x[:16])  # and the other way round
    model[1](x[:256])
    assert budget.plan.treatments["0"] == ("store",) * 4 != budget.plan.treatments["1"]
    assert budget.plan.peak <= 600 << 10 < budget.plan.plain


def test_layers_that_a_model_calls() -> None:
    layers = revlib.ReversibleModuleList([mlp(32) for _ in range(6)], coupling="midpoint", memory_budget=0.5)
    x = torch.randn(64, 32, requires_grad=True)

    def run() -> Tensor:
        y = x
        for layer in layers:
            y = layer(y)
        return y

    run()
    for p in layers.parameters():
        p.grad = torch.zeros_like(p)
    with revlib.MemoryMeter() as meter:
        y = run()
        y.backward(torch.ones_like(y))
    assert meter.peak <= layers.plan.limit  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("value", "bytes_"),
    [(4096, 4096), ("2GiB", 2 << 30), ("1.5 MB", 1_500_000), ("100", 100), (0.5, 0.5), (1.0, 1.0), ("auto", None)],
)
def test_budgets_are_read(value: Any, bytes_: Any) -> None:
    assert read_budget(value) == bytes_


@pytest.mark.parametrize(
    ("value", "error"),
    [(0, ValueError), (-5, ValueError), (1.5, ValueError), (0.0, ValueError), ("2 GiBs", ValueError), ("", ValueError),
     ("0", ValueError), ("0.5", ValueError), ("9" * 400, ValueError),
     ("1.2.3MB", ValueError), (True, TypeError), ([1], TypeError), (float("nan"), ValueError)],
)  # fmt: skip
def test_bad_budgets_are_named(value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="memory_budget="):
        revlib.ReversibleSequential(nn.Identity(), memory_budget=value)


def test_what_cannot_be_planned_is_named() -> None:
    stack = revlib.ReversibleSequential(mlp(16), mlp(16), memory_budget=100)
    for _ in range(2):
        with pytest.raises(ValueError, match="memory_budget=100 is 100 B, and the reversible stacks need at least"):
            stack(torch.randn(64, 32))
    with pytest.raises(ValueError, match="leave out store_last and treatments"):
        revlib.ReversibleSequential(mlp(16), memory_budget=0.5, store_last=1)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="needs a CUDA device"):
            revlib.ReversibleSequential(mlp(16), memory_budget="auto")(torch.randn(4, 32))


def test_backward_is_measured_outside_of_autocast() -> None:
    seen = []

    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x.square()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
            seen.append(torch.is_autocast_enabled("cpu"))
            return 2 * grad * ctx.saved_tensors[0]

    class Block(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Square.apply(x)

    stack = revlib.ReversibleSequential(Block(), Block(), memory_budget=1.0)
    with autocast(True):
        stack(torch.randn(4, 8, requires_grad=True))
    assert seen and not any(seen)


def test_a_host_starts_operations_while_its_device_does_others() -> None:
    meters = {kind: _Meter(kind) for kind in ("cpu", "cuda")}
    for meter in meters.values():
        meter.flops, meter.written, meter.operations = 10**12, 10**8, 100
    for kind, prices in (("cpu", CPU), ("cuda", DEVICE)):
        done = 10**12 + prices.byte * 10**8
        for selective, price in ((False, prices.operation), (True, prices.selection)):
            both = done, 100 * price
            assert meters[kind].work(selective) == (sum(both) if kind == "cpu" else max(both))
    assert meters["cuda"].work(True) > meters["cuda"].work(False)  # it is the host that is waited for


@pytest.mark.parametrize("around", ["stack", "checkpoint"])
def test_a_stack_that_is_run_again_follows_no_plan(around: str) -> None:
    def make() -> nn.Module:
        return revlib.ReversibleSequential(*[nn.Linear(8, 8).double() for _ in range(4)], memory_budget="1MiB")

    def run(x: Tensor) -> Tensor:
        return inner(x).tanh()

    torch.manual_seed(0)
    inner, x = make(), torch.randn(4, 32, dtype=torch.float64, requires_grad=True)
    outer = revlib.ReversibleSequential(nn.Sequential(inner, nn.Linear(16, 16).double()), make())
    for _ in range(2):
        with pytest.warns(UserWarning, match="its memory_budget='1MiB' is not followed"):
            if around == "stack":
                outer(x).square().sum().backward()
            else:
                torch.utils.checkpoint.checkpoint(run, x[:, :16], use_reentrant=False).sum().backward()
