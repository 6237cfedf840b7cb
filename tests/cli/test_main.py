"""The command line as a user meets it: runs of one epoch, and one message for each error."""

from __future__ import annotations

import csv
import importlib.util
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
import torch.distributed.checkpoint as dcp

import lightning_revlib as revlib
from lightning_revlib.cli.errors import explain
from lightning_revlib.cli.main import COMMANDS, main
from lightning_revlib.nn import CoupledSequential
from lightning_revlib.recipes.commands.run import few_samples
from lightning_revlib.recipes.data.digits import Digits
from lightning_revlib.recipes.display.panel import checkpoint_word
from lightning_revlib.recipes.models.irevnet import IRevNetModule


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return the folder of a short training."""
    folder = tmp_path_factory.mktemp("revlib")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["train", "trainer.max_epochs=2", "hydra.run.dir=logs/train/runs/one"]) == 0
    return folder / "logs/train/runs/one"


@pytest.fixture
def best(trained):
    return trained / "checkpoints/best.ckpt"


def reconstruction_error(checkpoint):
    """Return the largest relative error over the held-out images."""
    data = Digits()
    data.setup()
    images = data.parts["test"].tensors[0]
    module = IRevNetModule.load_from_checkpoint(checkpoint, weights_only=True).eval()
    with torch.no_grad():
        reconstruction = module.predict_step([images], 0)["reconstruction"]
    return ((reconstruction - images).flatten(1).norm(dim=1) / images.flatten(1).norm(dim=1)).max()


def test_training_leaves_logs_and_checkpoints(trained, best):
    rows = list(csv.DictReader((trained / "csv/metrics.csv").open()))
    names = {"train/loss", "train/acc", "val/loss", "val/acc", "test/acc", "drift/worst", "activation/held_bytes"}
    assert names <= set(rows[0])
    assert list((trained / "tensorboard").glob("events.*"))
    assert best.exists() and (trained / "checkpoints/last.ckpt").exists()
    assert (trained / ".hydra/config.yaml").exists()
    assert (trained / "csv/curves.png").stat().st_size > 10_000
    assert "coupling" in (trained / "csv/hparams.yaml").read_text()


def test_a_checkpoint_is_plain_data_and_loads_into_its_module(best):
    torch.load(best, weights_only=True)
    module = IRevNetModule.load_from_checkpoint(best, weights_only=True)
    assert type(module.net.stack) is CoupledSequential


def test_a_trained_network_can_be_inverted(best):
    assert reconstruction_error(best) <= 1e-5


def test_training_closes_with_the_panel(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "trainer.max_epochs=1", "depth=1", "strategy=auto", "logger=csv"]) == 0
    out = capsys.readouterr().out
    for row in (
        "held-out accuracy",
        "activations held",
        "reversible",
        "drift",
        "none: ordinary autograd",
        "logs/train/",
        " checkpoints/best.ckpt ",
    ):
        assert row in out
    assert "Warning" not in out and "treespec" not in out


@pytest.mark.parametrize(("recipe", "precision"), [("irevnet", "64-true"), ("momentumnet", "32-true")])
def test_lightnings_summary_and_a_loggers_graph(recipe, precision, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    short = ["trainer.max_epochs=1", "depth=2", *[f"+trainer.limit_{p}_batches=1" for p in ("train", "val", "test")]]
    shown = ["trainer.enable_model_summary=true", "logger=tensorboard", "+logger.tensorboard.log_graph=true"]
    chosen = [f"recipe={recipe}", f"experiment={recipe}_digits", f"+trainer.precision={precision}"]
    assert main(["train", *short, *shown, *chosen]) == 0
    assert "Trainable params" in capfd.readouterr().out


def test_the_panel_shows_the_memory_plan(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    short = ["trainer.max_epochs=1", "+trainer.limit_train_batches=2", "depth=2", "logger=csv"]
    assert main(["train", "strategy.memory_budget=1.0", *short]) == 0  # which stores all that autograd does
    out = capsys.readouterr().out
    (row,) = [line for line in out.splitlines() if "memory plan" in line]
    assert " of " in row and "at least" in row
    (peak,) = [line for line in out.splitlines() if "peak in backward" in line]
    assert "reversible: 1.0 x " in peak  # the bytes are those of the plan
    assert "none: no block was rebuilt" in out  # after the first step, which has measured


def test_large_batches_are_measured_in_part(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lightning_revlib.recipes.commands.run.few_samples", lambda inputs, module: inputs[:2])
    short = ["trainer.max_epochs=1", "+trainer.limit_train_batches=2", "depth=1", "logger=csv"]
    assert main(["train", *short, "+strategy.targets={net.stack: {on_drift: ignore}}"]) == 0
    out = capsys.readouterr().out
    assert "both measured on" in out and "2 x 1 x 8 x 8" in out
    assert "not measured: on_drift=ignore" in out


@pytest.mark.parametrize(
    ("inputs", "width", "few"),
    [
        (torch.zeros(64, 1, 8, 8), 8, (64, 1, 8, 8)),
        (torch.zeros(64, 3, 80, 80), 8, (2, 3, 80, 80)),
        (torch.zeros(64, 1, 8, 8), 4000, (2, 1, 8, 8)),
        (torch.zeros(16, 512).long(), 8, (16, 512)),
        (torch.zeros(1, 2**17).long(), 8, (1, 4096)),
    ],
    ids=str,
)
def test_size_of_the_measured_part(inputs, width, few):
    assert few_samples(inputs, torch.nn.Linear(width, width, device="meta")).shape == few


def test_evaluation_needs_only_the_checkpoint(best, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["eval", f"ckpt_path={best}"]) == 0
    assert "test/acc" in capsys.readouterr().out
    with next(tmp_path.glob("logs/eval/runs/*/csv/metrics.csv")).open() as file:
        after = float(next(csv.DictReader(file))["test/acc"])
    with (best.parent.parent / "csv/metrics.csv").open() as file:
        before = [float(row["test/acc"]) for row in csv.DictReader(file) if row["test/acc"]]
    assert before == [pytest.approx(after)]


def test_data_of_another_kind_than_the_checkpoints(best, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["eval", f"ckpt_path={best}", "data=topics"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("revlib: data: Topics has length, vocab, and the checkpoint's IRevNet works on other data")


def test_a_folder_whose_name_has_a_space_and_a_comma(best, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs, mine"
    shutil.copytree(best.parents[1], folder)
    word = checkpoint_word("runs, mine")
    assert main(["eval", word]) == 0
    assert checkpoint_word("logs/best.ckpt") == "ckpt_path=logs/best.ckpt"


def test_prediction_draws_images_beside_their_reconstruction(best, tmp_path, monkeypatch, capsys):
    from matplotlib.image import imread

    monkeypatch.chdir(tmp_path)
    assert main(["predict", f"ckpt_path={best}", "images=8", "picture=pictures/digits.png"]) == 0
    assert "reconstruction" in capsys.readouterr().out
    pixels = imread(tmp_path / "pictures/digits.png")
    assert pixels.shape[0] > 200 and pixels.shape[1] > 1000
    assert (pixels[..., :3] < 0.1).all(axis=-1).mean() > 0.05  # the digits are on a black ground


def test_training_goes_on_from_a_checkpoint(trained, best, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    last = trained / "checkpoints/last.ckpt"
    assert main(["train", "trainer.max_epochs=2", f"ckpt_path={last}"]) == 0
    assert "not measured: no epoch was left to train" in capsys.readouterr().out
    assert main(["train", "depth=2", f"ckpt_path={last}"]) == 1
    assert "was trained with depth=3 (now 2)" in capsys.readouterr().err
    assert main(["train", "trainer.max_epochs=3", f"ckpt_path={last}"]) == 1
    assert "planned for 40 steps, and this run has 60" in capsys.readouterr().err


def test_parts_that_are_left_out_and_a_checkpoint_of_lightnings_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    short = ["depth=1", "trainer.max_epochs=1", "+trainer.limit_train_batches=1", "hydra.run.dir=mine"]
    assert main(["train", *short, "callbacks.checkpoint=null", "logger.csv=null", "logger.tensorboard=null"]) == 0
    (file,) = Path("mine").rglob("epoch=0-step=1.ckpt")
    capsys.readouterr()
    assert main(["eval", "ckpt_path=mine"]) == 1
    assert f"take ckpt_path={file}" in capsys.readouterr().err
    assert main(["eval", f"ckpt_path={file}"]) == 0


def test_a_run_does_not_replace_the_checkpoints_of_another(trained, tmp_path, monkeypatch, capsys):
    folder, before = trained, {file: file.read_bytes() for file in trained.rglob("*.ckpt")}
    assert before and main(["train", f"hydra.run.dir={folder}"]) == 1
    assert f"{folder} has checkpoints of another run" in capsys.readouterr().err
    assert all(file.read_bytes() == content for file, content in before.items())


def test_another_learning_rate_on_resuming_is_an_error(best, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = [f"ckpt_path={best}", "trainer.max_epochs=9"]
    assert main(["train", *options, "recipe.optimizer.lr=0.5", "scheduler=none"]) == 1
    assert "revlib: recipe.optimizer.lr=0.5, scheduler=none: a run that resumes goes on" in capsys.readouterr().err
    short = ["depth=1", "trainer.max_epochs=1", "+trainer.limit_train_batches=1"]
    assert main(["train", *short, "recipe.optimizer.lr=0.01", "hydra.run.dir=mine"]) == 0
    assert main(["train", "ckpt_path=mine", "trainer.max_epochs=2", "recipe.optimizer.lr=1e-2", "scheduler=none"]) == 1
    assert "revlib: scheduler=none: a run that resumes" in capsys.readouterr().err  # 0.01 is 1e-2


def test_the_folder_of_a_run_stands_for_its_checkpoint_and_its_settings(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    short = ["trainer.max_epochs=1", "+trainer.limit_train_batches=2", "logger=csv", "callbacks=checkpoint"]
    chosen = ["depth=[1,2]", "coupling=momentum", "coupling.gamma=0.5", "precision=64-true"]
    assert main(["train", *chosen, *short, "hydra.run.dir=one"]) == 0
    out = capsys.readouterr().out
    assert "IRevNet on Digits" in out and "coupling.gamma=0.5" in out
    # nothing is left to train, and nothing differs
    assert main(["train", "ckpt_path=one", "hydra.run.dir=two", "--config-dir", "."]) == 0
    assert "coupling.gamma=0.5" in capsys.readouterr().out
    assert main(["train", "ckpt_path=one", "depth=3"]) == 1
    assert "was trained with depth=[1, 2] (now 3)" in capsys.readouterr().err
    for command in ("eval", "predict"):
        assert main([command, "ckpt_path=one"]) == 0
        out = capsys.readouterr().out
        assert "IRevNet on Digits" in out and "best.ckpt" in out
    assert main(["report", "ckpt_path=one", "depths=[[1,2]]", "hydra.run.dir=three"]) == 0
    assert "gamma: 0.5" in Path("three/.hydra/config.yaml").read_text()


@pytest.mark.parametrize(
    "word",
    [
        "+callbacks.trap._target_=hostile.Trap",
        "+callbacks.trap={_target_: hostile.Trap}",
        "+callbacks.trap=${oc.decode:'{_tar${g}: hostile.Trap}'}",
        "recipe=../../hostile",
    ],
)
def test_a_checkpoint_does_not_choose_what_code_is_run(word, best, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    checkpoint = torch.load(best, weights_only=True)
    checkpoint["revlib_overrides"] = [word]
    torch.save(checkpoint, "hostile.ckpt")
    assert main(["train", "ckpt_path=hostile.ckpt"]) == 1
    assert f"was trained with {word}, which may choose what code is run" in capsys.readouterr().err
    assert main(["eval", "ckpt_path=hostile.ckpt"]) == 0


class Own:
    """Something of a user's among the hyperparameters."""


