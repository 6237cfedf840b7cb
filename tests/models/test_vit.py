from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.models.family import COUPLINGS, Family, check_gradients, check_memory, check_training

transformers = pytest.importorskip("transformers")


def build(depth: int) -> Any:
    config = transformers.ViTConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=depth, num_attention_heads=2, image_size=16,
        patch_size=4, num_labels=3, hidden_dropout_prob=0.1,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config)


def batch() -> Any:
    return {"pixel_values": torch.randn(6, 3, 16, 16), "labels": torch.arange(6) % 3}


def path() -> str:
    model = build(2)
    return next(name for name, m in model.named_modules() if isinstance(m, torch.nn.ModuleList))


VIT = Family(build, batch, lambda model, batch: model(**batch).loss, path(), {"residual": True})


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_gradients(coupling: str) -> None:
    check_gradients(VIT, coupling)


def test_memory() -> None:
    check_memory(VIT)


def test_training(tmp_path: Any) -> None:
    check_training(VIT, tmp_path)
