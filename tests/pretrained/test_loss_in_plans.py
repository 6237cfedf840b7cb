"""A memory budget counts the loss by chunks, which stands at the peak between forward and backward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from torch import nn

import lightning_revlib as revlib

transformers = pytest.importorskip("transformers")
WORDS, WIDTH, TOKENS = 4096, 32, 256
MOMENTUM = {"coupling": {"name": "momentum", "gamma": 0.5}, "residual": True}


def make(budget: Any, frozen: bool = False) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=WORDS,
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=6,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    model = transformers.LlamaForCausalLM(config).train()
    model.lm_head.weight.requires_grad_(not frozen)
    revlib.swap(model, {"model.layers": {**MOMENTUM, "memory_budget": budget}})
    revlib.chunk_loss(model, tokens=128)
    return model


def step(model: nn.Module, tokens: int = TOKENS) -> tuple[int, torch.Tensor]:
    """Return the peak of a step's activations, and the gradient of a weight."""
    ids = torch.randint(0, WORDS, (1, tokens), generator=torch.Generator().manual_seed(1))
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    with revlib.MemoryMeter() as meter:
        model(input_ids=ids, labels=ids).loss.backward()
    return meter.peak, model.model.layers[0].mlp.up_proj.weight.grad


@pytest.mark.parametrize("frozen", [False, True])
def test_a_step_stays_within_a_budget_that_the_loss_nearly_fills(frozen: bool) -> None:
    model = make("1GiB", frozen)
    step(model)
    plan = model.model.layers.plan
    assert "loss by chunks" in str(plan)
    assert set(plan.treatments["model.layers"]) == {"store"}
    for share in (0.0, 0.3, 0.7):
        model = make(int(plan.minimum + share * (plan.plain - plan.minimum)), frozen)
        _, expected = step(model)
        peak, gradient = step(model)
        outside = 2**16 + 3 * TOKENS * WIDTH * 4  # embeddings, the norm before the head, positions
        outside += 0 if frozen else WORDS * WIDTH * 4  # the gradient that stays
        assert peak <= model.model.layers.plan.limit + outside
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-7)


def test_a_budget_below_what_the_loss_takes_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"memory_budget='1MiB' is .* need at least .* for this input, .* more"):
        step(make("1MiB"))


def test_a_forward_without_labels_is_planned_as_before() -> None:
    model = make("1GiB")
    ids = torch.randint(0, WORDS, (1, 64))
    for _ in range(2):
        model(input_ids=ids).logits.float().mean().backward()
    assert "loss" not in str(model.model.layers.plan)


class Module(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = make("1GiB")

    def training_step(self, batch: torch.Tensor, index: int) -> Any:
        return self.model(input_ids=batch, labels=batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 1e-3)


def test_a_run_that_resumes_follows_the_plan_with_the_loss_from_its_first_step(tmp_path: Path) -> None:
    data = torch.utils.data.DataLoader(torch.randint(0, WORDS, (4, 64)), batch_size=2)
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    quiet["default_root_dir"] = tmp_path
    trainer = lightning.Trainer(max_epochs=1, strategy="reversible", **quiet)
    trainer.fit(Module(), data)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    checkpoint = torch.load(tmp_path / "end.ckpt", weights_only=False)
    assert "loss by chunks" in checkpoint["memory_figures"]

    plans: list[str] = []

    class Watch(lightning.Callback):
        def on_before_backward(self, trainer: Any, module: Any, loss: Any) -> None:
            plans.append(str(module.model.model.layers.plan))

    again = lightning.Trainer(max_epochs=2, callbacks=[Watch()], strategy="reversible", **quiet)
    again.fit(Module(), data, ckpt_path=tmp_path / "end.ckpt", weights_only=False)
    assert plans
    assert all("loss by chunks" in plan for plan in plans)
