"""Studies of `revlib bench study=NAME`: questions that the benchmark's cells do not answer.

A study is a module of this package with a function `main`, whose keyword arguments are keys of the configuration. The
first line of the module's docstring is its line in `revlib bench --help`. Nothing is imported before a study runs.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

NAMES = (
    "attention", "correctness", "drift", "llama", "memory", "minilm", "models", "overhead", "peaks", "recipes",
    "resident", "smollm2",
)  # fmt: skip
STUDIES = {name: f"{__name__}.{name}" for name in NAMES}
# Keys whose default is null: a study that does not take one of them refuses a value.
OPTIONAL = (
    "batch", "builds", "contestants", "depths", "experiments", "lengths", "overrides", "seconds", "steps", "threads",
    "widths", "workloads",
)  # fmt: skip


def run(name: str, options: Mapping[str, Any]) -> None:
    """Run a study with those of the options that it takes.

    Raises ValueError for a name that is no study, and for an optional key that the study does not take.
    """
    if name not in STUDIES:
        near = difflib.get_close_matches(str(name), STUDIES, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise ValueError(f"study={name}: no such study{hint}; studies are {', '.join(STUDIES)}")
    main = importlib.import_module(STUDIES[name]).main
    taken = inspect.signature(main).parameters
    if unknown := [key for key in OPTIONAL if key in options and key not in taken]:
        raise ValueError(
            f"{unknown[0]}={options[unknown[0]]}: study={name} does not take it; it takes {', '.join(taken)}"
        )
    main(**{key: value for key, value in options.items() if key in taken})


def summary(name: str) -> str:
    """Return the first line of a study's docstring, without importing the study."""
    source = Path(__file__).with_name(f"{name}.py").read_text()
    return (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]


def listing() -> str:
    """Return the studies' part of the help text."""
    lines = [f"  {name:<{max(map(len, STUDIES))}}  {summary(name)}" for name in STUDIES]
    return "\n".join(["Studies, each run by `revlib bench study=NAME`:", "", *lines])


def from_checkout(module: str) -> Any:
    """Import a module of this project's tests; ValueError if the command does not run in a checkout."""
    try:
        return importlib.import_module(f"tests.{module}")
    except ModuleNotFoundError as error:
        if not str(error.name).startswith("tests"):
            raise
        raise ValueError(
            f"this study uses tests/{module.replace('.', '/')}.py: run it in a checkout of the repository"
        ) from error
