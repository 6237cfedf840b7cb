"""Layers whose further outputs are arguments of the layers after them: T5's position biases, which need grad."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.models.family import COUPLINGS, Family, check_gradients, check_training

transformers = pytest.importorskip("transformers")


def build(depth: int) -> Any:
    config = transformers.T5Config(
        vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=depth, num_heads=2, decoder_start_token_id=0,
        pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


def batch() -> Any:
    ids, mask = torch.randint(2, 50, (4, 10)), torch.ones(4, 10, dtype=torch.long)
    mask[0, 7:] = 0
    return {"input_ids": ids, "labels": ids[:, :6].contiguous(), "attention_mask": mask, "use_cache": False}


FAMILIES = {
    path: Family(build, batch, lambda model, batch: model(**batch).loss, path, {"residual": True})
    for path in ("encoder.block", "decoder.block")
}


@pytest.mark.parametrize("coupling", COUPLINGS)
@pytest.mark.parametrize("path", FAMILIES)
def test_gradients(path: str, coupling: str) -> None:
    check_gradients(FAMILIES[path], coupling)


def test_training_then_generation(tmp_path: Any) -> None:
    model = check_training(FAMILIES["decoder.block"], tmp_path).eval()
    settings = {"max_new_tokens": 5, "do_sample": False}
    ids = torch.randint(2, 50, (2, 6))
    cached = model.generate(ids, use_cache=True, **settings)  # type: ignore[operator]
    assert torch.equal(cached, model.generate(ids, use_cache=False, **settings))  # type: ignore[operator]
