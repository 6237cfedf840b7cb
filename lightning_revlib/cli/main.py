"""`revlib train | eval | predict | report | bench`, with Hydra overrides after the command; `revlib list | copy`.

The commands are in `lightning_revlib.recipes.commands` and `lightning_revlib.bench`, their configuration in
`lightning_revlib.conf`. A command is imported when it runs, so that help and completion wait neither for torch nor for
Lightning.
"""

from __future__ import annotations

import importlib
import math
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning_revlib.cli.errors import CONFIG, check_flags, explain, is_user_error, suggest

if TYPE_CHECKING:
    from omegaconf import DictConfig


class Command(NamedTuple):
    """A command's module and function, and its line in the help text."""

    module: str
    function: str
    summary: str
    usage: str = ""  # of a command without a configuration, which its help is made from

    def load(self) -> Callable[[Any], Any]:
        """Import the command's function."""
        return getattr(importlib.import_module(f"lightning_revlib.{self.module}"), self.function)


RUN, CATALOGUE = "recipes.commands.run", "recipes.commands.catalogue"
COMMANDS = {  # with a configuration of the same name
    "train": Command(RUN, "train", "train a recipe, test its best checkpoint and print the results"),
    "eval": Command(RUN, "evaluate", "test a checkpoint: revlib eval ckpt_path=..."),
    "predict": Command(RUN, "predict", "run a checkpoint on held-out data and show its output: ckpt_path=..."),
    "report": Command(
        "recipes.commands.memory_report", "report_memory", "draw the activation memory of a recipe against its depth"
    ),
    "bench": Command("bench.command", "bench", "measure this library beside others: revlib bench full=true"),
}
FIT = Command("recipes.commands.fit", "report_fit", "say whether a recipe's training fits into a memory")
BUDGET_SWEEP = Command("bench.command", "sweep_recipe", "measure a recipe under memory budgets")
OTHERS = {  # without a configuration
    "list": Command(
        CATALOGUE,
        "show_list",
        "list recipes, experiments and data, a line for each: revlib list [GROUP ...]",
        """usage: revlib list [GROUP ...]

Prints the options of each group, a line about each; without a group, of recipe, experiment and data.
  revlib list
  revlib list coupling strategy""",
    ),
    "copy": Command(
        CATALOGUE,
        "copy_out",
        "write a recipe's configuration and module to edit: revlib copy NAME [FOLDER]",
        """usage: revlib copy NAME [FOLDER]

Writes the configuration of a recipe or an experiment, and a recipe's module, into a folder, by default this one, and
prints the line that runs the copy. A file that exists is not overwritten.
  revlib copy irevnet mine
  revlib copy reformer_topics""",
    ),
}
HELP = f"""\
usage: revlib COMMAND [-m] [group=option] [key=value] ...

{"".join(f"  {name:<9}{command.summary}{chr(10)}" for name, command in (COMMANDS | OTHERS).items())}
  revlib train                                      i-RevNet on handwritten digits, the default
  revlib train depth=5 coupling=momentum            deeper, with another coupling
  revlib train coupling=momentum coupling.gamma=0.95
  revlib train strategy=auto                        ordinary autograd, to compare
  revlib train -m depth=2,3,4 seed=0,1              six runs, one after the other
  revlib train -m launcher=joblib depth=2,3,4       or side by side
  revlib bench study=memory                         a study; `revlib bench --help` lists all

`revlib COMMAND --help` lists groups, options and keys. eval "$(revlib -sc install=bash)" completes them by the tab
key (zsh and fish likewise). HYDRA_FULL_ERROR=1 adds the traceback to errors."""


