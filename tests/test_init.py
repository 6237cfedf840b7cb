"""The package's names, which are imported when they are used."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import lightning_revlib as revlib


def test_names_are_imported_when_they_are_used_and_strategies_registered_when_lightning_is() -> None:
    code = """
import sys, lightning_revlib as revlib
assert not {"torch", "lightning"} & {*sys.modules}
assert not hasattr(revlib, "no_such_name") and revlib.nn.swap is revlib.swap
assert {"swap", "ReversibleStrategy"} < {*dir(revlib)}
assert "torch" in sys.modules and "lightning" not in sys.modules
import lightning
options = {"strategy": "reversible", "accelerator": "cpu", "devices": 1}
assert type(lightning.Trainer(**options, logger=False).strategy) is revlib.ReversibleStrategy
assert type(lightning.Fabric(**options).strategy) is revlib.ReversibleFabricStrategy
from lightning_revlib import *
assert ReversibleStrategy is revlib.ReversibleStrategy
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_type_checker_sees_the_names_that_the_package_has() -> None:
    body = ast.parse(Path(revlib.__file__).read_text()).body
    (block,) = [node for node in body if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)]
    imported = {(alias.name, node.module) for node in block.body for alias in node.names}
    names = {name for name, _ in imported - {("*", "lightning_revlib.nn")}} | {*revlib.nn.__all__}
    assert names == {*revlib.__all__, "ReversibleTrainerCallback"}
    for name, module in imported - {("*", "lightning_revlib.nn")}:
        assert getattr(importlib.import_module(module), name) is getattr(revlib, name)
