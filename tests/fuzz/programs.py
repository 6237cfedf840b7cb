"""Random programs as plain data: a stack, what it is called with, and what is done with it; all from one seed."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tests.fuzz.blocks import BODIES, BY_SAMPLE, CHANGES_BUFFERS, SHAPES
from tests.fuzz.uses import USES

TREATMENTS = ("reversible", "checkpoint", "selective", "store", "offload")
COUPLINGS: tuple[Any, ...] = (
    "additive", "affine", "momentum", "midpoint", "leapfrog", "scaled", "pair", {"name": "momentum", "gamma": 0.7},
    {"name": "scaled", "scale": -0.8}, {"name": "midpoint", "h": 0.3}, ["additive", "momentum", "midpoint"],
    ["leapfrog", "additive"], ["affine", "scaled"],
)  # fmt: skip
EXACT = ("additive", "midpoint", "leapfrog", "bdia")


@dataclass(frozen=True)
class BlockSpec:
    """One block: see `blocks.make`; or, by its body, an invertible step, or the same block again."""

    body: str
    mix: bool = True
    takes: str = "nothing"
    returns: str = "tensor"
    frozen: bool = False


@dataclass(frozen=True)
class Program:
    """A program. To run it again: `check(Program(...))` of `tests.fuzz.check`."""

    seed: int
    layout: str  # of SHAPES
    kind: str  # "sequential", or "list": the layers of a model, swapped
    blocks: tuple[BlockSpec, ...]
    options: dict[str, Any] = field(default_factory=dict)
    arguments: tuple[str, ...] = ()  # which the blocks are called with
    input: str = "leaf"
    autocast: bool = False
    training: bool = True
    uses: tuple[str, ...] = ("step",)


def draw(seed: int) -> Program:
    """Return the program of a seed.

    Leapfrog has no autocast without a grid: its streams grow, and a last bit of bfloat16 with them. Nor has a program
    that raises at a drift of 1 %, which affine reaches.
    """
    rng = random.Random(seed)
    layout, kind = rng.choice(list(SHAPES)), rng.choice(["sequential", "sequential", "list"])
    options = _options(rng, layout, kind)
    blocks = tuple(_blocks(rng, layout, kind, options))
    uses = [name for name in USES if _fits(name, blocks, options)]
    return Program(
        seed,
        layout,
        kind,
        blocks,
        options,
        tuple(name for name in ("shift", "memory") if rng.random() < 0.4),
        rng.choice(["leaf", "leaf", "computed", "without grad", "transposed"]),
        rng.random() < 0.15 and ("grid_bits" in options or not _drifts_in_half(options)),
        rng.random() < 0.85,
        tuple(rng.choice(uses) for _ in range(rng.choice([1, 1, 2, 3]))),
    )


def _drifts_in_half(options: dict[str, Any]) -> bool:
    return "leapfrog" in str(options["coupling"]) or options.get("on_drift") == "raise"


def _fits(use: str, blocks: Sequence[BlockSpec], options: dict[str, Any]) -> bool:
    """Return whether a use has one right result."""
    if use == "checkpoint around":  # torch's moves buffers twice, and gives a tensor once
        return not any(name in block.body for block in blocks for name in (*CHANGES_BUFFERS, "function"))
    return use != "hooks" or "memory_budget" not in options  # they fire while a plan is made, too


def _options(rng: random.Random, layout: str, kind: str) -> dict[str, Any]:
    options: dict[str, Any] = {"coupling": rng.choice(COUPLINGS)}
    dims = {"rows": [1, 0], "tokens": [2, 2, 1, 0], "images": [1, 1, 0]}[layout]
    options["split_dim"] = None if kind == "list" else rng.choice([*dims, None])
    if rng.random() < 0.15:
        options |= {"coupling": rng.choice(EXACT), "grid_bits": 12}
    if kind == "list" and rng.random() < 0.7 and "affine" not in str(options["coupling"]):
        options["residual"] = True
    if rng.random() < 0.1:
        options.pop("residual", None)
        options["branches"] = [["first"], ["second"]]
    if rng.random() < 0.12:
        options["chunks"] = rng.choice([2, [1, 2], [2, 3]])
    how = rng.random()
    if how < 0.25:
        options["memory_budget"] = round(rng.random(), 2)  # from the least possible to ordinary autograd's
    elif how < 0.55:
        options["treatments"] = [rng.choice(TREATMENTS[: rng.choice([2, 4, 5])]) for _ in range(6)]
    elif how < 0.65:
        options["store_last"] = 1
    if rng.random() < 0.3:
        options["on_drift"] = rng.choice(["ignore", "raise", "warn"])
    return options


def _blocks(rng: random.Random, layout: str, kind: str, options: dict[str, Any]) -> Iterator[BlockSpec]:
    names = list(BODIES)
    if "branches" in options:
        names = [name for name in names if not any(word in name for word in CHANGES_BUFFERS)]
    if "chunks" in options:
        names = [name for name in names if name in BY_SAMPLE]
    names = [name for name in names if layout in BODIES[name][1]]
    extras = "chunks" not in options and "branches" not in options
    steps = kind == "sequential" and extras and options["split_dim"] is not None
    for index in range(rng.randint(1, 6)):
        what = rng.random()
        if what < 0.08 and index and kind == "sequential":
            yield BlockSpec("the same again")
        elif what < 0.14 and steps:
            yield BlockSpec("roll" if "grid_bits" in options or rng.random() < 0.5 else "stretch")
        else:
            yield BlockSpec(
                rng.choice(names),
                mix=rng.random() < 0.7,
                takes=rng.choice(["nothing", "memory", "all"]),
                returns=rng.choice(["tensor", "tensor", "tensor", "tuple", "dict"]) if extras else "tensor",
                frozen=rng.random() < 0.1,
            )


def simpler(program: Program) -> Iterator[Program]:
    """Yield programs that have one thing less than this one."""
    blocks, uses = program.blocks, program.uses
    for index in range(len(blocks)):
        if len(blocks) > 1:
            rest = blocks[:index] + blocks[index + 1 :]
            if rest[0].body != "the same again":
                yield replace(program, blocks=rest)
        for change in ({"takes": "nothing"}, {"returns": "tensor"}, {"frozen": False}, {"body": "tanh"}):
            if (block := replace(blocks[index], **change)) != blocks[index] and blocks[index].body in BODIES:
                yield replace(program, blocks=(*blocks[:index], block, *blocks[index + 1 :]))
    for index in range(len(uses)):
        if len(uses) > 1:
            yield replace(program, uses=uses[:index] + uses[index + 1 :])
    for name in program.options.keys() - {"split_dim", "coupling", "grid_bits", "branches", "chunks"}:
        yield replace(program, options={key: value for key, value in program.options.items() if key != name})
    if program.options["coupling"] != "additive":
        yield replace(program, options=program.options | {"coupling": "additive"})
    for name, value in (("arguments", ()), ("input", "leaf"), ("autocast", False), ("training", True)):
        if getattr(program, name) != value:
            yield replace(program, **{name: value})  # type: ignore[arg-type]
