from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.models.family import COUPLINGS, Family, check_gradients, check_memory, check_training

transformers = pytest.importorskip("transformers")


def build(depth: int) -> Any:
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=depth, num_attention_heads=2,
        max_position_embeddings=32, num_labels=3,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def batch() -> Any:
    mask = torch.ones(8, 12, dtype=torch.long)
    mask[0, 7:] = 0
    return {"input_ids": torch.randint(1, 50, (8, 12)), "labels": torch.arange(8) % 3, "attention_mask": mask}


BERT = Family(build, batch, lambda model, batch: model(**batch).loss, "bert.encoder.layer", {"residual": True})


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_gradients(coupling: str) -> None:
    check_gradients(BERT, coupling)


def test_memory() -> None:
    check_memory(BERT)


def test_training(tmp_path: Any) -> None:
    check_training(BERT, tmp_path)
