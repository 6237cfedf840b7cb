"""`revlib list` and `revlib copy`."""

from __future__ import annotations

import pytest

from lightning_revlib.cli.main import main
from lightning_revlib.recipes.commands.catalogue import CONF


def test_list_has_a_line_for_each_recipe_and_experiment(capsys):
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = {line.split()[0] for line in lines if line.startswith("  ")}
    files = [*CONF.glob("recipe/*.yaml"), *CONF.glob("experiment/*.yaml"), *CONF.glob("data/*.yaml")]
    assert names == {file.stem for file in files} and len(lines) == len(files) + 3
    assert all(len(line.split()) > 3 for line in lines if line.startswith("  "))


def test_list_of_one_group(capsys):
    assert main(["list", "coupling"]) == 0
    assert "momentum" in (out := capsys.readouterr().out) and "irevnet" not in out


@pytest.mark.parametrize("recipe", ["irevnet", "momentumnet"])
def test_a_copied_recipe_runs_in_its_folder(recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["copy", recipe]) == 0
    assert f"revlib train --config-dir . recipe=my_{recipe}" in capsys.readouterr().out
    module = tmp_path / f"my_{recipe}.py"
    module.write_text(module.read_text() + "\nprint('edited')\n")
    short = ["trainer.max_epochs=1", "+trainer.limit_train_batches=2", "logger=csv", "hydra.run.dir=run", "depth=2"]
    assert main(["train", "--config-dir", ".", f"recipe=my_{recipe}", *short]) == 0
    assert "edited" in capsys.readouterr().out
    trust = "my_irevnet.IRevNetModule" if recipe == "irevnet" else "my_momentumnet.MomentumNetModule"
    assert main(["eval", "ckpt_path=run/checkpoints/best.ckpt", f"trust={trust}"]) == 0  # it names the copy
    assert main(["copy", recipe]) == 1
    assert f"my_{recipe}.py, recipe/my_{recipe}.yaml exists already; name another folder" in capsys.readouterr().err


def test_a_copied_experiment_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["copy", "momentumnet_digits", "mine"]) == 0
    assert "cd mine && revlib train --config-dir . experiment=my_momentumnet_digits" in capsys.readouterr().out
    assert main(["train", "--config-dir", "mine", "experiment=my_momentumnet_digits", "--cfg", "job"]) == 0
    assert "MomentumNetModule" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["list", "couplng"], "no such group (did you mean coupling?); groups are callbacks, coupling"),
        (["copy"], "write revlib copy NAME [FOLDER]; names are finetune, irevnet, "),
        (["copy", "irevnt"], "revlib copy irevnt (did you mean irevnet?): write revlib copy NAME [FOLDER]"),
        (["copy", "irevnet", "a", "b"], "write revlib copy NAME [FOLDER]"),
        (["copy", "irevnet", "file"], "file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_errors(argv, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    assert main(argv) == 1
    err = capsys.readouterr().err
    assert err.startswith("revlib: ") and message in err and "Traceback" not in err
