"""Checkpoints that name the classes of their module and data, and clear errors for other files."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig, OmegaConf

from lightning_revlib.pretrained.load import absolute
from lightning_revlib.recipes.display.panel import checkpoint_word
from lightning_revlib.strategies.sharded_checkpoint import is_sharded, merge_checkpoint

RECIPE, DATA = "revlib_recipe", "revlib_data"  # the keys under which a checkpoint names its classes
OVERRIDES = "revlib_overrides"  # and the overrides with which its training was started
FILES = {"train": ("last.ckpt",), "report": ("best.ckpt", "last.ckpt")}  # which a command takes of a run's folder


class SignCheckpoint(L.Callback):
    """Write the classes of module and data, and the overrides of the run, into checkpoints.

    `revlib eval` reads the classes, and the command line the overrides: see `settings`.
    """

    def __init__(self, overrides: Sequence[str] = ()) -> None:
        self.overrides = [*overrides]

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the names of both classes to the checkpoint."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        for key, named in ((RECIPE, pl_module), (DATA, data)):
            checkpoint[key] = f"{type(named).__module__}.{type(named).__qualname__}"
        checkpoint[OVERRIDES] = self.overrides


def find(path: str, command: str) -> str:
    """Return the checkpoint that a command takes: `path`, or if that is the folder of a run, one of the run's."""
    folder = Path(path)
    names = FILES.get(command, ("best.ckpt", "last.ckpt"))
    candidates = [folder / "checkpoints" / name for name in names] if folder.is_dir() else []
    return str(next((file for file in candidates if file.exists()), path))


def settings(path: str, command: str, given: Collection[str]) -> list[str]:
    """Return the overrides with which a checkpoint was trained, as far as the command takes them.

    Overrides of the keys in `given` are left out. `eval` and `predict` read the module and the data from the
    checkpoint, and take the precision only. Raises ValueError for a path that is no checkpoint, and for an override
    that names a class, since a checkpoint must not choose what code is run; so do interpolations, of which a class's
    name could be made, and options of a group that lie outside of it.
    """
    words: Any = read(path).get(OVERRIDES) or []
    found = {key_of(str(word)): str(word) for word in words}
    taken = {
        key: word
        for key, word in found.items()
        if key not in {*given, "ckpt_path"}
        and not key.startswith(("hydra.", "hydra/"))
        and (command in ("train", "report") or key in ("precision", "trainer.precision", "trainer.accelerator"))
    }
    for key, word in taken.items():
        if "_target_" in word or "${" in word or ("." not in key and ".." in word):
            raise ValueError(
                f"ckpt_path={path} was trained with {word}, which may choose what code is run; if you trust it,"
                " repeat it on the command line"
            )
    return [*taken.values()]


def key_of(override: str) -> str:
    """Return the key of an override of Hydra's, without the signs that add or delete it."""
    return override.partition("=")[0].lstrip("+~")


def read(path: str | Path) -> dict[str, Any]:
    """Return the checkpoint at `path` on the CPU; ValueError if the file does not exist or is not Lightning's."""
    file = Path(path)
    if not file.exists():
        raise ValueError(f"ckpt_path={path} does not exist{_hint(file)}")
    if file.is_dir() and not is_sharded(file):
        within = sorted(file.rglob("*.ckpt"), key=lambda each: each.stat().st_mtime)
        hint = f"; take {checkpoint_word(str(within[-1]))}" if within else ", and holds no checkpoint"
        raise ValueError(f"ckpt_path={path} is a folder{hint}")
    try:
        checkpoint = (
            merge_checkpoint(file) if file.is_dir() else torch.load(file, map_location="cpu", weights_only=True)
        )
    except Exception as error:  # unpickling raises errors of many types
        if found := re.search(r"Unsupported global: GLOBAL (\S+)", str(error)):
            raise ValueError(
                f"ckpt_path={path} has an object of {found[1]} among its hyperparameters, which torch.load does not"
                " read unasked; train with plain values, such as a coupling by its name in COUPLINGS"
            ) from error
        raise ValueError(f"ckpt_path={path} is not a checkpoint: torch.load cannot read it") from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise ValueError(f"ckpt_path={path} is not a Lightning checkpoint: it has no state_dict")
    return checkpoint


