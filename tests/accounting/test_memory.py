"""The bytes of a training step by owner: what `MemoryMeter` counts, on real tensors and on fake ones."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lightning_revlib as revlib
from tests.accounting.programs import FAMILIES, RECIPES, WAYS, check, program


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", [*FAMILIES, *RECIPES])
def test_owners_add_up_to_the_meter_and_fake_tensors_agree(name: str, way: str, tmp_path: Path) -> None:
    model, batch, _ = program(name, tmp_path).run(way)
    check(model, batch)


def mlp(*blocks: nn.Module) -> nn.Module:
    blocks = blocks or tuple(nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(4))
    return nn.Sequential(nn.Linear(8, 32), revlib.ReversibleSequential(*blocks), nn.Linear(32, 5))


def entropy(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


BATCH = torch.randn(64, 8), torch.arange(64) % 5


def test_bytes_of_each_owner() -> None:
    model = mlp()
    memory = revlib.memory(lambda batch: entropy(model, batch), BATCH, torch.optim.Adam, model=model, advice=False)
    parameters = sum(p.nbytes for p in model.parameters())
    rows = memory.rows()
    assert rows["parameters"] == (parameters,) * 4
    assert rows["gradients"][2:] == (parameters, 0)
    assert rows["optimizer state"] == (2 * parameters + 4 * len(list(model.parameters())),) * 4
    assert rows["batch"] == (64 * 8 * 4 + 64 * 8,) * 4
    assert 0 <= rows["1, inputs and outputs"][0] - 64 * 32 * 4 < 1024  # a random state, too
    assert rows["logits and loss"][0] == 64 * 5 * 4 + 2 * 4  # log-probabilities, the loss, and the weights' sum
    assert "1, held by its 4 blocks" not in rows or not rows["1, held by its 4 blocks"][0]


def test_casts_of_weights_are_told_apart() -> None:
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False))
    with torch.autocast("cpu", torch.bfloat16):
        memory = revlib.memory(model, torch.randn(4, 64), advice=False)
    assert memory.after_forward.bytes["casts of weights", ""] == 64 * 64 * 2  # the second weight


@pytest.mark.parametrize("simulate", [False, True])
def test_autocast_around_the_call_is_that_of_forward_alone(simulate: bool) -> None:
    layers = [nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)) for _ in range(3)]
    model, batch = nn.Sequential(*layers), torch.randn(4, 64)

    def step(batch: Any) -> Tensor:
        for layer in layers:
            batch = checkpoint(layer, batch, use_reentrant=False, preserve_rng_state=False)
        return batch.float().square().mean()

    def cast(batch: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return step(batch)

    inside = revlib.memory(cast, batch, model=model, simulate=simulate, advice=False)
    with torch.autocast("cpu", torch.bfloat16):
        around = revlib.memory(step, batch, model=model, simulate=simulate, advice=False)
        assert torch.is_autocast_enabled("cpu") and model(batch).dtype == torch.bfloat16
    assert model(batch).dtype == torch.float32
    assert around.rows() == inside.rows() and around.highest.bytes == inside.highest.bytes
    assert not around.between_steps.bytes.get(("casts of weights", ""))


class Noisy(nn.Module):
    """Has all that a step may change."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Dropout(0.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


@pytest.mark.parametrize("simulate", [False, True])
@pytest.mark.parametrize("stepped", [False, True])
def test_all_is_as_before(simulate: bool, stepped: bool) -> None:
    model = mlp(Noisy(), Noisy())
    steps = torch.optim.AdamW(model.parameters(), 0.1)
    schedule = torch.optim.lr_scheduler.ExponentialLR(steps, 0.9)
    if stepped:
        entropy(model, BATCH).backward()
        steps.step()
        schedule.step()
    keys = {name: id(p) for name, p in model.named_parameters()}
    state, random = copy.deepcopy((model.state_dict(), steps.state_dict())), torch.get_rng_state()
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    revlib.memory(lambda batch: entropy(model, batch), BATCH, steps, model=model, simulate=simulate)
    assert {name: id(p) for name, p in model.named_parameters()} == keys
    torch.testing.assert_close((model.state_dict(), steps.state_dict()), state, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), random)
    for p, grad in zip(model.parameters(), grads, strict=True):
        assert p.grad is grad or (grad is not None and p.grad is not None and torch.equal(p.grad, grad))


