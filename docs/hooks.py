"""What mkdocs does not do by itself: the tables of Hydra keys, included files, and links out of the documentation.

A page has `<!-- hydra groups -->` where the tables are to stand, and `<!-- include PATH#heading -->` for a section of a
file of the repository. Links from a page to such a file are links to the code host on the site.
"""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import OmegaConf

from lightning_revlib.cli import help

ROOT = Path(__file__).parent.parent
CONF = ROOT / "conf"
log = logging.getLogger("mkdocs.hooks")


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Return a page's text as mkdocs is to render it."""
    markdown = markdown.replace("<!-- hydra groups -->", hydra_groups())
    markdown = re.sub(r"<!-- include (\S+?)#(.+?) -->", lambda m: section(ROOT / m[1], m[2]), markdown)
    folder = (ROOT / "docs" / page.file.src_uri).parent

    def link(match: re.Match[str]) -> str:
        target = os.path.normpath(folder / match[1])
        if target.startswith(str(ROOT / "docs")):
            return match[0]
        if not os.path.exists(target):
            log.warning("%s links to %s, which is not there", page.file.src_uri, match[1])
        return f"]({config.repo_url}/blob/main/{os.path.relpath(target, ROOT)}{match[2] or ''})"

    return re.sub(r"\]\((\.\.?/[^)#\s]+)(#[^)\s]*)?\)", link, markdown)


def section(path: Path, heading: str) -> str:
    """Return the text under a heading of the second level, without the heading."""
    found = re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", path.read_text(), re.DOTALL | re.MULTILINE)
    if found is None:
        log.warning("%s has no heading %r", path, heading)
        return ""
    return found[1]


class Key(NamedTuple):
    """A key of a configuration file."""

    name: str  # with dots, as on the command line
    value: str
    meaning: str


class File(NamedTuple):
    """A configuration file, read with its comments."""

    name: str  # relative to conf/, without .yaml
    intro: str
    commands: list[str]
    target: str
    keys: list[Key]


def read(path: Path) -> File:
    """Return what a file says of itself, and its keys."""
    name = path.relative_to(CONF).with_suffix("").as_posix()
    group = name.split("/")[0] if "/" in name and "@package _global_" not in path.read_text() else ""
    said = help.read(path, group)
    values: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    target = values.get("_target_") or next((x["_target_"] for x in values.values() if _has_target(x)), "")
    leaves = help.leaves({k: v for k, v in values.items() if k != "defaults"}, f"{group}." if group else "")
    keys = [Key(key, value, said.comments.get(key, "")) for key, value in leaves]
    return File(name, said.description, [line.strip() for line in said.examples], target, keys)


def _has_target(value: Any) -> bool:
    return isinstance(value, dict) and "_target_" in value


def files() -> list[File]:
    """Return all files of conf/. A key without a comment has that of the same key elsewhere."""
    found = [read(path) for path in sorted(CONF.rglob("*.yaml"))]
    found.sort(key=lambda file: ("/" in file.name, file.name.startswith(("experiment/", "hparams")), file.name))
    meanings = {key.name: key.meaning for file in reversed(found) for key in file.keys if key.meaning}
    return [
        file._replace(keys=[key._replace(meaning=key.meaning or meanings.get(key.name, "")) for key in file.keys])
        for file in found
    ]


def hydra_groups() -> str:
    """Return the tables of all files, one heading a group and one a file."""
    text, group = [], None
    for file in files():
        head, _, option = file.name.rpartition("/")
        if head != group:
            group = head
            text.append(f"## {group}\n" if group else "## The commands\n")
        text.append(f"### {group}={option}\n" if group else f"### revlib {option}\n")
        text.append(_escape(file.intro) + "\n")
        if file.target:
            text.append(f"Makes `{file.target}`.\n")
        if file.commands:
            text.append("```bash\n" + "\n".join(file.commands) + "\n```\n")
        if file.keys:
            text.append("| key | value | meaning |\n|---|---|---|")
            text += [f"| `{k.name}` | {_code(k.value)} | {_escape(k.meaning)} |" for k in file.keys]
            text.append("")
    return "\n".join(text)


def _code(value: str) -> str:
    return f"`{value}`".replace("|", "\\|") if value and value != "|" else ""


def _escape(text: str) -> str:
    """Return a comment as Markdown: addresses as links, signs of Markdown and HTML as they are."""
    text = re.sub(r"([|<>*])", lambda m: {"<": "&lt;", ">": "&gt;"}.get(m[1], "\\" + m[1]), text)
    return re.sub(r"(https?://[^\s,;]+[^\s,;.])", r"[\1](\1)", text)