def load_module(cfg: DictConfig) -> L.LightningModule:
    """Return the module of `cfg.ckpt_path` as it was trained."""
    if OmegaConf.is_missing(cfg, "ckpt_path") or cfg.ckpt_path in (None, ""):
        found = sorted(Path(cfg.paths.log_dir).glob("train/runs/*/checkpoints/best.ckpt"))
        example = found[-1] if found else "logs/train/runs/<time>/checkpoints/best.ckpt"
        raise ValueError(f"ckpt_path is needed: revlib {cfg.task} ckpt_path={example}")
    checkpoint = read(cfg.ckpt_path)
    if RECIPE not in checkpoint:
        raise ValueError(
            f"ckpt_path={cfg.ckpt_path} is not from `revlib train`; load it by your module's load_from_checkpoint"
        )
    recipe = _named(checkpoint[RECIPE], cfg)
    if not issubclass(recipe, L.LightningModule):
        raise ValueError(f"ckpt_path={cfg.ckpt_path} names {checkpoint[RECIPE]}, which is not a LightningModule")
    return _load(recipe, checkpoint)


def load_data(cfg: DictConfig) -> L.LightningDataModule:
    """Return `cfg.data` or, if it is null, the data on which the module of `cfg.ckpt_path` was trained."""
    if cfg.get("data") is not None:
        if "_target_" not in cfg.data:
            raise ValueError(f"data={dict(cfg.data)} names no data; choose one, too, such as data=digits")
        return instantiate(cfg.data)
    checkpoint = read(cfg.ckpt_path)
    name = checkpoint.get(DATA)
    if name is None:
        raise ValueError(f"ckpt_path={cfg.ckpt_path} does not say on what data it was trained; add data=...")
    return _load(_named(name, cfg), checkpoint)


def _load(cls: Any, checkpoint: dict[str, Any]) -> Any:
    """Return a module or data of a checkpoint that has been read, which may have been a folder of shards."""
    file = BytesIO()
    torch.save({key: value for key, value in checkpoint.items() if key != "optimizer_states"}, file)
    file.seek(0)
    return cls.load_from_checkpoint(file, map_location="cpu", weights_only=True)


def _named(name: Any, cfg: DictConfig) -> type:
    """Return the class that a checkpoint names, if it is revlib's or the user trusts it, since an import runs code."""
    trusted = cfg.get("trust") or []
    if not str(name).startswith("lightning_revlib.recipes.") and name not in (
        [trusted] if isinstance(trusted, str) else trusted
    ):
        raise ValueError(
            f"ckpt_path={cfg.ckpt_path} names the class {name}, which is not revlib's, and was not imported; if you"
            f" trust it, add trust={name}"
        )
    try:
        return get_class(str(name))
    except ImportError as error:
        raise ValueError(
            f"trust={name} cannot be imported here; run the command in the folder of its module, or install that"
        ) from error


def same_architecture(checkpoint: dict[str, Any], module: L.LightningModule, path: str) -> None:
    """Raise ValueError if a run cannot resume from this checkpoint."""
    theirs, ours = map(_with_paths, (checkpoint.get("hyper_parameters", {}), module.hparams))
    differing = [f"{k}={theirs.get(k)} (now {ours.get(k)})" for k in theirs | ours if theirs.get(k) != ours.get(k)]
    if differing:
        raise ValueError(f"ckpt_path={path} was trained with {', '.join(differing)}; set the same to resume from it")


def _with_paths(hparams: Mapping[str, Any]) -> dict[str, Any]:
    """Return hyperparameters with the present paths of a pretrained model and its tokenizer."""
    named = {key: hparams.get(key) for key in ("model", "tokenizer")}
    return {**hparams, **{key: absolute(name) for key, name in named.items() if isinstance(name, str)}}


def same_optimizer(checkpoint: dict[str, Any], overrides: Sequence[str], path: str) -> None:
    """Raise ValueError for overrides that would not count, as a resumed run has the checkpoint's optimizer."""
    trained = _values(checkpoint.get(OVERRIDES, overrides))
    changed = [
        line
        for key, (line, value) in _values(overrides).items()
        if (key.partition(".")[0] == "scheduler" or ".optimizer." in f"{key}.")
        and (key not in trained or trained[key][1] != value)
    ]
    if changed:
        raise ValueError(
            f"{', '.join(changed)}: a run that resumes goes on with the optimizer and schedule of ckpt_path={path};"
            " leave it out"
        )


def _values(overrides: Sequence[str]) -> dict[str, tuple[str, Any]]:
    """Return overrides as they are written and their values, by key."""
    parsed = OverridesParser.create().parse_overrides([str(each) for each in overrides])
    return {key_of(each.input_line or ""): (each.input_line or "", each.value()) for each in parsed}


def _hint(file: Path) -> str:
    """Return a hint with similar names in the file's folder, or that the folder does not exist."""
    if not file.parent.is_dir():
        return f"; nor does the folder {file.parent}"
    names = [entry.name for entry in file.parent.iterdir()]
    near = difflib.get_close_matches(file.name, names, n=3, cutoff=0.4) or sorted(
        n for n in names if n.endswith(".ckpt")
    )
    return f"; {file.parent} has {', '.join(near[:3])}" if near else ""
