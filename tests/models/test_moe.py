"""Mixtures of experts of transformers: router losses, which hooks collect, keep their gradients."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import lightning_revlib as revlib
from tests.models.family import Family, check_gradients, check_memory, check_training

transformers = pytest.importorskip("transformers")
SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "attention_dropout": 0.1,
    "output_router_logits": True,
    "router_aux_loss_coef": 0.5,
    "experts_implementation": "eager",
}


def mixtral(depth: int) -> Any:
    config = transformers.MixtralConfig(**SIZES, num_hidden_layers=depth, num_local_experts=4)
    return transformers.MixtralForCausalLM(config)


def qwen2_moe(depth: int) -> Any:
    config = transformers.Qwen2MoeConfig(
        **SIZES, num_hidden_layers=depth, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
    )  # fmt: skip
    return transformers.Qwen2MoeForCausalLM(config)


def batch() -> Any:
    ids, mask = torch.randint(1, 50, (4, 16)), torch.ones(4, 16, dtype=torch.long)
    mask[0, 10:] = 0
    return {"input_ids": ids, "labels": ids, "attention_mask": mask, "use_cache": False}


FAMILIES = {
    build.__name__: Family(build, batch, lambda model, batch: model(**batch).loss, "model.layers", {"residual": True})
    for build in (mixtral, qwen2_moe)
}
each_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)


@each_family
@pytest.mark.parametrize("coupling", ["momentum", "midpoint", "bdia"])
def test_gradients(family: Family, coupling: str) -> None:
    check_gradients(family, coupling)


@each_family
def test_memory(family: Family) -> None:
    """The routers' logits are outputs, which stay in memory until their loss has been computed backward."""
    check_memory(replace(family, batch=lambda: {**batch(), "output_router_logits": False}))


@each_family
def test_training_then_generation(family: Family, tmp_path: Any) -> None:
    model: Any = check_training(family, tmp_path).eval()
    prompt, mask = torch.randint(1, 50, (2, 5)), torch.ones(2, 5, dtype=torch.long)
    settings = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    cached = model.generate(prompt, use_cache=True, **settings)
    assert torch.equal(cached, model.generate(prompt, use_cache=False, **settings))


@each_family
@pytest.mark.parametrize("coupling", [{"name": "momentum", "gamma": 2.0**-4}, "midpoint"], ids=str)
def test_on_the_grid_gradients_of_the_router_loss_are_equal_to_the_bit(family: Family, coupling: Any) -> None:
    model, data, found = family.model(3), family.batch(), []
    for treatment in ("reversible", "store"):
        options = family.targets(coupling=coupling, grid_bits=16, treatments=[treatment] * 3)
        revlib.swap(model, options)
        torch.manual_seed(1)
        model.zero_grad()
        out = model(**data)
        out.aux_loss.backward()  # the routers' loss alone
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        revlib.restore(model)
    gates = [name for name in found[0] if name.endswith("mlp.gate.weight")]
    assert len(gates) == 3 and all(found[0][name].norm() > 1e-6 for name in gates)
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(grad, found[1][name]) for name, grad in found[0].items())


def test_near_ties_of_a_router_end_with_an_error_that_names_the_grid() -> None:
    model, data = mixtral(4), batch()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.top_k, gate = 1, layer.mlp.gate.weight
            gate[1:] = gate[:1] * (1 + 2**-22)  # the last bit decides
    revlib.swap(model, {"model.layers": {"coupling": "midpoint", "residual": True}})
    message = r"model\.layers\.\d \(MixtralDecoderLayer\) computes(.|\n)*near tie, as in a router, .* grid_bits='auto'"
    with pytest.raises(RuntimeError, match=message):
        model(**data).loss.backward()
    revlib.swap(model, {"model.layers": {"grid_bits": "auto"}})
    for _ in range(3):
        model(**data).loss.backward()
    assert model.model.layers.drift == 0
