"""Versions, machine, commit and date, on which a result depends."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path

import torch

from lightning_revlib.bench.allocator import ALLOCATOR
from lightning_revlib.bench.contestants import Contestant


def describe(contestants: Iterable[Contestant], device: torch.device, seed: int) -> dict[str, str]:
    """Return the lines that are written above the tables."""
    fixed = all(os.environ.get(name) for name in ALLOCATOR)
    named = {c.package: c for c in reversed(list(contestants)) if c.package != "torch"}
    missing = [c.name for c in named.values() if not c.installed]
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit(),
        "machine": f"{_processor()}, {os.cpu_count()} processors, {torch.get_num_threads()} threads",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "versions": ", ".join(
            [
                f"Python {platform.python_version()}",
                f"torch {torch.__version__}",
                *[f"{c.name} {c.version}" for c in reversed(named.values()) if c.installed],
            ]
        ),
        "not installed": ", ".join(reversed(missing)) or "none",
        "allocator": "fixed" if fixed else "as the system has it",
        "seed": str(seed),
    }


def commit() -> str:
    """Return the commit of the repository that holds this file, with "-dirty" if files have been changed since."""
    try:
        _git(
            "ls-files", "--error-unmatch", Path(__file__).name
        )  # the repository may be another one that contains the environment
        return _git("describe", "--always", "--dirty", "--abbrev=10")
    except (OSError, subprocess.CalledProcessError):
        return "no repository"


def _git(*arguments: str) -> str:
    folder = Path(__file__).parent
    return subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
