"""`revlib train | eval | predict | report | bench`, with Hydra overrides after the command; `revlib list | copy`.

The commands' work is in `lightning_revlib.recipes` and `bench`; their configuration in `lightning_revlib.conf`.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any

from lightning_revlib.cli.errors import CONFIG, explain, is_mistake, near

COMMANDS = {
    "train": ("train", "train a recipe, test its best checkpoint and print what was found"),
    "eval": ("evaluate", "test a checkpoint: revlib eval ckpt_path=..."),
    "predict": ("predict", "run a checkpoint on held-out data and show what it makes: revlib predict ckpt_path=..."),
    "report": ("report_memory", "draw the activation memory of a recipe against its depth"),
    "bench": ("bench", "measure this library beside others: revlib bench full=true"),
}
OTHERS = {
    "list": ("show_list", "the recipes and experiments, with a line about each: revlib list [GROUP ...]"),
    "copy": ("copy_out", "write a recipe's configuration and module out for editing: revlib copy NAME [FOLDER]"),
}
HELP = f"""\
usage: revlib COMMAND [-m] [group=option] [key=value] ...

{"".join(f"  {name:<9}{what}{chr(10)}" for name, (_, what) in (COMMANDS | OTHERS).items())}
  revlib train                                      i-RevNet on handwritten digits, the default
  revlib train depth=5 coupling=momentum            deeper, with another coupling
  revlib train coupling=momentum coupling.gamma=0.95
  revlib train strategy=auto                        ordinary autograd, to compare
  revlib train -m depth=2,3,4 seed=0,1              six runs, one after the other
  revlib train -m launcher=joblib depth=2,3,4       or side by side

`revlib COMMAND --help` lists groups, options and keys; eval "$(revlib -sc install=bash)" completes them by the tab
key (zsh and fish likewise). HYDRA_FULL_ERROR=1 adds the traceback to errors."""


class _Mistake(BaseException):
    """A user's error on its way out. Hydra lets it pass, since it is no Exception, and says nothing of its own."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    own_process, argv = argv is None, sys.argv[1:] if argv is None else list(argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(HELP)
        return 0 if argv else 2
    if argv[0] == "--version":
        from lightning_revlib import __version__

        print(f"revlib {__version__}")
        return 0
    command, *overrides = argv
    if own_process and (command == "bench" or "budget_sweep=true" in overrides):  # they take times
        from lightning_revlib.bench.allocator import fix_allocator

        fix_allocator()
    if command in OTHERS:
        from lightning_revlib.recipes.commands import catalogue

        try:
            getattr(catalogue, OTHERS[command][0])(overrides)
        except (ValueError, OSError) as error:
            return _fail(str(error))
        return 0
    complete = command in ("-sc", "--shell-completion")
    if command not in COMMANDS and not complete:
        known = [*COMMANDS, *OTHERS]
        return _fail(f"unknown command {command!r}{near(command, known)}; commands are {', '.join(known)}")
    from hydra.errors import HydraException

    overrides.sort(key=lambda word: word not in ("-m", "--multirun"))  # Hydra takes it in front only
    try:
        _complete(argv) if complete else _run(command, overrides)
    except _Mistake as mistake:
        return _fail(str(mistake))
    except (HydraException, ValueError) as error:
        if _full_error():
            raise
        return _fail(explain(error, command, overrides))
    return 0


def _complete(argv: Sequence[str]) -> None:
    """Shell completion by Hydra, of the command in the line: the shell asks the program without one."""
    command, line = "train", os.environ.get("COMP_LINE", "")
    if "query=" in "".join(argv):
        program, *words = line.split(maxsplit=2) or [""]
        if not words or words[0] not in COMMANDS or line == f"{program} {words[0]}":
            print(" ".join([*COMMANDS, *OTHERS]))
            return
        command, os.environ["COMP_LINE"] = words[0], f"{program} {words[1] if len(words) > 1 else ''}"
    _run(command, argv)


def _run(command: str, overrides: Sequence[str]) -> None:
    """Compose the command's configuration and run it, once or once for each point of a sweep."""
    import hydra
    from omegaconf import DictConfig

    original, traceback = sys.argv, _full_error()

    def task(cfg: DictConfig) -> Any:
        where = "bench.command" if command == "bench" else "recipes.commands.run"
        commands = importlib.import_module(f"lightning_revlib.{where}")
        sys.argv = original  # what Lightning starts again for each further device
        try:
            return getattr(commands, COMMANDS[command][0])(cfg)
        except Exception as error:
            if traceback or not is_mistake(error):
                raise
            raise _Mistake(explain(error, command, overrides)) from None

    sys.path.append(here := os.getcwd())  # where `revlib copy` puts modules
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come out of Hydra as they were raised
    sys.argv = [original[0], *overrides]
    try:
        hydra.main(config_path=CONFIG, config_name=command, version_base="1.3")(task)()
    finally:
        sys.argv = original
        sys.path.remove(here)
        if not traceback:
            del os.environ["HYDRA_FULL_ERROR"]


def _fail(message: str) -> int:
    print(f"revlib: {message}", file=sys.stderr)
    return 1


def _full_error() -> bool:
    return os.environ.get("HYDRA_FULL_ERROR") == "1"
