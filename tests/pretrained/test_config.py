"""A pretrained model's config knows what was swapped: saved, loaded in another process and swapped again."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lightning_revlib as revlib
from tests.pretrained.test_loss import inputs, make

transformers = pytest.importorskip("transformers")

TARGETS: list[dict[str, Any]] = [
    {"coupling": {"name": "momentum", "gamma": 0.125}, "residual": True, "grid_bits": "auto"},
    {"coupling": ["midpoint", {"name": "leapfrog", "h": 0.5}], "residual": True, "ordinary": 1},
    {
        "coupling": "bdia",
        "grid_bits": 10,
        "branches": [["input_layernorm", "self_attn"], ["post_attention_layernorm", "mlp"]],
    },
]
LOADED = """
import pathlib, sys, torch, transformers, lightning_revlib as revlib
torch.set_num_threads(1)  # as in all tests
for folder in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    assert revlib.swap(model) == ["model.layers"]
    ids = torch.load(folder / "ids.pt")
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    torch.save((logits, model.generate(ids, max_new_tokens=4, do_sample=False)), folder / "out.pt")
"""


def test_saved_and_swapped_again_in_another_process(tmp_path: Path) -> None:
    ids, expected = inputs()[0], {}
    for number, options in enumerate(TARGETS):
        model: Any = make("Llama").float().eval()
        revlib.swap(model, {"model.layers": options})
        folder = tmp_path / str(number)
        with torch.no_grad():
            model(input_ids=ids)  # chooses the grid
            expected[folder] = model(input_ids=ids).logits, model.generate(ids, max_new_tokens=4, do_sample=False)
        model.save_pretrained(folder)
        torch.save(ids, folder / "ids.pt")
        saved = json.loads((folder / "config.json").read_text())["reversible_targets"]["model.layers"]
        assert saved.get("grid_bits") == model.model.layers.grid_bits != "auto"
    subprocess.run([sys.executable, "-c", LOADED, str(tmp_path)], check=True)
    for folder, tensors in expected.items():
        assert all(map(torch.equal, tensors, torch.load(folder / "out.pt")))


def test_a_model_within_a_model_and_a_restored_one() -> None:
    model: Any = make("Llama")
    revlib.swap(model, {"model.layers": "midpoint"})
    config = copy.deepcopy(model.config)
    assert config.reversible_targets == {
        "model.layers": {"coupling": {"name": "midpoint", "h": 0.5}, "split_dim": None}
    }
    revlib.restore(model)
    assert not hasattr(model.config, "reversible_targets")
    outer = nn.ModuleDict({"net": transformers.LlamaForCausalLM(config)})
    assert revlib.swap(outer) == ["net.model.layers"]
    assert outer["net"].model.layers.couplings == (revlib.get_coupling("midpoint"),)  # type: ignore[union-attr]


@pytest.mark.parametrize("saved", ["MaskedLM", "Model"])
@pytest.mark.parametrize("loaded", ["Model", "ForSequenceClassification"])
def test_a_swapped_body_under_another_head(saved: str, loaded: str, tmp_path: Path) -> None:
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
    )
    kinds = {"MaskedLM": transformers.BertForMaskedLM, "Model": transformers.BertModel}
    model = kinds[saved](config)
    revlib.swap(model, {"*encoder.layer": "midpoint"})
    model.save_pretrained(tmp_path)
    other = {**kinds, "ForSequenceClassification": transformers.BertForSequenceClassification}[loaded]
    again = other.from_pretrained(tmp_path)
    assert revlib.swap(again) == [("" if loaded == "Model" else "bert.") + "encoder.layer"]


def test_stacks_of_t5_have_copies_of_its_config(tmp_path: Path) -> None:
    config = transformers.T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2)
    model = transformers.T5ForConditionalGeneration(config)
    revlib.swap(model, {"decoder.block": "midpoint", "encoder.block": "midpoint"})
    model.save_pretrained(tmp_path)
    assert revlib.swap(transformers.T5ForConditionalGeneration.from_pretrained(tmp_path)) == [
        "decoder.block",
        "encoder.block",
    ]
    encoder = transformers.T5EncoderModel.from_pretrained(tmp_path)
    assert revlib.swap(encoder, strict=False) == ["encoder.block"]


def test_a_saved_path_that_a_model_does_not_have() -> None:
    model: Any = make("Llama")
    model.config.reversible_targets = {"blocks": {"coupling": "midpoint"}}
    with pytest.raises(ValueError, match=r"'blocks' was swapped, and the model has no such .*strict=False"):
        revlib.swap(model)
    assert revlib.swap(model, strict=False) == []
