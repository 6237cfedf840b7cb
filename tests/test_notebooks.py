"""The notebooks run from top to bottom, in folders of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parent.parent / "notebooks"


def run(name: str, folder: Path) -> list[Any]:
    """Return all outputs of a notebook."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    book = nbformat.read(FOLDER / name, 4)
    nbclient.NotebookClient(book, timeout=600, resources={"metadata": {"path": str(folder)}}).execute()
    return [output for cell in book.cells for output in cell.get("outputs", [])]


def text_of(outputs: list[Any]) -> str:
    return "".join(output.get("text", "") + output.get("data", {}).get("text/html", "") for output in outputs)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("ten_minutes.ipynb", "reversible {'loss': 0."),
        ("pretrained_model.ipynb", "drift 0.0, grid 2^-16"),
        ("memory_budget.ipynb", "<pre>memory plan: "),
    ],
)
def test_a_notebook_runs(name: str, told: str, tmp_path: Path) -> None:
    outputs = run(name, tmp_path)
    assert told in text_of(outputs)
    assert name == "pretrained_model.ipynb" or any("image/png" in output.get("data", {}) for output in outputs)
