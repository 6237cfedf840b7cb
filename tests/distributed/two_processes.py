"""Run a function in two processes that form a group, as a launcher such as torchrun would start them."""

from __future__ import annotations

import multiprocessing
import os
import random
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any
from unittest import mock

import torch

ROOT = Path(__file__).parents[2]
PROGRAMS = [
    f"tests.distributed.{name}"
    for name in ("breakdown", "cells", "checkpoints", "killed_training", "layers", "sharded")
]
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"}


def run(function: Callable[..., None], out: Path, *arguments: Any, processes: int = 2, timeout: int = 300) -> Any:
    """Call `function(out, *arguments)` in each process and return what it has saved as `out/result.pt`.

    The processes are forks of one that has imported torch and Lightning, which takes longer than most programs. A
    single process is no rank; it may start some itself.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PROGRAMS)
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    started = []
    for rank in range(processes):
        ranks = {"WORLD_SIZE": str(processes), "LOCAL_RANK": str(rank), "NODE_RANK": "0"} if processes > 1 else {}
        started.append(context.Process(target=_main, args=(rank, {**group, **ranks}, function, out, arguments)))
    with mock.patch.dict(os.environ, ENVIRONMENT):
        for process in started:
            process.start()
    try:
        _join(started, time.monotonic() + timeout)
    finally:
        for process in started:
            process.kill()
            process.join()
    outputs = "\n".join(path.read_text()[-6000:] for path in out.glob("output-*.txt"))
    assert [process.exitcode for process in started] == [0] * processes, outputs
    return torch.load(out / "result.pt", weights_only=True)


def _join(started: list[Any], deadline: float) -> None:
    """Wait until all have ended, one has failed, or the time is over."""
    while running := [process.sentinel for process in started if process.exitcode is None]:
        if any(process.exitcode for process in started) or time.monotonic() > deadline:
            return
        wait(running, timeout=deadline - time.monotonic())


def _main(rank: int, environment: dict[str, str], function: Callable[..., None], out: Path, arguments: Any) -> None:
    """Call the function in one of the processes, with its output in a file."""
    os.environ.update(environment)
    file = os.open(out / f"output-{rank}.txt", os.O_WRONLY | os.O_CREAT)
    for standard in (1, 2):
        os.dup2(file, standard)
    sys.stdout, sys.stderr = (open(standard, "w", buffering=1, closefd=False) for standard in (1, 2))
    torch.set_num_threads(1)
    function(out, *arguments)


def free_port() -> int:
    """Return a port that nothing listens on, and that the system gives to nobody until the group listens on it."""
    while True:
        port = random.SystemRandom().randrange(20000, 32000)  # tests have seeded the other generators
        with socket.socket() as found, suppress(OSError):
            found.bind(("127.0.0.1", port))
            return port
