"""Every file of the configuration composes, has a launch line, and instantiates the class that it names."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import lightning
import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import OmegaConf, open_dict

from lightning_revlib import COUPLINGS, CoupledSequential, conf, get_coupling
from tests.recipes import standin

ROOT = Path(conf.__file__).parent
FILES = sorted(path.relative_to(ROOT) for path in ROOT.rglob("*.yaml"))
COMMANDS = ["train", "eval", "predict", "report", "bench"]
# callbacks and loggers are dictionaries of their own, and hydra and paths have one option each
CHOICES = [f"{p.parent}={p.stem}" for p in FILES if p.parent.name not in ("", "hydra", "paths")]

PLUGINS = {  # plugins that a configuration needs and the package does not install
    "launcher=joblib": "hydra_plugins.hydra_joblib_launcher",
    "launcher=slurm": "hydra_plugins.hydra_submitit_launcher",
    "hparams_search=optuna": "hydra_plugins.hydra_optuna_sweeper",
    "logger=wandb": "wandb",
}
TOKENS = [f"data={name}" for name in ("topics", "text_file", "enwik8", "duplication", "imagenet64")]
NEED_FOLDER = ("data=image_folder", "experiment=irevnet_imagenet")  # which read the classes from the folder


def configuration(command, *overrides):
    with initialize_config_module("lightning_revlib.conf", version_base="1.3"):
        cfg = compose(command, [*overrides], return_hydra_config=True)
    with open_dict(cfg):
        cfg.hydra.runtime.output_dir = "unused"
    HydraConfig.instance().set_config(cfg)  # as `${hydra:...}` is looked up there
    return cfg


@pytest.mark.parametrize("file", FILES, ids=str)
def test_every_file_opens_with_a_description_and_a_launch_line(file):
    head = [line for line in (ROOT / file).read_text().splitlines() if not line.startswith("# @package")]
    comment = head[: next(i for i, line in enumerate(head) if not line.startswith("#"))]
    assert comment and not comment[0].startswith("#   ")
    assert any(line.startswith("#   revlib ") for line in comment), f"{file} has no launch line"


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_compose_and_resolve(command):
    cfg = configuration(command, "++ckpt_path=x")
    assert cfg.task == command
    for key in cfg:
        if key != "hydra" and not OmegaConf.is_missing(cfg, key):
            assert isinstance(str(OmegaConf.to_container(OmegaConf.create({key: cfg[key]}), resolve=False)), str)


@pytest.mark.parametrize("choice", CHOICES)
def test_every_option_composes_and_instantiates(choice, tmp_path):
    if choice in PLUGINS:
        pytest.importorskip(PLUGINS[choice])
    folder = [f"data.root={standin.images(tmp_path)}"] if choice in NEED_FOLDER else []
    if choice in TOKENS:
        folder = ["recipe=reformer", *["data.path=book.txt"] * (choice == "data=text_file")]
    if is_pretrained := choice in ("recipe=finetune", "experiment=smollm2_topics"):
        folder = [f"recipe.model={standin.language_model(tmp_path)}", "data.length=64"]
    cfg = configuration("train", choice, *["recipe.grid_bits=12"] * (choice == "coupling=bdia"), *folder)
    group = choice.split("=")[0]
    data = instantiate(cfg.data)
    with torch.device("cpu" if is_pretrained else "meta"):  # published networks have up to 125 M parameters
        module = instantiate(cfg.recipe, **data.model_arguments)
    assert isinstance(module, lightning.LightningModule)
    if group in ("callbacks", "logger"):
        assert cfg[group]
        assert [instantiate(one) for one in cfg[group].values()]
    if choice == "strategy=reversible_deepspeed" and importlib.util.find_spec("deepspeed") is None:
        with pytest.raises(InstantiationException, match="reversible_deepspeed_stage_2' needs deepspeed"):
            instantiate(cfg.trainer)
        return
    assert isinstance(instantiate(cfg.trainer, logger=False, enable_progress_bar=False), lightning.Trainer)


def test_groups_are_those_documented():
    groups = {p.parent.name for p in FILES} - {""}
    assert groups == {
        "recipe", "data", "coupling", "scheduler", "strategy", "trainer", "callbacks", "logger", "experiment", "paths",
        "hydra", "launcher", "hparams_search", "precision",
    }  # fmt: skip


def test_every_coupling_has_its_file():
    files = {p.stem for p in FILES if p.parent.name == "coupling"}
    assert files == {*COUPLINGS, "momentum_exact"}


@pytest.mark.parametrize("name", COUPLINGS)
def test_a_couplings_file_states_its_defaults(name):
    options = OmegaConf.to_container(configuration("train", f"coupling={name}").coupling)
    assert get_coupling(options) == get_coupling(name)
    assert "https://" in (ROOT / f"coupling/{name}.yaml").read_text()


def test_the_default_is_the_experiment_on_digits():
    cfg = configuration("train")
    choices = cfg.hydra.runtime.choices
    assert (choices.experiment, choices.recipe, choices.data) == ("irevnet_digits", "irevnet", "digits")
    assert (choices.coupling, choices.strategy) == ("additive", "reversible")


@pytest.mark.parametrize(
    ("overrides", "check"),
    [
        (["depth=5"], lambda stack: len(stack) == 11),
        (["depth=[2,4]"], lambda stack: len(stack) == 7),
        (["split_dim=2"], lambda stack: stack.split_dim == 2),
        (["coupling=momentum"], lambda stack: stack.couplings[0].gamma == 0.9),
        (["coupling=momentum", "coupling.gamma=0.95"], lambda stack: stack.couplings[0].gamma == 0.95),
        (
            ["recipe=momentumnet"],
            lambda stack: (stack.split_dim, stack.couplings[0].gamma, len(stack)) == (None, 0.9, 2),
        ),
        (["recipe=momentumnet", "depth=5"], lambda stack: len(stack) == 4),
        (["recipe=momentumnet", "depth=[2,4]"], lambda stack: len(stack) == 1),
        (["recipe=momentumnet", "split_dim=1"], lambda stack: stack.split_dim == 1),
        (["recipe=momentumnet", "coupling=additive"], lambda stack: stack.couplings[0] == get_coupling("additive")),
        (["experiment=momentumnet_cifar10"], lambda stack: len(stack) == 2),
        (["experiment=irevnet_cifar10"], lambda stack: len(stack) == 56),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_overrides_reach_the_network(overrides, check):
    cfg = configuration("train", *overrides)
    module = instantiate(cfg.recipe, **instantiate(cfg.data).model_arguments)
    stack = next(m for m in module.modules() if isinstance(m, CoupledSequential))
    assert check(stack)


def test_hyperparameters_are_plain_python():
    cfg = configuration("train", "depth=[2,4]", "coupling=momentum")
    module = instantiate(cfg.recipe, **instantiate(cfg.data).model_arguments)
    assert _types(dict(module.hparams)) <= {dict, list, tuple, int, float, str, type(None)}


def test_the_strategy_reaches_the_trainer():
    assert instantiate(configuration("train", "strategy=auto").strategy) == "auto"
    assert type(instantiate(configuration("train").strategy)).__name__ == "ReversibleStrategy"


def test_another_program_can_use_the_groups(tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "hydra:\n  searchpath: [pkg://lightning_revlib.conf]\ndefaults:\n  - coupling: momentum\n  - _self_\n"
    )
    from hydra import initialize_config_dir

    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        assert compose("mine", ["coupling.gamma=0.5"]) == {"coupling": {"name": "momentum", "gamma": 0.5}}


@pytest.mark.parametrize("recipe", ["irevnet", "momentumnet", "reformer"])
def test_a_recipe_keeps_the_depth_of_another_program(recipe, tmp_path):
    groups = "".join(f"  - {group}\n" for group in ("data: digits", "coupling: additive", "scheduler: onecycle"))
    for name, depth in (("mine", "depth: 7\n"), ("none", "")):
        head = f"hydra:\n  searchpath: [pkg://lightning_revlib.conf]\n{depth}"
        (tmp_path / f"{name}.yaml").write_text(f"{head}defaults:\n  - _self_\n{groups}  - recipe: {recipe}\n")
    from hydra import initialize_config_dir

    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        cfg = compose("mine")
        assert cfg.depth == cfg.recipe.depth == 7
        cfg = compose("none")
        assert "depth" not in cfg and cfg.recipe.depth in (2, 3)


def _types(value):
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return {type(value)}.union(*map(_types, inner))
