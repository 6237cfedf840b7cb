"""Evaluating and restored models leave for elsewhere, and adapters train on a frozen base."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_revlib as revlib


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.stack = nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        return self.stack(self.encoder(self.embed(x)).mean(1))


TARGETS: dict[str, Any] = {
    "encoder.layers": {"coupling": {"name": "momentum", "gamma": 0.3}, "residual": True},
    "stack": {"coupling": "additive"},
}


def swapped() -> nn.Module:
    model = Classifier()
    revlib.swap(model, TARGETS)
    return model.eval()


@pytest.mark.parametrize("restore", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_export(grad: bool, restore: bool) -> None:
    model, x = swapped(), torch.randn(2, 5, 8)
    if restore:
        model.stack = nn.Identity()
        revlib.restore(model)
    expected = model(x)
    with torch.set_grad_enabled(grad):
        program = torch.export.export(model, (x,))
    assert torch.allclose(program.module()(x), expected, atol=1e-6)
    assert set(program.state_dict) == set(model.state_dict())


def test_onnx(tmp_path: Any) -> None:
    pytest.importorskip("onnxscript")
    reference = pytest.importorskip("onnx.reference")
    model, x = swapped(), torch.randn(2, 5, 8)
    torch.onnx.export(model, (x,), tmp_path / "model.onnx", dynamo=True, verbose=False)
    (y,) = reference.ReferenceEvaluator(str(tmp_path / "model.onnx")).run(None, {"x": x.numpy()})
    assert torch.allclose(torch.from_numpy(y), model(x), atol=1e-5)


class LoRA(nn.Module):
    """W x + B A x with W frozen. https://arxiv.org/abs/2106.09685"""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base, self.dropout = base.requires_grad_(False), nn.Dropout(0.1)
        self.A = nn.Parameter(torch.randn(rank, base.in_features))
        self.B = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.dropout(x) @ self.A.T @ self.B.T


@pytest.mark.parametrize("after", [False, True])
def test_adapters_on_a_frozen_base(after: bool) -> None:
    model = Classifier()
    if not after:
        revlib.swap(model, TARGETS)
    model.requires_grad_(False)
    for layer in model.encoder.layers:
        layer.linear1, layer.linear2 = LoRA(layer.linear1), LoRA(layer.linear2)
    if after:
        revlib.swap(model, TARGETS)
    model.train()
    twin = copy.deepcopy(model)
    revlib.swap(twin, {path: {"store_last": 2} for path in TARGETS})
    x = torch.randn(4, 5, 8)
    for each in (model, twin):
        optimizer = torch.optim.SGD([p for p in each.parameters() if p.requires_grad], 0.1)
        torch.manual_seed(1)
        for _ in range(4):
            optimizer.zero_grad()
            each(x).square().mean().backward()
            optimizer.step()
    assert len([p for p in model.parameters() if p.grad is not None]) == 8
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("grad", [False, True])
def test_trace(grad: bool) -> None:
    """TensorBoardLogger(log_graph=True) traces with gradients on, and checks by a trace without."""
    model, x = swapped(), torch.randn(2, 5, 8)
    expected = model(x)
    torch.backends.mha.set_fastpath_enabled(False)  # which makes a transformer's two traces differ
    try:
        with torch.set_grad_enabled(grad):
            traced = torch.jit.trace(model, (x,))
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    assert torch.allclose(traced(x), expected, atol=1e-6)
    model(x).sum().backward()
    assert model.stack.drift is not None  # reversible as before
