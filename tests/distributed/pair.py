"""Runs a program of this folder in two processes and hands back what it wrote."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]


def start(program: str, *arguments: Any) -> subprocess.Popen[str]:
    """`python program arguments`, with output captured; a Trainer in it starts the second process."""
    keep = {k: v for k, v in os.environ.items() if k not in ("LOCAL_RANK", "WORLD_SIZE", "NODE_RANK", "MASTER_PORT")}
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", str(Path(__file__).parent / program), *map(str, arguments)],
        env={**keep, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(program: str, out: Path, *arguments: Any, timeout: int = 300) -> Any:
    """What the program has saved as `out/result.pt`."""
    process = start(program, out, *arguments)
    output, _ = process.communicate(timeout=timeout)
    assert process.returncode == 0, output[-6000:]
    return torch.load(out / "result.pt", weights_only=True)
