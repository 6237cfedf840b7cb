"""The panel that a command prints at the end: its results, and the paths of its files."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from lightning_revlib.nn.meter import format_bytes

Row: TypeAlias = tuple[str, str]
Bytes: TypeAlias = dict[str, tuple[int, int]]  # held after forward and peak in backward, by way of execution
NAMES = {
    "acc": "accuracy",
    "bpb": "bits per byte",
    "unigram": "bits per byte, by frequency of bytes",
    "bz2": "bits per byte, by bz2",
}


def show(title: str, rows: Sequence[Row]) -> None:
    """Print rows of names and values in a frame."""
    table = Table.grid(padding=(0, 2))
    for name, value in rows:
        table.add_row(Text(name, style="bold"), Text(value, overflow="fold"))
    Console().print(Panel(table, title=title, title_align="left", expand=False))


def show_training(
    metrics: Mapping[str, float],
    found: Bytes | None,
    drift: str,
    seconds: float,
    logs: str,
    best: str | None,
    *,
    run: Sequence[Row] = (),
    plans: Sequence[str] = (),
    measured: str | None = None,
    original: Mapping[str, float] | None = None,
) -> None:
    """Print the results of `revlib train`.

    `run` says which run it is. `found` are the bytes of one forward and backward of each kind on one batch; `measured`
    is the shape of the part of the batch that was used, None for the whole batch. `original` are a pretrained model's
    metrics before training.
    """
    best = best and os.path.relpath(best)
    rows = [
        *run,
        *((f"held-out {NAMES.get(name, name)}", _format(name, value)) for name, value in _tested(metrics).items()),
        *((f"the original's {name}", _format(name, value)) for name, value in _tested(original or {}).items()),
        *([] if found is None else _activations(found)),
        *([] if found is None or measured is None else [("both measured on", f"the first of a batch: {measured}")]),
        *(("memory plan", plan.removeprefix("memory plan: ")) for plan in plans),
        ("drift", drift),
        ("training", f"{seconds:.1f} s"),
        ("logs", os.path.relpath(logs)),
        ("last checkpoint" if best and Path(best).stem == "last" else "best checkpoint", _within(best, logs)),
    ]
    show("revlib train", rows)
    if best:  # outside the frame, so that it can be copied in one piece
        print(f"revlib predict {shlex.quote(checkpoint_word(best))}")


def _within(path: str | None, folder: str) -> str:
    """Return a path from the folder on, as the folder has a row of its own."""
    inside = path is not None and Path(path).absolute().is_relative_to(Path(folder).absolute())
    return os.path.relpath(path, folder) if inside else path or "none kept"  # type: ignore[arg-type]


def checkpoint_word(path: str) -> str:
    """Return the override that names a checkpoint, quoted if its path would be read as several."""
    return f"ckpt_path='{path}'" if "," in path else f"ckpt_path={path}"


def _tested(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return the metrics of the held-out data, with the loss only if it is the only one."""
    tested = {k.removeprefix("test/"): v for k, v in metrics.items() if k.startswith("test/")}
    return {k: v for k, v in tested.items() if k != "loss"} or tested


def _format(name: str, value: float) -> str:
    """Return a metric's value as text."""
    return f"{value:.2%}" if name.startswith("acc") else f"{value:.4g}"


def _activations(found: Bytes) -> list[Row]:
    """Return the rows of activation bytes."""
    pairs = zip(found["plain"], found["reversible"], strict=True)
    return [
        (name, f"{format_bytes(a)} by autograd, {format_bytes(b)} reversible: {_compare(a, b)}")
        for name, (a, b) in zip(("activations held", "peak in backward"), pairs, strict=True)
    ]


def _compare(plain: int, reversible: int) -> str:
    """Return by how much the reversible bytes are fewer, or more."""
    return f"{plain / reversible:.1f} x less" if plain >= reversible else f"{reversible / plain:.1f} x more"