class _UserError(BaseException):
    """Carries a user's error out of Hydra, which prints a message of its own for each Exception."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status: 130 after Ctrl-C, 141 if the reader of the output has gone."""
    words = sys.argv[1:] if argv is None else list(argv)
    try:
        try:
            return _run_words(words, own_process=argv is None)
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt as error:
        return _fail(_resumption(words, *error.args), status=130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python writes the rest when it ends
        return 141


def _run_words(argv: list[str], *, own_process: bool) -> int:
    """Run the command that the words of a command line name, and return the exit status."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(HELP)
        return 0 if argv else 2
    if argv[0] == "--version":
        from lightning_revlib import __version__

        print(f"revlib {__version__}")
        return 0
    command, *overrides = argv
    if own_process and (command == "bench" or "budget_sweep=true" in overrides):  # commands that measure times
        from lightning_revlib.bench.allocator import fix_allocator

        fix_allocator()
    if command in ("-sc", "--shell-completion"):
        return _run(*_read_completion(argv))
    if command not in (known := [*COMMANDS, *OTHERS]):
        return _fail(f"unknown command {command!r}{suggest(command, known)}; commands are {', '.join(known)}")
    if {"-h", "--help"} & {*overrides}:
        return _help(command, [word for word in overrides if "=" in word and not word.startswith("-")])
    if command in OTHERS:
        try:
            OTHERS[command].load()(overrides)
        except BrokenPipeError:
            raise
        except (ValueError, OSError) as error:
            return _fail(str(error))
        return 0
    return _run(command, sorted(overrides, key=lambda word: word not in ("-m", "--multirun")))  # Hydra needs -m first


def _help(command: str, overrides: list[str]) -> int:
    """Print the help of one command, with the groups that `overrides` choose, and return the exit status."""
    if command in OTHERS:
        print(OTHERS[command].usage)
        return 0
    from hydra.errors import HydraException

    from lightning_revlib.cli.help import show_help

    try:
        show_help(command, overrides)
    except HydraException as error:
        return _fail(explain(error, command, overrides))
    if command == "bench":
        from lightning_revlib.bench.studies import listing

        print(f"\n{listing()}")
    return 0


def _read_completion(argv: list[str]) -> tuple[str, list[str]]:
    """Return the command whose line the shell asks to complete, and the arguments of Hydra's completion.

    The line is in COMP_LINE. Hydra completes it without the command's name. Before that name is complete, an empty
    command stands for the list of commands.
    """
    line = os.environ.get("COMP_LINE", "")
    if "query=" not in "".join(argv):
        return "train", argv
    program, *words = line.split(maxsplit=2) or [""]
    if not words or words[0] not in COMMANDS or line == f"{program} {words[0]}":
        return "", argv
    os.environ["COMP_LINE"] = f"{program} {words[1] if len(words) > 1 else ''}"
    return words[0], argv


def _run(command: str, overrides: list[str]) -> int:
    """Run a command by Hydra, and return the exit status; an empty command lists all."""
    from hydra.errors import HydraException

    if not command:
        print(" ".join([*COMMANDS, *OTHERS]))
        return 0
    try:
        check_flags(command, overrides)
        _compose_and_run(command, _with_settings(command, overrides))
    except _UserError as error:
        return _fail(str(error))
    except BrokenPipeError:
        raise
    except (HydraException, ValueError, OSError) as error:
        if _full_error():
            raise
        return _fail(explain(error, command, overrides))
    return 0


def _with_settings(command: str, overrides: list[str]) -> list[str]:
    """Return the overrides with those of the checkpoint that they name, which may be in the folder of a run."""
    paths = {w: w.partition("=")[2].strip("'\"") for w in overrides if w.lstrip("+").startswith("ckpt_path=")}
    (word, path), *others = paths.items() or [("", "")]
    is_sweep = "," in path and word == f"ckpt_path={path}"  # else it is quoted
    if command == "bench" or others or path in ("", "null", "???") or is_sweep:
        return overrides
    from lightning_revlib.recipes.commands.checkpoint import find, key_of, settings

    file = find(path, command)
    taken = settings(file, command, {key_of(each) for each in overrides})
    place = overrides.index(word)  # in one row: argparse takes no others behind an option such as --config-dir
    return [*overrides[:place], f"ckpt_path='{file}'", *taken, *overrides[place + 1 :]]


def _compose_and_run(command: str, overrides: Sequence[str]) -> None:
    """Compose the command's configuration and run it, once or once for each point of a sweep."""
    import hydra

    from lightning_revlib.cli.folders import discard_run, name_in_sweep

    original, traceback = sys.argv, _full_error()
    failed: list[str] = []  # messages of a sweep's runs

    def task(cfg: DictConfig) -> Any:
        chosen = COMMANDS[command]
        if command == "report":
            chosen = FIT if cfg.simulate else BUDGET_SWEEP if cfg.budget_sweep else chosen
        function = chosen.load()
        sys.argv = original  # the command line that Lightning starts again for each further device
        try:
            return function(cfg)
        except Exception as error:
            if traceback or not is_user_error(error):
                raise
            if (run := name_in_sweep()) is not None:  # others follow
                failed.append(explain(error, command, overrides))
                _fail(f"{run}: {failed[-1]}")
                return math.nan
            discard_run()
            raise _UserError(explain(error, command, overrides)) from None

    sys.path.append(here := os.getcwd())  # the folder into which `revlib copy` writes modules
    os.environ["HYDRA_FULL_ERROR"] = "1"  # makes Hydra pass errors on as they were raised
    sys.argv = [original[0], *overrides]
    try:
        hydra.main(config_path=CONFIG, config_name=command, version_base="1.3")(task)()
        if failed:
            raise _UserError(f"{len(failed)} of the sweep's runs failed")
    finally:
        sys.argv = original
        sys.path.remove(here)
        if not traceback:
            del os.environ["HYDRA_FULL_ERROR"]


def _resumption(words: Sequence[str], checkpoint: str | None = None) -> str:
    """Return what to say after Ctrl-C: the command line that resumes from a checkpoint, if there is one."""
    if not checkpoint:
        return "interrupted"
    from lightning_revlib.recipes.display.panel import checkpoint_word

    path = os.path.relpath(checkpoint)
    if {"-m", "--multirun"} & {*words}:
        return f"interrupted; a sweep cannot resume, but the run can that ckpt_path={path} is of"
    again = [word for word in words if not word.lstrip("+").startswith("ckpt_path=")]
    return f"interrupted; to resume: revlib {shlex.join([*again, checkpoint_word(path)])}"


def _fail(message: str, status: int = 1) -> int:
    """Print an error and return its exit status."""
    print(f"revlib: {message}", file=sys.stderr)
    return status


def _full_error() -> bool:
    """Return whether the user asked for tracebacks."""
    return os.environ.get("HYDRA_FULL_ERROR") == "1"


if __name__ == "__main__":
    sys.exit(main())
