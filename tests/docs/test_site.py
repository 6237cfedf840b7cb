"""The site: it builds strictly, its links lead somewhere, every public name is in it, and a browser can show it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

import lightning_revlib

pytest.importorskip("mkdocs")
pytest.importorskip("mkdocstrings")
ROOT = Path(__file__).parents[2]
# what a newcomer types, and the pages that answer
WORDS = {
    "install": {"index.html"},
    "pretrained": {"guide/models.html"},
    "peft": {"guide/models.html"},
    "budget": {"guide/budgets.html"},
    "U-Net": {"guide/unet.html"},
    "FLOPs": {"recipes/index.html"},
    "drift": {"guide/exactness.html"},
    "dropout": {"guide/exactness.html", "guide/faq.html"},
    "fsdp": {"guide/distributed.html", "reference/strategies.html"},
    "notebook": {"guide/distributed.html", "guide/faq.html"},
    "coupling": {"guide/choosing.html"},
    "checkpoint": {"guide/choosing.html"},
    "resume": {"guide/cli.html", "guide/budgets.html", "guide/distributed.html"},
    "LightningCLI": {"guide/lightning-cli.html"},
    "slurm": {"reference/hydra.html"},
    "CUDA": {"measurements/cuda.html", "guide/faq.html"},
}


class Page(HTMLParser):
    """The links and anchors of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if anchor := given.get("id"):
            self.anchors.add(anchor)
        for name in ("href", "src"):
            if link := given.get(name):
                self.links.append(link)


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="session")
def pages(site: Path) -> dict[Path, Page]:
    return {path: Page(path) for path in site.rglob("*.html") if path.name != "404.html"}


def test_links_and_anchors(pages: dict[Path, Page]) -> None:
    broken = []
    for path, page in pages.items():
        for link in page.links:
            if re.match(r"[a-z]+:|//", link):
                continue
            target, _, anchor = unquote(link).partition("#")
            file = (path.parent / target.split("?")[0]).resolve() if target else path
            file = file / "index.html" if file.is_dir() else file
            if not file.exists():
                broken.append((path.name, link))
            elif anchor and file.suffix == ".html" and anchor not in pages[file].anchors | {"__skip"}:
                broken.append((path.name, link))
    assert broken == []


def test_links_to_the_repository(pages: dict[Path, Page]) -> None:
    base = "https://github.com/lightning-revlib/lightning-revlib/blob/main/"
    links = {link.split("#")[0] for page in pages.values() for link in page.links if link.startswith(base)}
    assert links and [link for link in links if not (ROOT / link.removeprefix(base)).exists()] == []


@pytest.mark.parametrize("name", [*lightning_revlib.__all__, "ReversibleTrainerCallback"])
def test_every_public_name_has_its_place(name: str, pages: dict[Path, Page]) -> None:
    reference = set().union(*(page.anchors for path, page in pages.items() if path.parent.name == "reference"))
    assert any(anchor.startswith("lightning_revlib.") and anchor.endswith(f".{name}") for anchor in reference)


@pytest.mark.parametrize("word", WORDS)
def test_search(word: str, site: Path) -> None:
    """Sections are ranked as the site ranks them: a word in a title counts a thousand times."""
    scores: dict[str, float] = {}
    for section in json.loads((site / "search/search_index.json").read_text())["docs"]:
        text = len(re.findall(word, section["text"], re.IGNORECASE)) / (1 + len(section["text"]) / 1000)
        score = 1000 * len(re.findall(word, section["title"], re.IGNORECASE)) + text
        page = section["location"].split("#")[0]
        scores[page] = max(scores.get(page, 0), score)
    assert WORDS[word] & set(sorted(scores, key=lambda page: -scores[page])[:4])


@pytest.mark.parametrize("width", [400, 1400])
def test_no_page_is_wider_than_the_window(width: int, site: Path, pages: dict[Path, Page], tmp_path: Path) -> None:
    """Tables and code scroll inside of their own boxes."""
    if (browser := shutil.which("chromium") or shutil.which("chromium-browser")) is None:
        pytest.skip("needs chromium")
    names = sorted(path.relative_to(site).as_posix() for path in pages)
    frames = "".join(f'<iframe src="{name}" width="{width}" height="800"></iframe>' for name in names)
    (site / "frames.html").write_text(
        f"<body style='width:{width + 50}px'>{frames}<p id=found></p><script>onload = () => {{"
        "found.textContent = JSON.stringify([...document.querySelectorAll('iframe')].map("
        "f => [f.contentWindow.location.pathname, f.contentDocument.documentElement.scrollWidth]))}</script>"
    )
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files", "--dump-dom"]
    command = [browser, *options, f"--user-data-dir={tmp_path}", (site / "frames.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    (site / "frames.html").unlink()
    found = re.search(r'<p id="found">(.*?)</p>', done.stdout)
    assert found is not None, done.stderr
    widths = dict(json.loads(found[1]))
    assert len(widths) == len(names)
    assert {page: seen for page, seen in widths.items() if seen > width} == {}
