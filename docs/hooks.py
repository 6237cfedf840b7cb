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
    """Return a file's head, keys and comments. A comment stands on a key's line or on the lines before it."""
    name, lines = path.relative_to(CONF).with_suffix("").as_posix(), path.read_text().splitlines()
    end = next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))
    head = [line[1:] for line in lines[:end]]
    group = name.split("/")[0] if "/" in name and " @package _global_" not in head else ""
    intro = " ".join(line.strip() for line in head if not line.startswith(("   ", " @package")))
    commands = [line.strip() for line in head if line.startswith("   ")]
    keys, target, comment, parents = [], "", [], []
    skipped = None  # lines deeper than this are a list, a text of several lines or `defaults`
    for line in lines[end:]:
        indent = len(line) - len(line.lstrip())
        if skipped is not None and line.strip() and (indent > skipped or line.lstrip().startswith("- ")):
            continue
        skipped = None
        if line.lstrip().startswith("#"):
            comment.append(line.strip("# "))
            continue
        if not (found := re.match(r"\s*([\w.]+):\s*((?!#).*?)?\s*(?:(?<=\s)# (.*))?$", line)):
            comment = []
            continue
        key, value, beside = (part or "" for part in found.groups())
        parents = [*parents[: indent // 2], key]
        meaning, comment = beside or " ".join(comment), []
        if key == "defaults" or value == "|":
            skipped = indent
        if key == "_target_" and len(parents) < 3:
            target = value
        if key.startswith("_") or key == "defaults" or (not value and not meaning):
            continue
        keys.append(Key(".".join([group, *parents] if group else parents), value, meaning))
    return File(name, intro, commands, target, keys)


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
