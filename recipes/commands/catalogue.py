"""Run `revlib list` and `revlib copy`: list recipes, experiments and other options, and copy one to edit."""

from __future__ import annotations

import difflib
import importlib.util
import re
from pathlib import Path

from lightning_revlib import conf

CONF = Path(conf.__file__).parent
GROUPS = ("recipe", "experiment", "data")
TARGET = re.compile(
    r"^(?P<key>\s+_target_: )(?P<module>lightning_revlib\.recipes\.(?:\w+\.)*(?P<name>\w+))\.", re.MULTILINE
)


def show_list(groups: list[str]) -> None:
    """Print the options of the named groups, by default of GROUPS, with a line about each."""
    known = sorted(path.name for path in CONF.iterdir() if path.is_dir() and any(path.glob("*.yaml")))
    for group in groups or GROUPS:
        if group not in known:
            near = difflib.get_close_matches(group, known, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise ValueError(f"revlib list {group}: no such group{hint}; groups are {', '.join(known)}")
        options = {path.stem: describe(path) for path in sorted((CONF / group).glob("*.yaml"))}
        print(f"{group}=")
        for name, what in options.items():
            print(f"  {name:<{max(map(len, options))}}  {what}")


def describe(file: Path) -> str:
    """Return the first line of a configuration's comment."""
    lines = [line for line in file.read_text().splitlines() if line.startswith("# ") and "@package" not in line]
    return lines[0].removeprefix("# ") if lines else ""


def copy_out(arguments: list[str]) -> None:
    """Write a recipe's configuration and module, or an experiment, into a folder, and print how to run them."""
    names = {path.stem: path for group in ("experiment", "recipe") for path in (CONF / group).glob("*.yaml")}
    if not 1 <= len(arguments) <= 2 or arguments[0] not in names:
        near = difflib.get_close_matches(arguments[0], names, n=1) if arguments else []
        hint = f" (did you mean {near[0]}?)" if near else ""
        given = " ".join(["revlib copy", *arguments])
        raise ValueError(f"{given}{hint}: write revlib copy NAME [FOLDER]; names are {', '.join(sorted(names))}")
    name, folder = arguments[0], Path(arguments[1] if len(arguments) == 2 else ".")
    group, text = names[name].parent.name, names[name].read_text()
    files = {}
    if group == "recipe" and (target := TARGET.search(text)):
        text = TARGET.sub(rf"\g<key>my_{target['name']}.", text, count=1)
        spec = importlib.util.find_spec(target["module"])
        assert spec is not None and spec.origin is not None
        files[folder / f"my_{target['name']}.py"] = Path(spec.origin).read_text()
    files[folder / group / f"my_{name}.yaml"] = text.replace(
        f"revlib train {group}={name}", f"revlib train --config-dir . {group}=my_{name}"
    )
    if existing := [str(file) for file in files if file.exists()]:
        raise ValueError(f"{', '.join(existing)} exists already; name another folder: revlib copy {name} FOLDER")
    for file, content in files.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
        print(f"wrote {file}")
    where = "" if folder == Path(".") else f"cd {folder} && "
    print(f"{where}revlib train --config-dir . {group}=my_{name}")
