"""Train under a limit of the process's memory, as by `ulimit -v`: which way ends, and with what resident set.

    revlib bench study=resident

Three processes train the same stack of 128 blocks, each by SGD: by ordinary autograd, checkpointed, and
reversibly. When its model and its gradients exist, a process limits its address space (RLIMIT_AS, which `ulimit -v`
sets) to what it has then and 192 MiB. Three further processes train without the limit; the peak resident set is theirs,
as the operating system says. Needs Linux.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

from lightning_revlib.nn import CoupledSequential, swap
from lightning_revlib.nn.meter import format_bytes

WAYS = ("plain", "checkpoint", "reversible")
DEPTH, WIDTH, ROWS, STEPS = 128, 32, 16_384, 1
ROOM = 192 * 2**20  # bytes above those of the model and its gradients


def train(way: str, room: int | None) -> None:
    """Train in this process, with so many bytes above the model or without a limit; print the peak resident set."""
    import resource  # not on Windows

    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)) for _ in range(DEPTH)]
    model = CoupledSequential(*blocks)
    if way != "plain":
        swap(model, {"": {"treatments": [way] * DEPTH}})
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    for few in (ROWS // 16, ROWS):  # the first step, on few rows, makes gradients and loads what torch loads late
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        if few == ROWS and room is not None:
            limit = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE") + room
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        for _ in range(STEPS):
            model(torch.randn(few, 2 * WIDTH)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def row(way: str) -> str:
    """Return a line of Markdown about two processes that train in a way."""
    limited, free = _run(way, str(ROOM)), _run(way)
    if free.returncode:
        raise RuntimeError(free.stderr)
    ended = f"died: {_reason(limited.stderr)}" if limited.returncode else "trained"
    return f"| {way} | {ended} | {format_bytes(int(free.stdout))} |"


def _reason(text: str) -> str:
    found = re.search(r"can't allocate memory: you tried to allocate \d+ bytes", text)
    return found[0] if found else text.strip().splitlines()[-1]


def _run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", __name__, *words], capture_output=True, text=True)


def main() -> None:
    """Print a table. Raises ValueError on other systems than Linux."""
    if sys.platform != "linux":
        raise ValueError("study=resident: it reads /proc and limits the address space, which needs Linux")
    print(f"{DEPTH} blocks, {ROWS} rows, {format_bytes(ROOM)} above the model and its gradients\n")
    print("| | under the limit | peak resident set without it |\n|---|---|--:|")
    for way in WAYS:
        print(row(way), flush=True)


if __name__ == "__main__":
    train(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else None)
