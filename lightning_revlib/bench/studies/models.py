"""Activation bytes of models of several families, before and after the swap, at three depths.

    python -m benchmarks.models

The models are those of `tests/models`: the real classes at small random sizes. Held after forward / peak in backward.
"""

from __future__ import annotations

import torch

import lightning_revlib as revlib
from lightning_revlib.nn.meter import format_bytes
from tests.models.test_bert import BERT
from tests.models.test_gpt2 import GPT2
from tests.models.test_llama import LLAMA
from tests.models.test_resnet import FAMILIES as RESNETS
from tests.models.test_transformer import FAMILIES as TRANSFORMERS
from tests.models.test_vit import VIT

FAMILIES = {
    "GPT-2": GPT2, "Llama": LLAMA, "BERT": BERT, "ViT": VIT,
    **{f"ResNet, {name}": family for name, family in RESNETS.items()},
    **{f"nn.Transformer {name}": family for name, family in TRANSFORMERS.items()},
}  # fmt: skip


def main() -> None:
    print("| | " + " | ".join(f"depth {d}" for d in (4, 8, 16)) + " |\n|---|---|---|---|")
    for name, family in FAMILIES.items():
        rows: dict[str, list[str]] = {"before": [], "after": []}
        for depth in (4, 8, 16):
            model, batch = family.model(depth), family.batch()
            for when, cells in rows.items():
                if when == "after":
                    revlib.swap(model, family.targets(coupling="midpoint"))
                for parameter in model.parameters():
                    parameter.grad = torch.zeros_like(parameter)
                with revlib.MemoryMeter() as meter:
                    loss = family.loss(model, batch)
                    held = meter.live
                    meter.reset_peak()
                    loss.backward()
                    cells.append(f"{format_bytes(held)} / {format_bytes(meter.peak)}")
        for when, cells in rows.items():
            print(f"| {name}, {when} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
