"""What `memory` advises, for programs in which memory is not saved, and whether a change saves what it says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_revlib as revlib
from tests.models.test_gpt2 import GPT2
from tests.models.test_llama import LLAMA

transformers = pytest.importorskip("transformers")


def llama(vocabulary: int = 50, depth: int = 6) -> Any:
    config = transformers.LlamaConfig(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=64, num_hidden_layers=depth, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).train()


def batch(vocabulary: int = 50) -> dict[str, Any]:
    ids = torch.randint(0, vocabulary, (2, 512))
    return {"input_ids": ids, "labels": ids, "use_cache": False}


def test_a_container_to_swap_saves_what_it_says() -> None:
    model, data = llama(), batch()
    memory = revlib.memory(model, data, torch.optim.AdamW)
    best = memory.advice[0]
    assert "model.layers" in best.change and best.line.startswith("lightning_revlib.swap(model, {'model.layers'")
    exec(best.line, {"lightning_revlib": revlib, "model": model})
    after = revlib.memory(model, data, torch.optim.AdamW, advice=False)
    assert memory.highest.total - after.highest.total == best.saved


@pytest.mark.parametrize("options", [{"treatments": ["store"] * 6}, {"store_last": 3}, {"memory_budget": 0.8}])
def test_blocks_of_a_swapped_stack_that_are_not_run_reversibly(options: dict[str, Any]) -> None:
    blocks = [nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16)) for _ in range(6)]
    model, data = nn.Sequential(nn.Linear(8, 32), revlib.ReversibleSequential(*blocks, **options)), torch.randn(256, 8)
    memory = revlib.memory(model, data, torch.optim.AdamW)
    best = next(each for each in memory.advice if each.change.startswith("run all blocks of 1 reversibly"))
    exec(best.line, {"lightning_revlib": revlib, "model": model})
    after = revlib.memory(model, data, torch.optim.AdamW)
    assert memory.highest.total - after.highest.total == best.saved
    assert not any("reversibly" in each.change for each in after.advice)


def test_logits_that_dominate_a_swapped_model() -> None:
    """The first stranger: swapped the stack, and the logits are what the step holds."""
    model, data = llama(8192, depth=2), batch(8192)
    revlib.swap(model, {"model.layers": {"coupling": "midpoint", "residual": True}})
    memory = revlib.memory(model, data, torch.optim.AdamW)
    best = memory.advice[0]
    assert best.line == "lightning_revlib.chunk_loss(model)"
    revlib.chunk_loss(model)
    after = revlib.memory(model, data, torch.optim.AdamW, advice=False)
    assert memory.highest.total - after.highest.total == best.saved > 0.5 * memory.highest.total


def test_hidden_states_that_a_loss_keeps() -> None:
    """The second stranger: swapped the stack, and computes a loss of all hidden states."""
    model, data = llama(depth=8), batch()
    revlib.swap(model, {"model.layers": {"coupling": "midpoint", "residual": True}})

    def step(data: Any, hidden: bool = True) -> Tensor:
        out = model(**data, output_hidden_states=hidden)
        return out.loss + (sum(h.square().mean() for h in out.hidden_states) if hidden else 0)

    memory = revlib.memory(step, data, model=model)
    found = [each for each in memory.advice if "hidden states" in each.change]
    assert found and "output_hidden_states=False" in found[0].line
    plain = revlib.memory(lambda data: step(data, hidden=False), data, model=model, advice=False)
    assert 0.8 < found[0].saved / (memory.after_forward.total - plain.after_forward.total) <= 1


def test_a_metric_that_keeps_the_graph() -> None:
    """The third stranger: keeps outputs of each step, and with them what made them."""
    model, data = llama(512), batch(512)
    kept = []

    def step(data: Any) -> Tensor:
        out = model(**data)
        kept.append(out.logits)
        return out.loss

    memory = revlib.memory(step, data, model=model)
    found = [each for each in memory.advice if "do not keep tensors" in each.change]
    assert found and "detach()" in found[0].line
    kept.clear()
    without = revlib.memory(lambda data: model(**data).loss, data, model=model, advice=False)
    assert found[0].saved == memory.between_steps.total - without.between_steps.total


def test_gradients_of_which_the_optimizer_needs_one_at_a_time() -> None:
    model = nn.Sequential(*[nn.Linear(256, 256) for _ in range(8)])
    memory = revlib.memory(model, torch.randn(2, 256), torch.optim.AdamW)
    best = memory.advice[0]
    assert "optimizer_in_backward=True" in best.line
    assert best.saved > 0.7 * sum(p.nbytes for p in model.parameters())


def test_half_a_batch() -> None:
    model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(8)])
    data = torch.randn(4096, 8)
    memory = revlib.memory(model, data)
    best = memory.advice[0]
    assert "accumulate_grad_batches=2" in best.line
    half = revlib.memory(model, data[:2048].clone(), advice=False)
    assert abs(half.highest.total - (memory.highest.total - best.saved)) < 0.6 * data.nbytes


@pytest.mark.parametrize("family", [GPT2, LLAMA], ids=["GPT-2", "Llama"])
def test_advice_leaves_the_model_as_it_was(family: Any) -> None:
    model, data = family.model(4), family.batch()
    classes = [type(m) for m in model.modules()]
    assert revlib.memory(model, data, torch.optim.SGD).advice
    assert [type(m) for m in model.modules()] == classes
    assert all("forward" not in vars(m) for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())


def test_advice_leaves_a_budget_as_it_was() -> None:
    """One that counts the loss by chunks, which is advised, would follow another plan."""
    plans = []
    for advice in (False, True):
        torch.manual_seed(0)
        model, data = llama(2000, depth=4), batch(2000)
        momentum = {"coupling": {"name": "momentum", "gamma": 0.5}, "residual": True, "memory_budget": 0.8}
        revlib.swap(model, {"model.layers": momentum})
        found = revlib.memory(model, data, torch.optim.SGD, advice=advice)
        assert not advice or any("chunk_loss" in each.line for each in found.advice)
        model(**data).loss.backward()
        plans.append(model.model.layers.plan.treatments)
        revlib.chunk_loss(model)
        revlib.report(model, **data)  # the original has no budget, and a fraction is of the stacks and the loss
    assert plans[0] == plans[1]


class Noting(torch.optim.Optimizer):
    """Keeps momentum in a dict of its own, notes its steps in a list, and counts them in its groups."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})
        self.momentum, self.steps = dict[Any, Tensor](), list[int]()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["count"] = group.get("count", 0) + 1
            for p in group["params"]:
                p.sub_(self.momentum.setdefault(p, torch.zeros_like(p)).mul_(0.9).add_(p.grad), alpha=group["lr"])
        self.steps.append(group["count"])