def test_couplings_among_the_hyperparameters_of_a_checkpoint(best, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint = torch.load(best, weights_only=True)
    checkpoint["hyper_parameters"]["coupling"] = revlib.Additive()
    torch.save(checkpoint, "coupling.ckpt")
    assert main(["eval", "ckpt_path=coupling.ckpt"]) == 0


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("images=-1", "images=-1: pass a whole number of 1 or more"),
        ("images=few", "images=few: pass a whole number of 1 or more"),
        ("count=0", "count=0: pass a whole number of 1 or more"),
        ("top_k=0", "top_k=0: pass a whole number of 1 or more, or null"),
        ("temperature=hot", "temperature=hot: pass a number of 0 or more"),
        ("prompt=The", "prompt=The: IRevNet works on images; leave it out, or take the checkpoint of a language model"),
        ("picture=folder.png", "folder.png"),
        ("picture=x.xyz", "picture=x.xyz: Format 'xyz' is not supported"),
        ("precision=8", "precision=8: no such option; it has 16-mixed, 32-true, 64-true, bf16-mixed"),
    ],
)
def test_what_a_prediction_refuses(word, message, best, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("folder.png").mkdir()
    assert main(["predict", f"ckpt_path={best}", word]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("revlib: ") and message in line


def test_a_checkpoint_in_shards(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    checkpoint = torch.load(trained / "checkpoints/last.ckpt", weights_only=True)
    dcp.save({"state_dict": checkpoint.pop("state_dict")}, checkpoint_id="shards.ckpt", no_dist=True)
    torch.save(checkpoint, "shards.ckpt/meta.pt")
    assert main(["eval", "ckpt_path=shards.ckpt"]) == 0
    assert "test/acc" in capsys.readouterr().out
    assert main(["train", "trainer.max_epochs=2", "ckpt_path=shards.ckpt"]) == 0
    assert main(["train", "depth=2", "ckpt_path=shards.ckpt"]) == 1
    assert "was trained with depth=3 (now 2)" in capsys.readouterr().err


class PressOnce(L.Callback):
    """Press Ctrl-C in the second epoch, once."""

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 1 and not (pressed := Path("pressed")).exists():
            pressed.touch()
            signal.raise_signal(signal.SIGINT)


def test_ctrl_c_ends_with_the_line_to_resume(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # another test may have left it ignored
    short = ["trainer.max_epochs=2", "+trainer.limit_train_batches=2", "depth=1", "logger=csv", "ckpt_path=null"]
    try:
        assert main(["train", *short, f"+callbacks.press._target_={__name__}.PressOnce"]) == 130
    finally:
        signal.signal(signal.SIGINT, before)  # Lightning ignores further ones
    (line,) = capsys.readouterr().err.splitlines()
    told, _, command = line.partition(": revlib ")
    assert told == "revlib: interrupted; to resume" and "last.ckpt" in command and "null" not in command
    assert main(shlex.split(command)) == 0
    newest = max(Path("logs/train/runs").glob("*/csv/metrics.csv"), key=lambda path: path.stat().st_mtime_ns)
    with newest.open() as file:
        assert {row["epoch"] for row in csv.DictReader(file)} <= {"1", "2"}


def test_ctrl_c_outside_of_the_training(monkeypatch, capsys):
    def press(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("lightning_revlib.recipes.commands.catalogue.show_list", press)
    assert main(["list"]) == 130
    assert capsys.readouterr().err == "revlib: interrupted\n"


@pytest.mark.parametrize("argv", [["list"], ["train", "--help"]], ids=str)
def test_a_reader_that_closes_the_pipe(argv, tmp_path):
    words = [sys.executable, "-m", "lightning_revlib.cli.main", *argv]
    with subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


@pytest.mark.parametrize("recipe", ["irevnet", "momentumnet"])
def test_both_strategies_train_alike(recipe, tmp_path, monkeypatch):
    curves, held = [], []
    monkeypatch.chdir(tmp_path)
    for strategy in ("auto", "reversible"):
        short = ["trainer.max_epochs=2", "trainer.log_every_n_steps=1", "logger=csv", "data.batch_size=16"]
        short += [f"+trainer.limit_{part}_batches={count}" for part, count in (("train", 6), ("val", 2), ("test", 2))]
        double = ["+trainer.precision=64-true", "~callbacks.drift", f"hydra.run.dir={strategy}", f"recipe={recipe}"]
        assert main(["train", f"strategy={strategy}", *short, *double]) == 0
        rows = list(csv.DictReader((tmp_path / strategy / "csv/metrics.csv").open()))
        curves.append([float(row[k]) for row in rows for k in ("train/loss", "val/loss", "test/loss") if row[k]])
        held.append(max(float(row["activation/held_bytes"] or 0) for row in rows))
    assert len(curves[0]) == 6  # two epochs of each; the best checkpoint is validated and tested
    assert curves[0] == pytest.approx(curves[1], rel=1e-10)
    assert held[0] > 1.5 * held[1]


def test_a_sweep_runs_once_for_each_value_and_ends_with_a_table(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    short = ["trainer.max_epochs=1", "+trainer.limit_train_batches=2", "callbacks=checkpoint", "logger=csv"]
    assert main(["train", "depth=1,[1,2]", "-m", *short]) == 0  # wherever -m stands
    assert len(list(tmp_path.glob("logs/train/multiruns/*/*/checkpoints/best.ckpt"))) == 2
    title, *table = capsys.readouterr().out.rpartition("2 runs in ")[2].splitlines()
    assert title.startswith("logs/train/multiruns/")
    head, first, second = (line for line in table if "val/acc" in line or line[2:3] in ("0", "1"))
    assert ["run", "depth"] == head.replace("\u2503", " ").split()[:2] and "max_epochs" not in head
    assert "[1,2]" not in first and "[1,2]" in second


@pytest.mark.slow
def test_a_sweep_goes_on_after_a_run_that_fails(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    short = ["trainer.max_epochs=1", "+trainer.limit_train_batches=2", "logger=csv", "seed=3"]
    assert main(["train", "-m", "depth=0,1", *short]) == 1
    printed = capsys.readouterr()
    assert "depth=0" in printed.err and "each stage needs a block or more" in printed.err
    assert printed.err.splitlines()[-1] == "revlib: 1 of the sweep's runs failed"
    assert "1 runs in logs" in printed.out


def test_a_sweep_side_by_side(tmp_path, monkeypatch):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    short = ["trainer.max_epochs=1", "+trainer.limit_train_batches=2", "callbacks=checkpoint", "logger=csv"]
    assert main(["train", "-m", "launcher=joblib", "depth=1,2", "threads=1", *short]) == 0
    assert len(list(tmp_path.glob("logs/train/multiruns/*/*/checkpoints/best.ckpt"))) == 2


@pytest.mark.slow
def test_a_search_by_optuna(tmp_path, monkeypatch):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    monkeypatch.chdir(tmp_path)
    short = ["trainer.max_epochs=1", "+trainer.limit_train_batches=2", "callbacks=checkpoint", "logger=csv", "depth=1"]
    assert main(["train", "-m", "hparams_search=optuna", "hydra.sweeper.n_trials=2", *short]) == 0
    (found,) = tmp_path.glob("logs/train/multiruns/*/optimization_results.yaml")
    assert "recipe.optimizer.lr" in found.read_text()


@pytest.mark.slow
@pytest.mark.parametrize(("experiment", "least"), [("irevnet_digits", 0.98), ("momentumnet_digits", 0.97)])
def test_the_digits_reach_their_accuracy_and_can_be_inverted(experiment, least, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", f"experiment={experiment}"]) == 0
    (folder,) = tmp_path.glob("logs/train/runs/*")
    with (folder / "csv/metrics.csv").open() as file:
        (accuracy,) = [float(row["test/acc"]) for row in csv.DictReader(file) if row["test/acc"]]
    assert accuracy >= least
    if experiment == "irevnet_digits":
        assert reconstruction_error(folder / "checkpoints/best.ckpt") <= 1e-5


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["trian"], "unknown command 'trian' (did you mean train?); commands are train, eval, predict, report"),
        (["train", "dpeth=5"], "dpeth: no such key (did you mean depth?)"),
        (["train", "couplng=momentum"], "couplng: no such key (did you mean coupling?)"),
        (["train", "recipe.dropuot=0"], "recipe.dropuot: no such key (did you mean recipe.dropout?); recipe has"),
        (["train", "coupling=momentum", "coupling.gama=1"], "(did you mean coupling.gamma?); coupling has name, gamma"),
        (
            ["bench", "study=ovrhead"],
            "no such study (did you mean overhead?); studies are attention, correctness, drift",
        ),
        (["bench", "study=drift", "widths=4"], "widths=4: study=drift does not take it; it takes depths, seed"),
        (["train", "coupling=addtive"], "coupling=addtive: no such option (did you mean additive?); it has additive,"),
        (["train", "experiment=none"], "experiment=none: no such option; it has irevnet_cifar10, irevnet_digits"),
        (["train", "-m", "--cfg", "job"], "Only one of --run, --multirun, --cfg"),
        (["train", "launcher=jobli"], "launcher=jobli: no such option (did you mean joblib?)"),
        (["train", "depth"], "depth: cannot be read; write key=value"),
        (["train", "depth=5,6"], "depth=5,6: for one run after the other add -m; a list is written depth=[5,6]"),
        (["train", "++coupling.name=momentun"], "coupling='momentun' is unknown"),
        (["train", "coupling=momentum", "coupling.gamma=3"], "gamma=3"),
        (["train", "seed=abc"], "seed=abc: pass a whole number"),
        (["train", "seed=-5"], "seed=-5: pass a whole number from 0"),
        (["train", "data.jitter=much"], "jitter='much': pass a number of 0 or more"),
        (["train", "trainer.max_epochs=many"], "trainer.max_epochs=many: pass a whole number"),
        (
            ["train", "trainer.max_epochs=-1"],
            "max_epochs=-1: training has no end, and the learning rate's schedule needs",
        ),
        (["train", "threads=0"], "threads=0: pass a whole number of 1 or more, or null"),
        (["train", "data=topics"], "length, vocab: the data are sequences of tokens, and this network works on images"),
        (
            ["train", "recipe=momentumnet", "data=enwik8"],
            "take recipe=reformer, or data of images, such as data=digits",
        ),
        (["train", "depth=[1,2,3]"], "depth=[1, 2, 3]"),
        (["train", "split_dim=0"], "split_dim=0: the streams would be different images"),
        (["train", "recipe.initial_psi=3"], "8 is not a multiple of 6"),
        (["train", "recipe.optimizer.lr=fast"], "optimizer={'lr': 'fast', 'momentum': 0.9, 'weight_decay': 0.005}: "),
        (["train", "recipe.optimizer.lr=-1"], "Invalid learning rate: -1"),
        (["train", "scheduler.max_lr=fast"], "scheduler={'max_lr': 'fast'}: "),
        (["train", "data.batch_size=0"], "batch_size=0"),
        (["train", "data.batch_size=lots"], "revlib: was data.batch_size=lots meant as a number, such as 64?"),
        (["train", "recipe=reformer", "data.batch_size=1000"], "batch_size=1000: the data for training are 8"),
        (["train", "threads=true"], "threads=True: pass a whole number"),
        (["train", "trainer.max_epochs=1.5"], "trainer.max_epochs=1.5: pass a whole number"),
        (["report", "simulate=true", "memory=1GiB", "device=meta"], "device=meta: "),
        (["train", "recipe.dropout=lots"], "; was recipe.dropout=lots meant as a number, such as 0.1?"),
        (["train", "recipe=reformer", "data.length=abc"], "; was data.length=abc meant as a number, such as 512?"),
        (["train", "recipe=reformer", "recipe.axial=3"], "recipe: 'int' object is not iterable; see recipe.axial=3"),
        (["train", "recipe.strides=2"], "; was recipe.strides=2 meant as a list, such as [1,2]?"),
        (
            ["train", "coupling=bdia"],
            "coupling 'bdia' works on the exact grid only; set grid_bits, such as recipe.grid_b",
        ),
        (
            ["train", "callbacks.progress_bar.refresh_rate=abc"],
            "refresh_rate=abc: pass the number of batches between refreshes, 0 for no bar",
        ),
        (["train", "data=fashion_mnist", "data.root=nowhere"], "data.root=nowhere has no train-images"),
        (["train", "strategy.memory_budget=much"], "memory_budget='much'"),
        (["train", "+strategy.targets=net"], "targets='net'"),
        (["train", "trainer.accelerator=abacus"], "abacus"),
        (["train", "recipe.dropout=2"], "recipe: dropout probability has to be between 0 and 1, but got 2"),
        (["train", "ckpt_path=missing/x.ckpt"], "ckpt_path=missing/x.ckpt does not exist; nor does the folder missing"),
        (["eval"], "ckpt_path is needed: revlib eval ckpt_path="),
        (["eval", "ckpt_path="], "ckpt_path is needed: revlib eval ckpt_path="),
        (["train", "hydra.run.dir=/proc/mine"], "'/proc/mine'"),
        (["eval", "depth=5"], "depth: no such key"),
        (["eval", "ckpt_path=bset.ckpt"], "ckpt_path=bset.ckpt does not exist; . has best.ckpt"),
        (["predict", "ckpt_path=best.ckpt"], "ckpt_path=best.ckpt is not a checkpoint"),
        (
            ["predict", "ckpt_path=weights.pt"],
            "ckpt_path=weights.pt is not a Lightning checkpoint: it has no state_dict",
        ),
        (["predict", "ckpt_path=other.ckpt"], "ckpt_path=other.ckpt is not from `revlib train`"),
        (
            ["eval", "ckpt_path=hostile.ckpt"],
            "names the class hostile.Trap, which is not revlib's, and was not import",
        ),
        (
            ["eval", "ckpt_path=away.ckpt", "trust=away.Net"],
            "trust=away.Net cannot be imported here; run",
        ),
        (
            ["train", "ckpt_path=own.ckpt"],
            "own.ckpt has an object of tests.cli.test_main.Own among its hyperparameters, which",
        ),
        (
            ["predict", "ckpt_path=folder"],
            "ckpt_path=folder is a folder; take ckpt_path=folder/one/checkpoints/last.ckpt",
        ),
        (["train", "ckpt_path=empty"], "ckpt_path=empty is a folder, and holds no checkpoint"),
        (
            ["train", "coupling.gamma=0.5"],
            "coupling.gamma: no such key; coupling has name; add coupling=momentum or coupling=momentum_exact, which",
        ),
        (["train", "strategy=auto", "strategy.stage=3"], "add strategy=reversible_deepspeed, which has stage"),
        (["train", "callbacks=[default,early_stoping]"], "(did you mean early_stopping?); it has breakdown"),
        (["train", "logger=null"], "; ~logger leaves it out"),
        (["train", "callbacks.drift=false"], "callbacks.drift=False: to leave it out write callbacks.drift=null"),
        (["train", "+trainer.limit_test_batches=0"], "trainer.limit_test_batches=0: pass 1 or more, or leave it out"),
        (["train", "trainer.max_steps=0"], "trainer.max_steps=0: pass 1 or more, or leave it out"),
        (["eval", "ckpt_path=other.ckpt", "data.batch_size=7"], "data: none is chosen; add data=..., one of cifar10"),
        (["train", "+ckpt_path=empty"], "ckpt_path=empty is a folder, and holds no checkpoint"),
        (["train", "recipe=finetune"], "recipe.model is needed: add recipe.model=..."),
        (["train", "recipe=reformer", "data=text_file"], "data.path is needed: add data.path=..."),
        (["train", "recipe=finetune", "recipe.residual=no"], "write recipe.residual=true or recipe.residual=false"),
        (["train", "optimized_metric=val/precision"], "optimized_metric=val/precision is none of val/acc, val/loss"),
        (["train", "recipe.attention=[lsh]"], "add recipe=reformer, which has attention"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_an_error_gets_one_clear_message(argv, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "best.ckpt").write_text("no checkpoint")
    (tmp_path / "folder/one/checkpoints").mkdir(parents=True)
    (tmp_path / "folder/one/checkpoints/last.ckpt").touch()
    (tmp_path / "empty").mkdir()
    torch.save({"weight": torch.zeros(1)}, tmp_path / "weights.pt")
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    torch.save({"state_dict": {}, "revlib_recipe": "hostile.Trap"}, tmp_path / "hostile.ckpt")
    torch.save({"state_dict": {}, "revlib_recipe": "away.Net"}, tmp_path / "away.ckpt")
    torch.save({"state_dict": {}, "hyper_parameters": {"coupling": Own()}}, tmp_path / "own.ckpt")
    (tmp_path / "hostile.py").write_text("raise SystemExit('executed')")
    monkeypatch.syspath_prepend(tmp_path)
    assert main(argv) == 1
    err = capsys.readouterr().err
    assert err.startswith("revlib: ") and message in err and "Traceback" not in err and len(err.splitlines()) == 1
    assert not (tmp_path / "logs").exists()


def test_an_error_of_a_loaders_process_is_told_without_its_traceback():
    error = ValueError("Caught ValueError in DataLoader worker process 0.\nTraceback ...\nValueError: a.png: cut\noff")
    assert explain(error, "train") == "a.png: cut\noff"


@pytest.mark.parametrize(
    "way", [["hydra.run.dir=notes"], ["++hydra.run.dir=notes"], ["-m", "hydra.sweep.dir=notes"]], ids=str
)
def test_a_run_that_fails_deletes_nothing_of_the_users(way, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    diary = tmp_path / "notes" / "mine" / "diary.log"
    diary.parent.mkdir(parents=True)
    diary.touch()
    assert main(["train", *way, "seed=abc"]) == 1
    assert diary.exists()


def test_a_failed_run_in_a_folder_that_has_older_files(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "mine.yaml").write_text("# @package _global_\nhydra:\n  run:\n    dir: notes\n")
    diary = tmp_path / "notes" / "diary.log"
    diary.parent.mkdir()
    diary.touch()
    os.utime(diary, (0, 0))
    assert main(["train", "--config-dir", "config", "+mine=mine", "seed=abc"]) == 1
    assert diary.exists()


@pytest.mark.parametrize(
    ("choice", "package"),
    [
        ("launcher=joblib", "hydra-joblib-launcher"),
        ("launcher=slurm", "hydra-submitit-launcher"),
        ("hparams_search=optuna", "hydra-optuna-sweeper"),
    ],
)
def test_a_plugin_that_is_missing(choice, package, monkeypatch, capsys):
    if importlib.util.find_spec("hydra_plugins") and importlib.util.find_spec(
        f"hydra_plugins.{package.replace('-', '_')}"
    ):
        pytest.skip("it is installed")
    assert main(["train", "-m", choice, "depth=1,2"]) == 1
    assert f"a plugin of Hydra's, which is not installed: pip install {package}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "line"),
    [(["--help"], ""), (["list"], ""), (["bench", "--help"], ""), (["-sc", "query=bash"], "revlib train strat")],
    ids=str,
)
def test_help_and_completion_wait_neither_for_torch_nor_for_lightning(argv, line):
    code = (
        "import atexit, sys; from lightning_revlib.cli.main import main\n"
        "try: status = main()\n"
        "except SystemExit as end: status = end.code\n"
        "assert not status and not {'torch', 'lightning'} & {*sys.modules}"
    )
    words = [sys.executable, "-c", code, *argv]
    done = subprocess.run(words, env={**os.environ, "COMP_LINE": line}, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout, done.stderr


def test_help(capsys):
    assert main([]) == 2
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"  {command} " in out for command in COMMANDS)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("revlib 0.")


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("revlib tr", {*COMMANDS, "list", "copy"}),
        ("revlib train coupl", {"coupling=", "coupling."}),
        ("revlib train coupling=mo", {"coupling=momentum", "coupling=momentum_exact"}),
        ("revlib report dep", {"depth=", "depths."}),
    ],
)
def test_completion_by_the_tab_key(line, found, monkeypatch, capsys):
    monkeypatch.setenv("COMP_LINE", line)
    assert main(["-sc", "query=bash"]) == 0
    assert set(capsys.readouterr().out.split()) == found


def test_completion_is_installed_for_the_program(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/revlib"])
    assert main(["-sc", "install=bash"]) == 0
    assert capsys.readouterr().out.rstrip().endswith("hydra_bash_completion revlib")


@pytest.mark.parametrize(
    ("argv", "has", "has_not"),
    [
        (
            ["train", "coupling=momentum"],
            ["  recipe.dropout=0.1", "  coupling.gamma=0.9", "  depth=3 ", "blocks in each stage", "  precision=null"],
            ["images=", "depths="],
        ),
        (["train", "recipe=reformer"], ["recipe.lsh.hashes=4", "  depth=2 ", "layers, of two"], ["recipe.bottleneck"]),
        (["eval"], ["ckpt_path=???", "a checkpoint, or the folder of its run", "data=null"], ["scheduler", "depth="]),
        (["predict"], ["images=24", "largest number of images", "top_k=null"], ["callbacks", "depth="]),
        (["report"], ["depths=[2,4,8,16]", "batch_size=16"], ["logger", "scheduler", "max_epochs"]),
        (["bench"], ["study=null", "Studies, each run by", "  overhead "], ["Groups", "scheduler"]),
        (["list"], ["revlib list [GROUP ...]"], ["seed"]),
        (["copy"], ["revlib copy NAME [FOLDER]"], ["seed"]),
    ],
    ids=" ".join,
)
def test_help_of_a_command_explains_its_own_groups_and_keys(argv, has, has_not, capsys):
    assert main([*argv, "--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: revlib {argv[0]} ") and "_target_" not in out
    assert [text for text in has if text not in out] == []
    assert [text for text in has_not if text in out] == []


def test_help_explains_a_wrong_option(capsys):
    assert main(["train", "recipe=irevnte", "--help"]) == 1
    assert "recipe=irevnte: no such option (did you mean irevnet?)" in capsys.readouterr().err


def test_the_package_runs_as_the_command():
    words = [sys.executable, "-m", "lightning_revlib", "--version"]
    assert subprocess.run(words, check=True, capture_output=True, text=True).stdout.strip().endswith(revlib.__version__)


def test_the_traceback_is_there_on_demand(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(ValueError, match="ckpt_path is needed"):
        main(["eval"])


def test_the_installed_command(tmp_path):
    revlib = shutil.which("revlib", path=os.path.dirname(sys.executable))
    if revlib is None:
        pytest.skip("the package is not installed beside this Python")
    done = subprocess.run([revlib, "trian"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("revlib: unknown command 'trian'")
