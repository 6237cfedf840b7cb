"""Run `revlib bench`: all contestants in all cells, along budgets or up to the largest size, or a study."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from omegaconf import DictConfig, OmegaConf

from lightning_revlib.bench import largest, studies, sweep, tables, timing
from lightning_revlib.bench.cell import Row, cell
from lightning_revlib.bench.contestants import CONTESTANTS, Contestant
from lightning_revlib.bench.machine import describe
from lightning_revlib.bench.workloads import WORKLOADS, Size, Workload
from lightning_revlib.recipes.commands import memory_report

T = TypeVar("T")
SECONDS = {"quick": 1.0, "full": 10.0, "sweep": 30.0}  # least time of timing, for each cell
SPAN = {"quick": 65.0}  # seconds of the whole run that longer series may take
LARGEST_ON_CPU = {"depths": 4, "widths": 64, "lengths": 512}
LARGEST_ON_CUDA = {"depths": 16, "widths": 1024, "lengths": 16384}
SWEPT = ["transformer", "conv"]  # workloads of a sweep that names none


def bench(cfg: DictConfig) -> None:
    """Measure, print a summary, and write tables and pictures to the run's folder.

    A cell run writes bench.csv, bench.md and bench.png, a sweep writes sweep.*, and `largest` writes largest.md. A
    study prints its tables. Raises ValueError for unknown names and for sizes that are not possible.
    """
    if cfg.threads is not None:
        torch.set_num_threads(_whole("threads", cfg.threads))
    if cfg.study is not None:
        return studies.run(cfg.study, {str(key): _plain(value) for key, value in cfg.items() if value is not None})
    device = read_device(cfg.device)
    mode = "sweep" if cfg.sweep else "full" if cfg.full else "quick"
    torch.backends.cuda.matmul.allow_tf32 = True  # some peers recompute in float32
    known = largest.COMPARED if cfg.largest else CONTESTANTS
    contestants = list(pick("contestants", cfg.contestants, {c.name: c for c in known}))
    workloads = SWEPT if cfg.sweep and cfg.workloads is None else cfg.workloads
    chosen = [(w, s) for w in pick("workloads", workloads, WORKLOADS) for s in sizes(w, cfg, mode, device)]
    seconds = SECONDS[mode] if cfg.seconds is None else cfg.seconds
    if not isinstance(seconds, (int, float)) or seconds < 0:
        raise ValueError(f"seconds={seconds!r}: pass 0 or more; 0 counts and takes no times")
    head = {"command": _command(cfg), **describe(contestants, device, cfg.seed)}
    print("\n".join(f"{key}: {value}" for key, value in head.items()), flush=True)
    if cfg.largest:
        _run_largest(cfg, contestants, device, head)
    elif cfg.sweep:
        _run_sweep(cfg, chosen, device, seconds, head)
    else:
        _run_cells(cfg, chosen, contestants, device, mode, head)


def _run_cells(
    cfg: DictConfig,
    chosen: Sequence[tuple[Workload, Size]],
    contestants: Sequence[Contestant],
    device: torch.device,
    mode: str,
    head: Mapping[str, str],
) -> None:
    """Measure all contestants in all cells; files are written after each cell, so that an interrupted run has them."""
    begin, folder = time.perf_counter(), Path(cfg.paths.output_dir)
    rows: list[Row] = []
    times: dict[str, dict[str, list[float]]] = {}
    for done, (workload, size) in enumerate(chosen):
        seconds = cfg.seconds
        if seconds is None:  # half of the cell's share, since counting takes time as well
            left = SPAN.get(mode, 0.0) - (time.perf_counter() - begin)
            seconds = max(SECONDS[mode], left / (len(chosen) - done) / 2)
        with timing.frozen():
            found, taken = cell(workload, size, contestants, device=device, seconds=seconds, seed=cfg.seed)
        rows += found
        times[tables.cells(found)[0][0]] = taken
        print(f"{time.perf_counter() - begin:5.0f} s  {tables.cells(found)[0][0]}", flush=True)
        _write(folder, rows, times, head, chosen, device)
    tables.draw(folder / "bench.png", rows)
    print(f"\n{tables.summary(rows, times)}\n")
    for name in ("bench.md", "bench.csv", "bench.png"):
        print(os.path.relpath(folder / name))


def _run_sweep(
    cfg: DictConfig,
    chosen: Sequence[tuple[Workload, Size]],
    device: torch.device,
    seconds: float,
    head: Mapping[str, str],
) -> None:
    """Measure the curve of each workload, and write all of them."""
    curves = []
    for workload, size in chosen:
        torch.manual_seed(cfg.seed)
        curves.append(sweep.of_workload(workload, size, device, cfg.budgets, seconds, cfg.seed))
        print(f"\n{sweep.show(curves[-1])}", flush=True)
    sweep.write(Path(cfg.paths.output_dir), curves, head)


def _run_largest(
    cfg: DictConfig, contestants: Sequence[Contestant], device: torch.device, head: Mapping[str, str]
) -> None:
    """Search the largest sizes of each contestant, and write them after each one."""
    limit = largest.read_limit(cfg.largest, device)
    asked = {key: [_whole(key, each) for each in _listed(cfg[key])][:1] for key in ("depths", "widths", "lengths")}
    default = LARGEST_ON_CUDA if device.type == "cuda" else LARGEST_ON_CPU
    if not (asked["depths"] or asked["lengths"]):  # both are searched unless one is named
        asked |= {"depths": [default["depths"]], "lengths": [default["lengths"]]}
    width = (asked["widths"] or [default["widths"]])[0]
    depth, length = (next(iter(asked[key]), None) for key in ("depths", "lengths"))
    file, found = Path(cfg.paths.output_dir) / "largest.md", []
    file.parent.mkdir(parents=True, exist_ok=True)
    for one in largest.search(contestants, width, depth, length, limit, device):
        print(f"{one.contestant}: {largest.describe(one)}", flush=True)
        found.append(one)
        text = largest.section(found, width, depth, length, limit)
        file.write_text(tables.markdown("Benchmark", head, [text]))
    print(f"\n{text}\n\n{os.path.relpath(file)}")


def sweep_recipe(cfg: DictConfig) -> None:
    """Run `revlib report budget_sweep=true`: the curve of a recipe's network, on random input.

    Raises ValueError if the module has no `example_input_array`.
    """
    torch.manual_seed(cfg.seed)
    device = read_device("auto")
    module = memory_report.build(cfg)
    x = memory_report.sample(module, cfg.batch_size).to(device)
    x = torch.randn_like(x).requires_grad_() if x.is_floating_point() else x
    name = f"{memory_report.type_name(cfg)}-batch{cfg.batch_size}"
    curve = sweep.sweep(name, module.to(device), x, budgets=cfg.budgets, seed=cfg.seed)
    print(sweep.show(curve), flush=True)
    head = {"command": _command(cfg), **describe(sweep.RIVALS, device, cfg.seed)}
    sweep.write(Path(cfg.paths.output_dir), [curve], head)


def _write(
    folder: Path,
    rows: list[Row],
    times: Mapping[str, Mapping[str, list[float]]],
    head: Mapping[str, str],
    chosen: Sequence[tuple[Workload, Size]],
    device: torch.device,
) -> None:
    """Write the table of figures and the Markdown document of all cells so far."""
    folder.mkdir(parents=True, exist_ok=True)
    sections = [tables.summary(rows, times), LEGEND, *[tables.cell_table(*each) for each in tables.cells(rows)]]
    if device.type != "cuda":
        sections.append(_without_gpu([workload for workload, _ in chosen]))
    tables.write_csv(folder / "bench.csv", rows, head)
    (folder / "bench.md").write_text(tables.markdown("Benchmark", head, sections))


LEGEND = """\
## All figures

