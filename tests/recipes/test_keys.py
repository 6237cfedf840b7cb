"""State-dict keys of all recipes, which are equal and in order before, during and after a reversible run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
from hydra.utils import instantiate

import lightning_revlib as revlib
from lightning_revlib.nn.convert.swap import stacks
from tests.conf.test_config import configuration
from tests.recipes import standin

RECIPES = sorted(path.stem for path in (Path(__file__).parents[2] / "conf/recipe").glob("*.yaml"))


class Watch(L.Callback):
    def __init__(self) -> None:
        self.keys: list[list[str]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: L.LightningModule, *_: Any) -> None:
        assert stacks(pl_module)
        self.keys.append(list(pl_module.state_dict()))

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        self.keys.append(list(checkpoint["state_dict"]))


@pytest.mark.parametrize("recipe", RECIPES)
def test_keys_before_during_and_after(recipe: str, tmp_path: Path) -> None:
    pretrained = [f"recipe.model={standin.language_model(tmp_path / 'model')}", "data.length=16", "data.batch_size=2"]
    cfg = configuration("train", f"recipe={recipe}", *(pretrained if recipe == "finetune" else ["depth=2"]))
    data = instantiate(cfg.data)
    module = instantiate(cfg.recipe, **data.model_arguments)
    before, watch = list(module.state_dict()), Watch()
    run = L.Trainer(
        accelerator="cpu",
        strategy=revlib.ReversibleStrategy(restore=True),
        max_steps=2,
        limit_val_batches=1,
        callbacks=[watch],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=tmp_path,
    )
    run.fit(module, data)
    run.save_checkpoint(tmp_path / "last.ckpt")
    assert len(watch.keys) == 3 and all(keys == before for keys in watch.keys)
    assert list(module.state_dict()) == before and not stacks(module)