@pytest.mark.parametrize("has_run", [False, True])
def test_an_optimizer_with_containers_of_its_own(has_run: bool) -> None:
    model, data = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), torch.randn(4, 8)
    optimizer = Noting(model.parameters())
    if has_run:
        model(data).sum().backward()
        optimizer.step()
    momentum = {p: t.clone() for p, t in optimizer.momentum.items()}
    groups, weights = (
        [dict(group) for group in optimizer.param_groups],
        [p.detach().clone() for p in model.parameters()],
    )
    for simulate in (False, True):
        revlib.memory(model, data, optimizer, simulate=simulate)
    assert optimizer.param_groups == groups and optimizer.steps == [1] * has_run
    assert optimizer.momentum.keys() == momentum.keys()
    assert all(torch.equal(optimizer.momentum[p], t) for p, t in momentum.items())
    assert all(map(torch.equal, model.parameters(), weights))


def test_a_grid_and_a_budget_that_a_first_step_would_choose() -> None:
    totals = []
    for grid in (12, "auto"):
        model, data = llama(depth=4), batch()
        momentum = {"coupling": {"name": "momentum", "gamma": 0.5}, "residual": True, "memory_budget": 0.8}
        revlib.swap(model, {"model.layers": {**momentum, "grid_bits": grid}})
        totals.append(revlib.memory(model, data, torch.optim.SGD, advice=False).highest.total)
    assert totals[0] == totals[1]
