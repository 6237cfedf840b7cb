"""Folders of runs that fail before they begin: deleted, unless they were there before."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, ClassVar

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig


class FormerFolders(Callback):
    """Note whether the folder of a run or a sweep is there before it begins."""

    found: ClassVar[set[Path]] = set()

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        self._note(config.hydra.run.dir)

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        self._note(config.hydra.sweep.dir)

    def _note(self, folder: str) -> None:
        if Path(folder).exists():
            self.found.add(Path(folder).absolute())


def name_in_sweep() -> str | None:
    """Return what tells a run apart in a sweep of this process; None if it is single, or has a process of its own."""
    cfg = HydraConfig.get()
    if cfg.mode is not RunMode.MULTIRUN or not str(cfg.launcher._target_).endswith("BasicLauncher"):
        return None
    return str(cfg.job.override_dirname)


def discard_run() -> None:
    """Delete the folder of the run that has failed, if it is new and has nothing but configuration and logs."""
    cfg, here = HydraConfig.get(), Path.cwd()
    folder = Path(cfg.sweep.dir if cfg.mode is RunMode.MULTIRUN else cfg.runtime.output_dir).absolute()
    if folder in {here, *here.parents, *FormerFolders.found} or not all(map(_is_discardable, folder.rglob("*"))):
        return
    shutil.rmtree(folder)
    for parent in folder.parents:  # `logs/train/runs`, if this was the first run
        if here not in parent.parents or any(parent.iterdir()):
            break
        parent.rmdir()


def _is_discardable(path: Path) -> bool:
    """Return whether a path is a folder, or a file that Hydra or a logger writes before a run begins."""
    return path.is_dir() or path.suffix in (".yaml", ".log") or path.name.startswith("events.out.tfevents.")
