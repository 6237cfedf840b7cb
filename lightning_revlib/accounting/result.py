"""`Memory`: the bytes of one training step by owner, as a table, a picture, and numbers for loggers."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from lightning_revlib.accounting.books import Moment, Share, Times
from lightning_revlib.accounting.curve import curve_of
from lightning_revlib.accounting.owners import HELD, KINDS, NEEDED, Owner
from lightning_revlib.accounting.picture import draw
from lightning_revlib.nn.meter import format_bytes


class Advice(NamedTuple):
    """A change, the bytes by which it lowers the highest of a step, made alone, and the line that makes it."""

    change: str
    saved: int
    line: str

    def __str__(self) -> str:
        return f"# {self.change}: saves {format_bytes(self.saved)}\n{self.line}"


@dataclass(frozen=True)
class Memory:
    """The bytes of one training step, by owner; print it.

    `moments` are four: after forward, the highest in backward, the highest in the optimizer, and between steps.
    `highest` is that of the whole step. Of each, `bytes` has the owners, and `total` is their sum: what
    `MemoryMeter` counts, and what was there before: parameters, buffers, batch and optimizer state. `shares` has each
    storage with its owner.
    """

    moments: tuple[Moment, ...]
    highest: Moment
    shares: tuple[Share, ...]
    times: Times
    blocks: Mapping[str, int]  # of each stack, their number
    advice: tuple[Advice, ...] = ()

    @property
    def existing(self) -> dict[Owner, int]:
        """The bytes by owner when the step began."""
        found = Counter[Owner]()
        for share in self.shares:
            found[share.owner] += share.size if share.born == 0 else 0
        return +found

    @property
    def after_forward(self) -> Moment:
        return self.moments[0]

    @property
    def in_backward(self) -> Moment:
        return self.moments[1]

    @property
    def in_optimizer(self) -> Moment:
        return self.moments[2]

    @property
    def between_steps(self) -> Moment:
        return self.moments[3]

    def rows(self) -> dict[str, tuple[int, ...]]:
        """Return the bytes at the four moments, by name of the owner; blocks of a stack are one owner."""
        owners = {owner for each in self.moments for owner, size in each.bytes.items() if size}
        found: dict[str, list[int]] = {}
        for owner in sorted(owners, key=lambda owner: owner.rank):
            row = found.setdefault(self.name(owner), [0] * len(self.moments))
            for n, each in enumerate(self.moments):
                row[n] += each.bytes.get(owner, 0)
        return {name: tuple(row) for name, row in found.items()}

    def name(self, owner: Owner) -> str:
        """Return what the table calls an owner; the blocks of a stack have one name."""
        if owner.kind not in (HELD, NEEDED):
            return str(owner)
        stack = self._stack_of(owner.path)
        return f"{stack or 'the model'}, {owner.kind.replace('blocks', f'its {self.blocks[stack]} blocks')}"

    def to_dict(self, prefix: str = "memory/") -> dict[str, float]:
        """Return the bytes at each moment by kind of owner, for loggers: "memory/in_backward/gradients" and so on."""
        kinds = [kind for kind in KINDS if any(owner.kind == kind for each in self.moments for owner in each.bytes)]
        values = {f"{prefix}highest": float(self.highest.total)}
        for each in self.moments:
            path = prefix + each.name.removeprefix("highest ").replace(" ", "_")
            values[f"{path}/total"] = float(each.total)
            for kind in kinds:
                size = sum(size for owner, size in each.bytes.items() if owner.kind == kind)
                values[f"{path}/{kind.replace(' ', '_')}"] = float(size)
        return values

    def plot(self, path: str | Path, title: str = "one training step") -> Path:
        """Draw the bytes over the step, stacked by owner, with the peak named; return the path of the picture.

        Args:
            path: a .png, .svg or .pdf file.
            title: of the picture.
        """
        owners = sorted({share.owner for share in self.shares}, key=lambda owner: owner.rank)
        names = {owner: self.name(owner) for owner in owners}
        return draw(curve_of(self.shares, names, self.times, self.highest), title, Path(path))

    def __str__(self) -> str:
        head = ["", *[each.name for each in self.moments]]
        rows = [[name, *map(_format, sizes)] for name, sizes in self.rows().items()]
        rows.append(["total", *[_format(each.total) for each in self.moments]])
        first, *widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
        lines = []
        for name, *cells in [head, *rows]:
            sizes = [cell.rjust(width + 2) for cell, width in zip(cells, widths, strict=True)]
            lines.append(name.ljust(first) + "".join(sizes))
        cause = f", at {self.highest.cause}" if self.highest.cause else ""
        part = self.times.part(self.highest.time)
        lines.append(f"highest of all: {format_bytes(self.highest.total)}, in {part}{cause}")
        return "\n".join([*lines, *map(str, self.advice)])

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"

    def _stack_of(self, path: str) -> str:
        return next((s for s in self.blocks if path == s or not s or path.startswith(f"{s}.")), "")


def _format(size: int) -> str:
    return format_bytes(size) if size else "-"
