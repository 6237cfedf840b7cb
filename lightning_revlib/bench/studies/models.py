"""Count activation bytes of models of several families before and after the swap, by depth.

    revlib bench study=models            # in a checkout of the repository

The models are those of `tests/models`: the real classes at small random sizes. Cells are the bytes held after forward /
the peak in backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lightning_revlib.bench.studies import from_checkout
from lightning_revlib.nn import MemoryMeter, swap
from lightning_revlib.nn.meter import format_bytes


def families() -> dict[str, Any]:
    """Return the families of models by name."""
    single = {"GPT-2": ("gpt2", "GPT2"), "Llama": ("llama", "LLAMA"), "BERT": ("bert", "BERT"), "ViT": ("vit", "VIT")}
    found = {name: getattr(from_checkout(f"models.test_{file}"), family) for name, (file, family) in single.items()}
    for name, file in (("ResNet,", "resnet"), ("nn.Transformer", "transformer")):
        several = from_checkout(f"models.test_{file}").FAMILIES
        found.update({f"{name} {kind}": family for kind, family in several.items()})
    return found


def main(*, depths: Sequence[int] = (4, 8, 16), threads: int = 1) -> None:
    """Print two rows for each family, before and after the swap, and a column for each depth."""
    torch.set_num_threads(threads)
    print("| | " + " | ".join(f"depth {d}" for d in depths) + " |\n" + "|---" * (len(depths) + 1) + "|")
    for name, family in families().items():
        rows: dict[str, list[str]] = {"before": [], "after": []}
        for depth in depths:
            model, batch = family.model(depth), family.batch()
            for when, cells in rows.items():
                if when == "after":
                    swap(model, family.targets(coupling="midpoint"))
                for parameter in model.parameters():
                    parameter.grad = torch.zeros_like(parameter)
                with MemoryMeter() as meter:
                    loss = family.loss(model, batch)
                    held = meter.live
                    meter.reset_peak()
                    loss.backward()
                    cells.append(f"{format_bytes(held)} / {format_bytes(meter.peak)}")
        for when, cells in rows.items():
            print(f"| {name}, {when} | " + " | ".join(cells) + " |")
