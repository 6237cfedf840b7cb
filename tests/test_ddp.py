"""Two processes: the callback under DDP gives DDP's own losses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest

import lightning_revlib as revlib


def main(out: Path) -> None:
    from tests.test_strategy import Net, data, trainer

    curves: dict[str, list[float]] = {}
    callbacks: dict[str, list[Any]] = {"plain": [], "reversible": [revlib.ReversibleCallback()]}
    for name, added in callbacks.items():
        L.seed_everything(5, verbose=False)
        net = Net()
        run = trainer(out, strategy="ddp", devices=2, precision="64-true", callbacks=added)
        run.fit(net, data())
        curves[name] = [loss.item() for loss in net.losses]
    if run.is_global_zero:
        (out / "curves.json").write_text(json.dumps(curves))


@pytest.mark.slow
def test_the_callback_under_ddp(tmp_path: Path) -> None:
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(Path(__file__)), str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    curves = json.loads((tmp_path / "curves.json").read_text())
    assert curves["reversible"] == pytest.approx(curves["plain"], rel=1e-10)
    assert len(curves["plain"]) == 6  # of twelve batches, half for each process


if __name__ == "__main__":
    main(Path(sys.argv[1]))
