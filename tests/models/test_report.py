from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import lightning_revlib as revlib
from tests.models import test_gpt2, test_llama

transformers = pytest.importorskip("transformers")
BRANCHES = {
    "transformer.h": [["ln_1", "attn"], ["ln_2", "mlp"]],
    "model.layers": [["input_layernorm", "self_attn"], ["post_attention_layernorm", "mlp"]],
}


@pytest.mark.parametrize("family", [test_gpt2.GPT2, test_llama.LLAMA], ids=["GPT-2", "Llama"])
def test_branches_are_found_and_the_function_kept(family: Any) -> None:
    model, batch = family.model(3).eval(), family.batch()
    expected = model(**batch).loss
    report = revlib.report(model, **batch)
    rows = {row.name: row for row in report.candidates}
    assert not report.untried
    assert rows["midpoint, by branches"].targets[family.path]["branches"] == BRANCHES[family.path]
    for way in ("", ", by branches"):
        exact = [rows[f"exact momentum 2^-{k}{way}"] for k in range(1, 7)]
        assert [row.kept_bits for row in exact] == [1, 2, 3, 4, 5, 6]
        assert [row.drift for row in exact if row.costs] == [0]
    swapped = copy.deepcopy(model)
    revlib.swap(swapped, report.best["the same function"].targets)
    torch.testing.assert_close(swapped(**batch).loss, expected)


@pytest.mark.parametrize("noted", [None, {"transformer.h": {"coupling": "midpoint", "residual": True}}])
def test_configs_are_as_before(noted: Any) -> None:
    model, batch = test_gpt2.GPT2.model(3), test_gpt2.GPT2.batch()
    if noted is not None:
        model.config.reversible_targets = noted  # as in a model that was saved swapped
    before = copy.deepcopy(model.config.to_dict())
    report = revlib.report(model, **batch)
    assert model.config.to_dict() == before and bool(report.candidates) == (noted is None)


def test_a_mixture_of_experts_is_given_the_grid() -> None:
    config = transformers.MixtralConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, max_position_embeddings=32, experts_implementation="eager",
    )  # fmt: skip
    model, batch = transformers.MixtralForCausalLM(config), test_gpt2.GPT2.batch()
    report = revlib.report(model, **batch)
    best = report.best.values()
    assert report.targets["model.layers"]["grid_bits"] == "auto" and report.stacks[0].drift == 0  # type: ignore[index,call-overload]
    assert all(row.kind == "same" or row.targets["model.layers"]["grid_bits"] == "auto" for row in best)
    for row in best:
        revlib.swap(model, row.targets)
        for _ in range(3):
            loss: Tensor = model(**batch).loss
            loss.backward()
        assert loss.isfinite() and not model.model.layers.drift
        revlib.restore(model)
