"""Training steps of models of all kinds at small sizes, and the same steps counted by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from hydra.utils import instantiate
from torch import nn

import lightning_revlib as revlib
from tests.accounting.by_hand import by_hand
from tests.conf.test_config import configuration
from tests.models import test_gpt2, test_llama, test_vit
from tests.recipes import standin

FAMILIES = {"gpt2": test_gpt2.GPT2, "llama": test_llama.LLAMA, "vit": test_vit.VIT}
RECIPES = ["irevnet", "momentumnet", "reformer", "finetune"]
WAYS = ["plain", "checkpointed", "reversible", "budgeted"]


class Program(NamedTuple):
    model: Any
    batch: Any
    path: str | None  # of the container to swap; None for stacks that were built as such

    def run(self, way: str) -> Program:
        """Return the program with its stacks run in one of WAYS."""
        if way == "plain":
            return self
        options: dict[str, Any] = {} if self.path is None else {"coupling": "midpoint", "residual": True}
        for path in revlib.swap(self.model, None if self.path is None else {self.path: options}):
            count = len(self.model.get_submodule(path))
            budget = 0.7 if self.path in [family.path for family in FAMILIES.values()] else "1GiB"
            extra = {"checkpointed": {"treatments": ["checkpoint"] * count}, "budgeted": {"memory_budget": budget}}
            revlib.swap(self.model, {path: extra.get(way, {})})
        return self


def program(name: str, folder: Path) -> Program:
    torch.manual_seed(0)
    if name in FAMILIES:
        family = FAMILIES[name]
        return Program(family.model(3), family.batch(), family.path)
    pretrained = [f"recipe.model={standin.language_model(folder / 'model')}", "data.length=16"]
    cfg = configuration(
        "train", f"recipe={name}", "data.batch_size=2", *(pretrained if name == "finetune" else ["depth=2"])
    )
    data = instantiate(cfg.data)
    data.prepare_data()
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    module = instantiate(cfg.recipe, **data.model_arguments).train()
    return Program(module, batch, "net.model.layers" if name == "finetune" else None)


def optimizer(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, 1e-4, foreach=False)


def check(model: nn.Module, batch: Any) -> None:
    """Assert that the owners add up to what the meter counts, and that fake tensors have the same bytes."""
    steps = optimizer(model.parameters())
    expected = by_hand(model, batch, steps)
    memory = revlib.memory(model, batch, steps, advice=False)
    existing = sum(memory.existing.values())
    assert [sum(each.bytes.values()) - existing for each in memory.moments] == expected
    assert memory.highest.total == existing + max(expected)
    assert [sum(sizes) for sizes in zip(*memory.rows().values(), strict=True)] == [m.total for m in memory.moments]
    fake = revlib.memory(model, batch, steps, simulate=True, advice=False)
    assert fake.rows() == memory.rows()
    assert (fake.highest.bytes, fake.highest.cause) == (memory.highest.bytes, memory.highest.cause)
