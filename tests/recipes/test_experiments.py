"""Every experiment runs: two steps on small data of the right shape, validation, test and prediction."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from lightning_revlib import conf
from lightning_revlib.cli.main import main
from tests.recipes import standin

EXPERIMENTS = sorted(path.stem for path in (Path(conf.__file__).parent / "experiment").glob("*.yaml"))
# small data in place of those that are not bundled, in a folder
STANDIN = {
    "irevnet_fashion_mnist": lambda folder: [f"data.root={standin.idx(folder)}", "data.validation=10"],
    "irevnet_cifar10": lambda folder: [f"data.root={standin.cifar(folder)}", "data.validation=10"],
    "momentumnet_cifar10": lambda folder: [f"data.root={standin.cifar(folder)}", "data.validation=10"],
    "momentumnet_cifar100": lambda folder: [f"data.root={standin.cifar(folder, 100)}", "data.validation=100"],
    "reformer_enwik8": lambda folder: [f"data.path={standin.large(folder, 10**8)}"],
    "reformer_imagenet64": lambda folder: [f"data.folder={standin.arrays(folder, 16)}", "data.size=16"],
    "smollm2_topics": lambda folder: [f"recipe.model={standin.language_model(folder)}", "data.length=64"],
    "irevnet_imagenet": lambda folder: [
        f"data.root={standin.images(folder)}",
        "data.validation=4",
        "data.num_workers=0",
    ],
}
SMALL = {  # published sizes are instantiated in tests/conf, and run by the slow tests below
    "irevnet_cifar10": ["depth=1"],
    "momentumnet_cifar10": ["depth=[1,2,1,2]", "recipe.width=8", "recipe.wide=true"],
    "momentumnet_cifar100": ["depth=[1,2,1,2]", "recipe.width=8", "recipe.wide=true"],
    "irevnet_imagenet": ["depth=1", "data.batch_size=2", "data.size=64", "recipe.bottleneck=16"],
    "reformer_duplication": ["data.length=256", "data.held_out=4"],
    "reformer_enwik8": [
        "depth=3", "data.length=600", "data.batch_size=1", "trainer.val_check_interval=1", "recipe.dim=96",
        "recipe.ff=64", "recipe.axial_dims=[32,64]",
    ],
    "reformer_imagenet64": [
        "depth=1", "data.batch_size=1", "trainer.val_check_interval=1", "recipe.dim=96", "recipe.ff=64",
        "recipe.axial_dims=[32,32,32]",
    ],
}  # fmt: skip
SHORT = [
    "trainer.max_epochs=1", "+trainer.limit_train_batches=2", "+trainer.limit_val_batches=1",
    "+trainer.limit_test_batches=1", "data.batch_size=4", "logger=csv", "hydra.run.dir=run",
]  # fmt: skip


def two_steps(experiment, tmp_path, monkeypatch, *more):
    monkeypatch.chdir(tmp_path)
    data = STANDIN.get(experiment, lambda folder: [])(tmp_path / "data")
    assert main(["train", f"experiment={experiment}", *data, *SHORT, *more]) == 0
    with (tmp_path / "run/csv/metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert any(row["test/loss"] for row in rows) and max(int(row["step"]) for row in rows) == 2
    for checkpoint in tmp_path.glob("run/checkpoints/best.ckpt"):
        short = ["+trainer.limit_predict_batches=1", "count=4"]  # a language model writes token by token
        assert main(["predict", f"ckpt_path={checkpoint}", *short]) == 0


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_two_steps(experiment, tmp_path, monkeypatch):
    two_steps(experiment, tmp_path, monkeypatch, *SMALL.get(experiment, []))


@pytest.mark.slow
@pytest.mark.parametrize("experiment", SMALL)
def test_two_steps_as_deep_as_published(experiment, tmp_path, monkeypatch):
    two_steps(experiment, tmp_path, monkeypatch, "~callbacks.checkpoint", "+trainer.enable_checkpointing=false")


def test_the_injective_network_for_imagenet(tmp_path, monkeypatch):
    wider = ["recipe.channels=[32,128,512,2048]", "depth=1", "data.size=64", "data.batch_size=2"]
    wider += ["recipe.bottleneck=16"]
    two_steps("irevnet_imagenet", tmp_path, monkeypatch, *wider)
