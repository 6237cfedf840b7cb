"""The page of Hydra groups has every key of every file of conf/, each with a meaning."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

ROOT = Path(__file__).parents[2]


def hooks() -> Any:
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs" / "hooks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


FILES = hooks().files()


def leaves(value: Any, path: str) -> Iterator[str]:
    """Yield the dotted names of values, without those that make an object."""
    for key, inner in value.items():
        if key.startswith("_") or key == "defaults":
            continue
        if isinstance(inner, dict) and inner:
            yield from leaves(inner, f"{path}{key}.")
        else:
            yield f"{path}{key}"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_every_key_has_its_meaning(file: Any) -> None:
    path = ROOT / "conf" / f"{file.name}.yaml"
    group = file.name.split("/")[0] if "/" in file.name and "@package _global_" not in path.read_text() else ""
    expected = set(leaves(OmegaConf.to_container(OmegaConf.load(path)), f"{group}." if group else ""))
    assert expected <= {key.name for key in file.keys}
    assert [key.name for key in file.keys if not key.meaning] == []
    assert file.intro


def test_the_page_has_all_files() -> None:
    page = hooks().hydra_groups()
    for path in (ROOT / "conf").glob("*/*.yaml"):
        assert f"### {path.parent.name}={path.stem}\n" in page