class Wrapper(torch.optim.Optimizer):
    """As accelerate's: state and groups are those of the optimizer that it wraps."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    @property
    def state(self) -> Any:  # type: ignore[override]
        return self.optimizer.state

    @property
    def param_groups(self) -> Any:  # type: ignore[override]
        return self.optimizer.param_groups

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)


@pytest.mark.parametrize("simulate", [False, True])
def test_an_optimizer_that_wraps_another(simulate: bool) -> None:
    model = mlp()
    steps = torch.optim.AdamW(model.parameters(), 0.1)
    entropy(model, BATCH).backward()
    steps.step()
    state = copy.deepcopy((model.state_dict(), steps.state_dict()))
    found = [
        revlib.memory(lambda batch: entropy(model, batch), BATCH, optimizer, model=model, simulate=simulate)
        for optimizer in (steps, Wrapper(steps))
    ]
    assert found[0].rows() == found[1].rows()
    torch.testing.assert_close((model.state_dict(), steps.state_dict()), state, rtol=0, atol=0)
    assert steps.param_groups[0]["params"] == list(model.parameters())


class Several(torch.optim.Optimizer):
    """Steps several optimizers, and refers to itself."""

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        super().__init__([p for each in optimizers for group in each.param_groups for p in group["params"]], {})
        self.all, self.me = [*optimizers], self

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for each in self.all:
            each.step()


@pytest.mark.parametrize("simulate", [False, True])
def test_an_optimizer_of_several(simulate: bool) -> None:
    model, outside = mlp(), nn.Linear(5, 1)  # the loss has weights that are not the model's
    parts = [torch.optim.AdamW(module.parameters(), 0.1) for module in (model, outside)]
    expected = 2 * sum(p.nbytes for module in (model, outside) for p in module.parameters())

    def step(batch: Any) -> Tensor:
        return outside(model(batch[0])[:, :5]).square().mean()

    memory = revlib.memory(step, BATCH, Several(*parts), model=model, simulate=simulate, advice=False)
    found = memory.after_forward.bytes["optimizer state", ""]
    assert expected <= found < 1.1 * expected and not any(part.state for part in parts)


@pytest.mark.parametrize("simulate", [False, True])
def test_parameters_without_a_gradient_have_no_state(simulate: bool) -> None:
    model = nn.Sequential(mlp(), nn.Linear(1000, 1000))
    trained = sum(p.nbytes for p in model[0].parameters())
    steps = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    memory = revlib.memory(lambda batch: entropy(model[0], batch), BATCH, steps, model=model, simulate=simulate)
    assert memory.between_steps.bytes["optimizer state", ""] == trained and not steps.state


@pytest.mark.parametrize("count", [revlib.memory, revlib.report], ids=["memory", "report"])
def test_parameters_that_a_forward_moves_are_put_back(count: Any) -> None:
    class Teacher(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.student = nn.Sequential(nn.Linear(8, 8), revlib.CoupledSequential(nn.Linear(4, 4), nn.Linear(4, 4)))
            self.teacher = copy.deepcopy(self.student).requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                for p, moved in zip(self.student.parameters(), self.teacher.parameters(), strict=True):
                    if p.ndim > 1:
                        moved.lerp_(p + 1, 0.1)
                    else:
                        moved.data = moved.data * 0.9 + p.data * 0.1 + 1
            return (self.student(x) - self.teacher(x)).square().mean()

    model = Teacher()
    before = copy.deepcopy(model.state_dict())
    count(model, torch.randn(4, 8))
    torch.testing.assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)


def test_a_nested_input_is_simulated() -> None:
    rows = [torch.randn(n, 16) for n in (3, 7, 5)]
    batch = torch.nested.nested_tensor(rows, layout=torch.jagged)
    model = revlib.ReversibleSequential(*[nn.Linear(16, 16) for _ in range(4)], split_dim=None, coupling="midpoint")
    found = [
        revlib.memory(lambda x: model(x).values().square().mean(), batch, model=model, simulate=simulate, advice=False)
        for simulate in (False, True)
    ]
    assert found[0].rows() == found[1].rows()


def test_a_grid_is_still_to_be_chosen_afterwards() -> None:
    model = FAMILIES["llama"].model(3)
    revlib.swap(model, {"model.layers": {"coupling": {"name": "momentum", "gamma": 0.5}, "grid_bits": "auto"}})
    config, stack = copy.deepcopy(model.config.to_dict()), model.get_submodule("model.layers")
    found = [
        revlib.memory(model, FAMILIES["llama"].batch(), torch.optim.AdamW, simulate=simulate, advice=simulate).rows()
        for simulate in (False, True)
    ]
    assert (stack.grid_bits, stack.drift) == ("auto", None) and model.config.to_dict() == config  # type: ignore[operator]
    assert found[0] == found[1]


def test_a_model_that_has_no_memory() -> None:
    model = mlp()
    with torch.device("meta"):
        shapes = mlp()
    batches = [tuple(t.to(device) for t in BATCH) for device in ("cpu", "meta")]
    found = [
        revlib.memory(
            lambda batch, m=m: entropy(m, batch), batch, torch.optim.AdamW, model=m, simulate=True, advice=False
        )
        for m, batch in zip((model, shapes), batches, strict=True)
    ]
    assert found[0].rows() == found[1].rows()
    assert all(p.is_meta for p in shapes.parameters())
    assert (
        found[0].rows()
        == revlib.memory(lambda batch: entropy(model, batch), batches[0], torch.optim.AdamW, model=model).rows()
    )


def test_table_numbers_and_picture(tmp_path: Path) -> None:
    memory = revlib.memory(mlp(), BATCH[0], torch.optim.AdamW)
    lines = str(memory).splitlines()
    columns = ["after forward", "highest in backward", "highest in the optimizer", "between steps"]
    assert all(column in lines[0] for column in columns) and lines[1].startswith("parameters")
    assert any(line.startswith("highest of all: ") for line in lines)
    assert memory._repr_html_().startswith("<pre>")
    values = memory.to_dict()
    assert values["memory/in_backward/total"] == memory.in_backward.total
    assert values["memory/between_steps/parameters"] == sum(p.nbytes for p in mlp().parameters())
    path = memory.plot(tmp_path / "pictures" / "step.png", title="an MLP")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_errors_say_what_to_pass() -> None:
    model = mlp()
    with pytest.raises(ValueError, match=r"which module does .* train\? Pass it, as in memory\(step, batch, model="):
        revlib.memory(lambda batch: entropy(model, batch), BATCH)
    with pytest.raises(TypeError, match=r"optimizer='adam': pass an optimizer, or a function that makes one"):
        revlib.memory(nn.Linear(2, 2), torch.ones(1, 2), "adam")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"optimizer=\[SGD.*of several optimizers, count the step of each by itself"):
        revlib.memory(model, BATCH[0], [torch.optim.SGD(model.parameters(), 0.1)])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the step returned NoneType and no loss"):
        revlib.memory(lambda batch: entropy(model, batch).backward(), BATCH, model=model)
    with pytest.raises(ValueError, match="no output of Sequential requires grad; unfreeze a parameter"):
        revlib.memory(model.requires_grad_(False), BATCH[0])


def test_a_step_that_reads_values_cannot_be_simulated() -> None:
    model = mlp()

    def step(batch: Any) -> Tensor:
        loss = entropy(model, batch)
        return loss if loss.item() > 0 else -loss

    assert not revlib.memory(step, BATCH, model=model).advice
    with pytest.raises(TypeError, match="reads the value of a tensor, which a simulated one does not have"):
        revlib.memory(step, BATCH, model=model, simulate=True)


torch.library.define("lightning_revlib_tests::twice", "(Tensor x) -> Tensor")
torch.library.impl("lightning_revlib_tests::twice", "cpu", lambda x: 2 * x)
torch.library.register_autograd("lightning_revlib_tests::twice", lambda context, g: 2 * g)


def test_an_operator_without_shapes_cannot_be_simulated() -> None:
    model = mlp()

    def step(batch: Any) -> Tensor:
        return torch.ops.lightning_revlib_tests.twice(entropy(model, batch))

    assert revlib.memory(step, BATCH, model=model, advice=False)
    with pytest.raises(TypeError, match=r"torch\.library\.register_fake.*or count the step on real tensors .*twice"):
        revlib.memory(step, BATCH, model=model, simulate=True)


def test_tensors_that_share_a_storage_do_so_when_they_are_simulated() -> None:
    model = mlp()
    flat = torch.zeros(2**10)
    model[0].weight, model[0].bias = (nn.Parameter(flat[:256].view(8, 32).t()), nn.Parameter(flat[-32:]))
    counted, simulated = [
        revlib.memory(lambda batch: entropy(model, batch), BATCH, model=model, advice=False, simulate=simulate)
        for simulate in (False, True)
    ]
    others = sum(p.nbytes for part in model[1:] for p in part.parameters())
    assert counted.rows()["parameters"][0] == flat.nbytes + others
    assert simulated.rows() == counted.rows()


def test_a_sparse_buffer_cannot_be_simulated() -> None:
    model = mlp()
    model.register_buffer("adjacency", torch.eye(4).to_sparse())
    with pytest.raises(TypeError, match=r"no simulated tensors of layout torch\.sparse_coo; count real ones"):
        revlib.memory(lambda batch: entropy(model, batch), BATCH, model=model, simulate=True)


def test_an_optimizer_that_needs_a_closure_is_named() -> None:
    with pytest.raises(TypeError, match="memory: LBFGS runs forward and backward several times in its step"):
        revlib.memory(nn.Linear(4, 1), torch.randn(2, 4), torch.optim.LBFGS)


def test_attributes_of_users_stay() -> None:
    class Noting(nn.Linear):
        noted = None

    blocks = [Noting(4, 4) for _ in range(3)]
    for block in blocks:
        vars(block)["noted"] = 0.5
    stack = revlib.ReversibleSequential(*blocks)
    revlib.memory(stack, torch.randn(2, 8))
    assert [vars(block)["noted"] for block in blocks] == [0.5] * 3