Held after forward and peak in backward are over the output's bytes, counted at dispatch. FLOPs are over plain's. A
step is forward and backward. All contestants take turns in one process, in an order that is drawn anew in each round.
"Of plain" is the median of the ratios within rounds, with an interval of 95 %. Gradients are compared with ordinary
autograd in float64, on a batch of 2."""


def _without_gpu(workloads: Iterable[Workload]) -> str:
    """Return the section of the cells that need a GPU and were not measured."""
    lines = [
        [f"{w.name}, depth {s.depth}, width {s.width}, batch {s.batch}", "not measured"]
        for w in {w.name: w for w in workloads}.values()
        for s in w.cuda
    ]
    return "## CUDA, bfloat16\n\n" + tables.table(["", "all contestants"], lines)


def sizes(workload: Workload, cfg: DictConfig, mode: str, device: torch.device) -> list[Size]:
    """Return the workload's own sizes, or those that `depths`, `widths` and `batch` name."""
    own = list(workload.cuda if device.type == "cuda" else workload.quick if mode == "quick" else workload.full)
    if mode == "sweep":
        own = [s for s in own if 12 <= s.depth <= 16][:1]
    elif mode == "quick":
        own = own[:3]
    if cfg.depths is None and cfg.widths is None:
        return [s if cfg.batch is None else s._replace(batch=_whole("batch", cfg.batch)) for s in own]
    depths = [_whole("depths", d) for d in _listed(cfg.depths)] or [own[-1].depth]
    widths = [_whole("widths", w) for w in _listed(cfg.widths)] or [own[-1].width]
    batch = own[-1].batch if cfg.batch is None else _whole("batch", cfg.batch)
    return [Size(depth, width, batch) for depth in depths for width in widths]


def pick(what: str, names: Any, known: Mapping[str, T]) -> Iterable[T]:
    """Return the named values, or all if none is named; ValueError for an unknown name."""
    chosen = _listed(names) or list(known)
    if unknown := [name for name in chosen if name not in known]:
        raise ValueError(f"{what}={unknown}: unknown; take some of {', '.join(known)}")
    return [known[name] for name in chosen]


def read_device(name: str) -> torch.device:
    """Return the device that `auto`, `cpu` or `cuda` names; ValueError for another name."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.partition(":")[0] not in ("cpu", "cuda"):
        raise ValueError(f"device={name}: take auto, cpu or cuda")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device={name}: torch finds no GPU here; take device=cpu, or leave it at auto")
    return torch.device("cuda", torch.cuda.current_device()) if name == "cuda" else torch.device(name)


def _listed(value: Any) -> list[Any]:
    """Return a list, or a single value as a list; null is an empty list."""
    value = _plain(value)
    return [] if value is None else list(value) if isinstance(value, list) else [value]


def _plain(value: Any) -> Any:
    """Return a configuration's value as plain Python."""
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def _whole(what: str, value: Any) -> int:
    """Return a whole number of 1 or more; ValueError for another value."""
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{what}={value!r}: pass whole numbers of 1 or more")
    return value


def _command(cfg: DictConfig) -> str:
    """Return the command line of this run."""
    from hydra.core.hydra_config import HydraConfig

    overrides = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
    return " ".join([f"revlib {cfg.task}", *overrides])
