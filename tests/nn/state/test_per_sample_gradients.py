"""Gradients by sample, as of Opacus: forward hooks keep activations, and backward hooks take as many."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_revlib as revlib


def add_hooks(model: nn.Module) -> None:
    """Have linear layers put a gradient for each sample into `grad_sample` of their weights."""
    kept: dict[nn.Module, list[Tensor]] = {}

    def keep(layer: nn.Module, inputs: Any, output: Tensor) -> None:
        kept.setdefault(layer, []).append(inputs[0].detach())

    def take(layer: nn.Module, grad_input: Any, grad_output: Any) -> None:
        (x,) = kept.pop(layer)
        layer.weight.grad_sample = torch.einsum("bo,bi->boi", grad_output[0], x)  # type: ignore[union-attr]

    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            layer.weight.grad_sample = None  # type: ignore[attr-defined]
            layer.register_forward_hook(keep)
            layer.register_full_backward_hook(take)


def stack(treatment: str) -> nn.Module:
    blocks = [nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4)) for _ in range(3)]
    return revlib.ReversibleSequential(*blocks, treatments=[treatment] * 3)


@pytest.mark.parametrize("treatment", ["reversible", "checkpoint", "selective"])
def test_a_treatment_that_runs_blocks_again_is_refused(treatment: str) -> None:
    model = stack(treatment)
    model(torch.randn(5, 8)).sum().backward()
    add_hooks(model)
    with pytest.raises(
        RuntimeError, match=r"stack: parameter 'weight' of Linear\(.*name treatments=\['store', \.\.\.\]"
    ):
        model(torch.randn(5, 8))


def test_stored_blocks() -> None:
    model = stack("store")
    add_hooks(model)
    model(torch.randn(5, 8, requires_grad=True)).sum().backward()
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            assert torch.allclose(layer.weight.grad_sample.sum(0), layer.weight.grad)  # type: ignore[arg-type, union-attr]


def test_opacus() -> None:
    opacus = pytest.importorskip("opacus")
    for treatment in ("store", "reversible"):
        model = nn.Sequential(stack(treatment), nn.Linear(8, 1))
        data = torch.utils.data.TensorDataset(torch.randn(8, 8))
        private, optimizer, loader = opacus.PrivacyEngine().make_private(
            module=model, optimizer=torch.optim.SGD(model.parameters(), 0.1), poisson_sampling=False,
            data_loader=torch.utils.data.DataLoader(data, batch_size=4), noise_multiplier=1.0, max_grad_norm=1.0,
        )  # fmt: skip
        if treatment == "reversible":
            with pytest.raises(RuntimeError, match="of Opacus or the like"):
                private(next(iter(loader))[0])
            revlib.restore(private)
        for (x,) in loader:
            optimizer.zero_grad()
            private(x).square().mean().backward()
            optimizer.step()
