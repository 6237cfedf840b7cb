"""`revlib COMMAND --help`: the command's groups and keys, with their meaning from the comments of its configuration.

A comment of a yaml file belongs to the key on its line, or else to the key on the next line.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lightning_revlib.cli.errors import CONFIG

HIDDEN = {"", "task", "paths", "hydra"}  # keys and groups that nobody needs to set
UNUSED = {"report": {"logger", "callbacks", "trainer", "scheduler", "launcher", "hparams_search", "optimized_metric"}}
LINE = re.compile(r"(?P<indent> *)(?:- )?(?P<key>[\w/@.]+):(?P<value>[^#]*)(?:# (?P<comment>.*))?$")
FOOTER = """\
Several values, a,b,c, with -m run one after the other. `revlib list GROUP` says what each option is.
--cfg job prints the values as yaml, --info searchpath where files are read, --config-dir DIR adds a folder of yours."""


class File(NamedTuple):
    """What a yaml file says of itself: its description, its launch lines, and the comment of each dotted key."""

    description: str
    examples: list[str]
    comments: dict[str, str]


def show_help(command: str, overrides: Sequence[str] = ()) -> None:
    """Print the groups and keys of a command, with the options that `overrides` choose."""
    from hydra import compose, initialize_config_module
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf import OmegaConf

    from lightning_revlib import conf

    GlobalHydra.instance().clear()
    with initialize_config_module(CONFIG.removeprefix("pkg://"), version_base="1.3"):
        cfg = compose(command, [*overrides], return_hydra_config=True)
    hidden = HIDDEN | UNUSED.get(command, set())
    choices = {g: c for g, c in cfg.hydra.runtime.choices.items() if "hydra" not in g and g not in hidden}
    values: dict[str, Any] = OmegaConf.to_container(cfg, resolve=False)  # type: ignore[assignment]
    root = Path(conf.__file__).parent
    file = read(root / f"{command}.yaml")
    comments = {**(read(root / "train.yaml").comments if command == "report" else {}), **file.comments}
    print(f"usage: revlib {command} [-m] [group=option] [key=value] ...\n\n{file.description}")
    print("".join(f"{line}\n" for line in file.examples))
    if choices:
        print("Groups, each with the option chosen now:")
    for group, choice in sorted(choices.items()):
        others = [path.stem for path in sorted((root / group).glob("*.yaml")) if path.stem != choice]
        about = [comments.get(f"defaults.{group}", ""), f"or {', '.join(others)}" if others else ""]
        _print_row(f"{group}={as_override(choice)}", "; ".join(filter(None, about)))
        for option in [choice] if isinstance(choice, str) else choice or ():
            comments |= read(root / group / f"{option}.yaml", group).comments
    print("\nKeys, each with its value now:" if choices else "Keys, each with its value now:")
    for key in values.get("recipe") or ():
        if values.get(key) == "???":  # the recipe has its own
            values[key] = cfg.recipe[key]
            comments[key] = comments.get(f"recipe.{key}") or comments[key]
    for key, value in leaves({k: v for k, v in values.items() if k not in hidden}):
        if not (value.startswith("${") and "." in key):  # which another key sets
            _print_row(f"{key}={value}", comments.get(key, ""))
    print(f"\n{FOOTER}")


def _print_row(left: str, right: str) -> None:
    """Print two columns, the second of several lines if it is long."""
    lines = textwrap.wrap(right, 72) or [""]
    for first, line in zip([left, *[""] * len(lines)], lines, strict=False):
        print(f"  {first:<44} {line}".rstrip())


def read(path: Path, group: str = "") -> File:
    """Read the comments of a yaml file; `group` is the package of its keys unless the file says otherwise."""
    lines = path.read_text().splitlines() if path.exists() else []
    head = [line for line in lines if "@package" not in line]
    end = next((i for i, line in enumerate(head) if not line.startswith("#")), len(head))
    header, body = [line.removeprefix("#").removeprefix(" ") for line in head[:end]], head[end:]
    package = "" if any("@package _global_" in line for line in lines) else group
    parents: list[tuple[int, str]] = [(-1, package)] if package else []
    comments: dict[str, str] = {}
    above: list[str] = []
    for line in body:
        if line.lstrip().startswith("#"):
            above.append(line.strip("# "))
        elif found := LINE.match(line):
            indent = len(found["indent"])
            parents = [(i, key) for i, key in parents if i < indent]
            parents.append((indent, found["key"]))
            comments[".".join(key for _, key in parents)] = " ".join([*above, found["comment"] or ""]).strip()
            above = []
    examples = [line for line in header if line.startswith("  ")]
    return File(" ".join(line for line in header if not line.startswith("  ")), examples, comments)


def leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield the dotted keys and values of a configuration, as they are written on the command line, without classes."""
    for key, value in node.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        elif not key.startswith("_"):
            yield f"{prefix}{key}", as_override(value)


def as_override(value: Any) -> str:
    """Return a value as it is written on the command line."""
    if isinstance(value, list):
        return f"[{','.join(map(as_override, value))}]"
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return str(value)
