from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import lightning_revlib as revlib
from tests.models.family import COUPLINGS, Family, check_gradients, check_memory, check_training

transformers = pytest.importorskip("transformers")


def build(depth: int) -> Any:
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=depth, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, bos_token_id=0, eos_token_id=0, attention_dropout=0.1,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def batch() -> Any:
    ids, mask = torch.randint(1, 50, (4, 16)), torch.ones(4, 16, dtype=torch.long)
    mask[0, 10:] = 0
    return {"input_ids": ids, "labels": ids, "attention_mask": mask, "use_cache": False}


LLAMA = Family(build, batch, lambda model, batch: model(**batch).loss, "model.layers", {"residual": True})


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_gradients(coupling: str) -> None:
    check_gradients(LLAMA, coupling)


def test_memory() -> None:
    check_memory(LLAMA)


def test_training_then_generation(tmp_path: Any) -> None:
    model = check_training(LLAMA, tmp_path).eval()
    prompt, mask = torch.randint(1, 50, (2, 5)), torch.ones(2, 5, dtype=torch.long)
    settings = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    cached = model.generate(prompt, use_cache=True, **settings)  # type: ignore[operator]
    assert torch.equal(cached, model.generate(prompt, use_cache=False, **settings))  # type: ignore[operator]


def test_attention_and_feed_forward_as_steps_of_their_own() -> None:
    branches = {"branches": [["input_layernorm", "self_attn"], ["post_attention_layernorm", "mlp"]]}
    family = replace(LLAMA, options=branches)
    check_gradients(family, "midpoint")
    model, data = build(3).eval(), batch()
    expected = model(**data).loss
    revlib.swap(model, family.targets(coupling={"name": "momentum", "gamma": 0.0}))
    assert torch.allclose(model(**data).loss, expected)
