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
import sys, torch, transformers, lightning_revlib as revlib
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
print(revlib.swap(model))
ids = torch.load(sys.argv[1] + "/ids.pt")
with torch.no_grad():
    logits = model(input_ids=ids).logits
torch.save((logits, model.generate(ids, max_new_tokens=4, do_sample=False)), sys.argv[1] + "/out.pt")
"""


@pytest.mark.parametrize("options", TARGETS, ids=str)
def test_saved_and_swapped_again_in_another_process(options: dict[str, Any], tmp_path: Path) -> None:
    model: Any = make("Llama").float().eval()
    revlib.swap(model, {"model.layers": options})
    ids = inputs()[0]
    with torch.no_grad():
        model(input_ids=ids)  # chooses the grid
        logits = model(input_ids=ids).logits
    words = model.generate(ids, max_new_tokens=4, do_sample=False)
    model.save_pretrained(tmp_path)
    torch.save(ids, tmp_path / "ids.pt")
    saved = json.loads((tmp_path / "config.json").read_text())["reversible_targets"]["model.layers"]
    assert saved.get("grid_bits") == model.model.layers.grid_bits != "auto"
    done = subprocess.run([sys.executable, "-c", LOADED, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['model.layers']"
    again = torch.load(tmp_path / "out.pt")
    assert torch.equal(again[0], logits)
    assert torch.equal(again[1], words)


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
